"""qjax: 4-bit weights, LoRA and fast matrix products for JAX and Flax."""

from qjax.core.blockwise import quantize as quantize
from qjax.core.config import QuantConfig as QuantConfig
from qjax.core.qtensor import QTensor as QTensor
from qjax.hf.pretrained import from_pretrained as from_pretrained
from qjax.hf.tokenizer import load_tokenizer as load_tokenizer
from qjax.ops.matmul import einsum as einsum
from qjax.ops.matmul import matmul as matmul
from qjax.ops.take import take as take
from qjax.train import combine as combine
from qjax.train import lora_mask as lora_mask
from qjax.train import lora_optimizer as lora_optimizer
from qjax.train import partition as partition

__version__ = "0.1.0"
