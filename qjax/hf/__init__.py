"""Model files of other worlds: Hugging Face folders and llama.cpp's GGUF."""

from qjax.hf.export import save_pretrained as save_pretrained
from qjax.hf.float_weights import float_weights as float_weights
from qjax.hf.peft import load_adapter as load_adapter
from qjax.hf.peft import save_adapter as save_adapter
from qjax.hf.pretrained import from_pretrained as from_pretrained
from qjax.hf.tokenizer import load_tokenizer as load_tokenizer
