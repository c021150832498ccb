"""BERT in NNX: an encoder, and the head that fills in masked tokens."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.generate import as_tokens
from qjax.models.base import Pretrained
from qjax.models.block import Block
from qjax.models.config import ModelConfig
from qjax.models.context import encoder_contexts
from qjax.models.mlp import activation
from qjax.models.norm import make_norm
from qjax.models.stack import make_layers, run_layers


@dataclass(frozen=True)
class BertConfig(ModelConfig):
    """A `ModelConfig` and what BERT adds.

    Attributes:
        type_vocab_size: kinds of segments of a text.
        head: whether there is a head; without one there is `encode` alone.
    """

    type_vocab_size: int = 2
    head: bool = True


class MaskedLM(Pretrained):
    """An encoder of the BERT kind (arXiv:1810.04805), its head tied to the embeddings.

    Args:
        dtype: of the computation; logits and hidden states are float32 whatever it is.
        param_dtype: of the stored weights; None is `dtype`.

    Example:
        >>> config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        ...     norm="layer", block="post", mlp="plain", positions="learned")
        >>> model = MaskedLM(config, rngs=nnx.Rngs(0))
        >>> model.encode(jnp.ones((1, 4), jnp.int32)).shape
        (1, 4, 16)
    """

    def __init__(self, config: BertConfig, *, dtype=jnp.float32, param_dtype=None, rngs: nnx.Rngs):
        param_dtype = dtype if param_dtype is None else param_dtype
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        hidden = config.hidden_size
        self.embed_tokens = nnx.Embed(config.vocab_size, hidden, **kinds)
        self.embed_positions = nnx.Embed(config.position_rows, hidden, **kinds)
        self.embed_types = nnx.Embed(config.type_vocab_size, hidden, **kinds)
        self.embed_norm = make_norm(config, hidden, **kinds)
        self.layers = make_layers(
            lambda rngs: Block(config, **{**kinds, "rngs": rngs}), config, rngs
        )
        if config.head:
            self.transform = Transform(config, **kinds)
            self.head_bias = nnx.Param(jnp.zeros((config.vocab_size,), param_dtype))

    def encode(self, ids, attention_mask=None, *, token_type_ids=None) -> jax.Array:
        """Return float32 hidden states [B, T, hidden].

        Args:
            ids: int32 [B, T].
            attention_mask: int32 or bool [B, T], 0 on padding. States of padding are meaningless.
            token_type_ids: int32 [B, T], the segment of each token; None is segment 0.
        """
        ids, attention_mask = as_tokens(ids, attention_mask)
        if token_type_ids is None:
            types = jnp.zeros_like(ids)
        else:
            types, _ = as_tokens(token_type_ids)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        x = self.embed_tokens(ids) + self.embed_positions(positions) + self.embed_types(types)
        x = self.embed_norm(x.astype(self.dtype))
        contexts = encoder_contexts(attention_mask)
        x, _ = run_layers(self.layers, self.config, x, contexts, None)
        return x.astype(jnp.float32)

    def __call__(self, ids, attention_mask=None, *, token_type_ids=None) -> jax.Array:
        """Return float32 logits [B, T, vocab] for the token at each place; arguments as `encode`.

        Raises:
            ValueError: the checkpoint had no head.
        """
        if not self.config.head:
            raise ValueError("this model has no language-model head: use model.encode")
        hidden = self.encode(ids, attention_mask, token_type_ids=token_type_ids)
        hidden = self.transform(hidden.astype(self.dtype))
        logits = self.embed_tokens.attend(hidden).astype(jnp.float32)
        return logits + self.head_bias[...].astype(jnp.float32)[None, None]


class Transform(nnx.Module):
    """What stands between the last block and the tied head."""

    def __init__(self, config: BertConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dense = nnx.Linear(config.hidden_size, config.hidden_size, **kinds)
        self.norm = make_norm(config, config.hidden_size, **kinds)
        self.activation = activation(config.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., hidden] to the same."""
        return self.norm(self.activation(self.dense(x)))
