"""Kernels for 4-bit weights and generation: raw arrays in, raw arrays out.

Each op picks the fastest implementation that can run on the device and the shapes at hand;
`explain` says which one that is, and why not another.
"""

from pallas_kernels.adapted_matmul import adapted_matmul as adapted_matmul
from pallas_kernels.append_attention import append_attention as append_attention
from pallas_kernels.append_packed import append_packed as append_packed
from pallas_kernels.decode_attention import decode_attention as decode_attention
from pallas_kernels.dequantize import dequantize as dequantize
from pallas_kernels.dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from pallas_kernels.dispatch import explain as explain
from pallas_kernels.dispatch import resolve as resolve
from pallas_kernels.matmul import matmul as matmul
from pallas_kernels.packed import Packed as Packed
from pallas_kernels.prepare_input import prepare_input as prepare_input
from pallas_kernels.quantize import quantize as quantize
from pallas_kernels.scales import DoubleQuantScales as DoubleQuantScales
