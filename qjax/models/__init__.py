"""Config-driven language models in NNX. They know nothing of file formats: see `qjax.hf`."""

from qjax.models.causal_lm import CausalLM as CausalLM
from qjax.models.config import ModelConfig as ModelConfig
from qjax.models.config import RopeConfig as RopeConfig
