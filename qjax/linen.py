"""Linen layers with 4-bit kernels, drop-in for those of `flax.linen`."""

from qjax.nn.linen import QuantDense as QuantDense
from qjax.nn.linen import QuantDenseGeneral as QuantDenseGeneral
from qjax.nn.linen import QuantEinsum as QuantEinsum
from qjax.nn.linen import QuantEmbed as QuantEmbed
from qjax.nn.linen_box import QuantBox as QuantBox
