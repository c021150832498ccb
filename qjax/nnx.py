"""The NNX layers: `import qjax.nnx`."""

from qjax.nn.nnx_conv import LoraConv as LoraConv
from qjax.nn.nnx_conv import QuantConv as QuantConv
from qjax.nn.nnx_einsum import LoraEinsum as LoraEinsum
from qjax.nn.nnx_einsum import QuantEinsum as QuantEinsum
from qjax.nn.nnx_embed import LoraEmbed as LoraEmbed
from qjax.nn.nnx_embed import QuantEmbed as QuantEmbed
from qjax.nn.nnx_linear import LoraLinear as LoraLinear
from qjax.nn.nnx_linear import LoraLinearGeneral as LoraLinearGeneral
from qjax.nn.nnx_linear import QuantLinear as QuantLinear
from qjax.nn.nnx_linear import QuantLinearGeneral as QuantLinearGeneral
from qjax.nn.nnx_param import QuantParam as QuantParam
