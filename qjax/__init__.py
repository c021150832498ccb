"""qjax: 4-bit weights, LoRA and fast matrix products for JAX and Flax."""

from qjax.calibration import allocate_bits as allocate_bits
from qjax.calibration import calibrate as calibrate
from qjax.checkpoint import load as load
from qjax.checkpoint import save as save
from qjax.checkpoint import save_async as save_async
from qjax.core.blockwise import quantize as quantize
from qjax.core.config import QuantConfig as QuantConfig
from qjax.core.formats import register_format as register_format
from qjax.core.qtensor import QTensor as QTensor
from qjax.evaluation import evaluate as evaluate
from qjax.hf.peft import load_adapter as load_adapter
from qjax.hf.peft import save_adapter as save_adapter
from qjax.hf.pretrained import from_pretrained as from_pretrained
from qjax.hf.tokenizer import load_tokenizer as load_tokenizer
from qjax.nn.linen import QuantDense as QuantDense
from qjax.nn.lora import LoraConfig as LoraConfig
from qjax.nn.registry import register as register
from qjax.ops.matmul import einsum as einsum
from qjax.ops.matmul import matmul as matmul
from qjax.ops.take import take as take
from qjax.swap.linen import add_lora_params as add_lora_params
from qjax.swap.linen import quantize_params as quantize_params
from qjax.swap.linen_apply import apply as apply
from qjax.swap.linen_apply import fused as fused
from qjax.swap.merge import dequantize_model as dequantize_model
from qjax.swap.merge import merge_lora as merge_lora
from qjax.swap.nnx import add_lora as add_lora
from qjax.swap.nnx import quantize_model as quantize_model
from qjax.swap.offload import offload as offload
from qjax.swap.qat import fake_quantize_params as fake_quantize_params
from qjax.swap.qat import fake_quantized as fake_quantized
from qjax.swap.report import memory_footprint as memory_footprint
from qjax.swap.report import report as report
from qjax.swap.shardings import shardings as shardings
from qjax.train import combine as combine
from qjax.train import lora_mask as lora_mask
from qjax.train import lora_optimizer as lora_optimizer
from qjax.train import partition as partition

__version__ = "0.1.0"
