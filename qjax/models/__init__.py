"""Config-driven language models in NNX. They know nothing of file formats: see `qjax.hf`."""

from qjax.models.causal_lm import CausalLM as CausalLM
from qjax.models.config import ExpertsConfig as ExpertsConfig
from qjax.models.config import ModelConfig as ModelConfig
from qjax.models.config import RopeConfig as RopeConfig
from qjax.models.masked_lm import BertConfig as BertConfig
from qjax.models.masked_lm import MaskedLM as MaskedLM
from qjax.models.seq2seq_lm import Seq2SeqLM as Seq2SeqLM
from qjax.models.seq2seq_lm import T5Config as T5Config
