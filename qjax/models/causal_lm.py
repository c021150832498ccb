"""A decoder-only language model in NNX: embedding, blocks, final norm, output head."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.generate import as_tokens, generate, stream
from qjax.models.base import Pretrained
from qjax.models.block import Block
from qjax.models.cache import KVCache, init_cache
from qjax.models.config import ModelConfig
from qjax.models.context import causal_contexts, segment_positions
from qjax.models.loss import as_labels, cross_entropy, next_labels
from qjax.models.norm import make_norm
from qjax.models.stack import make_layers, run_layers


class CausalLM(Pretrained):
    """A decoder-only language model, of the family that its config describes.

    Layers carry the names of Hugging Face's Llama, whatever the family: `embed_tokens`,
    `layers/0/self_attn/q_proj`, ..., `layers/0/mlp/down_proj`, `norm`, `lm_head` (absent when the
    embeddings are tied). With `config.scan_layers` there is one stacked block at `layers` and no
    index in the path.

    Args:
        dtype: of the computation; logits are float32 whatever it is.
        param_dtype: of the stored weights; None is `dtype`.

    Example:
        >>> config = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> model(jnp.ones((1, 4), jnp.int32)).shape
        (1, 4, 32)
    """

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, param_dtype=None, rngs: nnx.Rngs):
        param_dtype = dtype if param_dtype is None else param_dtype
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        width, hidden = config.embedding_size or config.hidden_size, config.hidden_size
        self.embed_tokens = nnx.Embed(config.vocab_size, width, **kinds)
        if config.positions == "learned":
            self.embed_positions = nnx.Embed(config.position_rows, hidden, **kinds)
        if config.embedding_norm:
            self.embed_norm = make_norm(config, hidden, **kinds)
        if config.embedding_size:
            self.project_in = nnx.Linear(width, hidden, use_bias=False, **kinds)
            self.project_out = nnx.Linear(hidden, width, use_bias=False, **kinds)
        self.layers = make_layers(
            lambda rngs: Block(config, **{**kinds, "rngs": rngs}), config, rngs
        )
        if config.final_norm:
            self.norm = make_norm(config, hidden, **kinds)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(width, config.vocab_size, use_bias=False, **kinds)

    def __call__(self, ids, attention_mask=None, *, positions=None, segment_ids=None) -> jax.Array:
        """Return float32 logits [B, T, vocab] for the token after each of `ids`.

        Args:
            ids: int32 [B, T].
            attention_mask: int32 or bool [B, T], 0 on padding (left, right or both). Logits at
                padding are meaningless.
            positions: int32 [B, T]; None counts columns from 0 (for OPT, the real tokens).
            segment_ids: int32 [B, T] of packed rows, the text that each token belongs to: tokens
                see their own text alone, and positions count from its start.
        """
        ids, attention_mask = as_tokens(ids, attention_mask)
        hidden, _ = self.hidden(ids, attention_mask, positions=positions, segment_ids=segment_ids)
        return self.logits(hidden)

    def loss(
        self,
        ids,
        attention_mask=None,
        *,
        labels=None,
        positions=None,
        segment_ids=None,
        chunk_size: int | None = None,
    ) -> jax.Array:
        """Return the mean negative log-likelihood, float32 [], of each token after those before it.

        Logits are made and used a chunk of tokens at a time (`cross_entropy`).

        Args:
            ids, attention_mask, positions, segment_ids: as in a call. Nothing is predicted at
                padding, nor a text's first token from the text before.
            labels: int32 [B, T], in the place of `ids` as what is predicted; -100 is not. Column t
                is predicted from the columns before t.
            chunk_size: tokens of a chunk; None takes what makes 128 MiB of logits.

        Example:
            >>> config = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
            ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
            >>> CausalLM(config, rngs=nnx.Rngs(0)).loss(jnp.ones((1, 4), jnp.int32)).shape
            ()
        """
        ids, attention_mask = as_tokens(ids, attention_mask)
        labels = ids if labels is None else as_labels(labels, ids)
        segments = None if segment_ids is None else as_labels(segment_ids, ids, "segment_ids")
        predicted = next_labels(labels, attention_mask, segments)
        hidden, _ = self.hidden(ids, attention_mask, positions=positions, segment_ids=segments)
        return cross_entropy(self.logits, hidden, predicted, chunk_size=chunk_size)

    def hidden(
        self,
        ids,
        attention_mask=None,
        *,
        positions=None,
        segment_ids=None,
        cache: KVCache | None = None,
    ):
        """Return the normed stream [B, T, hidden] and the cache with these tokens appended.

        With a cache, `ids` take the next T slots and also attend to the valid slots before them.
        Under `jit` it is for the caller to see that there are T: there the length is not known.

        Raises:
            ValueError: `segment_ids` of another shape than ids, or with a cache; more tokens than
                the cache has slots left, where its length is known.
        """
        if attention_mask is not None:
            attention_mask = attention_mask != 0
        if segment_ids is not None:
            if cache is not None:
                raise ValueError("segment_ids cannot be used with a cache")
            segment_ids = as_labels(segment_ids, ids, "segment_ids")
        if positions is None and segment_ids is not None:
            positions = segment_positions(segment_ids)
        elif positions is None:
            positions = self._positions(ids, attention_mask, cache)
        length = ids.shape[1]
        contexts, cache = causal_contexts(
            self.config, length, attention_mask, positions, cache, segment_ids=segment_ids
        )
        x = self._embed(ids, positions)
        x, cache = run_layers(self.layers, self.config, x, contexts, cache)
        if cache is not None:
            cache = cache._replace(length=cache.length + length)
        if self.config.final_norm:
            x = self.norm(x)
        return x, cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply the output head: [..., hidden] to float32 [..., vocab]."""
        c = self.config
        if c.embedding_size:
            hidden = self.project_out(hidden)
        out = self.embed_tokens.attend(hidden) if c.tie_word_embeddings else self.lm_head(hidden)
        out = out.astype(jnp.float32)
        if c.logit_softcap is not None:
            out = c.logit_softcap * jnp.tanh(out / c.logit_softcap)
        return out

    def init_cache(self, batch: int, slots: int, kv_format: str | None = None) -> KVCache:
        """Return an empty key-value cache for `slots` tokens a row.

        Args:
            kv_format: "int8" or "int4"; None is the compute dtype.
        """
        c = self.config
        return init_cache(
            c.num_hidden_layers,
            batch,
            slots,
            c.num_key_value_heads,
            c.head_dim,
            self.dtype,
            stacked=c.scan_layers,
            kv_format=kv_format,
        )

    def generate(self, ids, attention_mask=None, **options) -> jax.Array:
        """Continue each row of `ids`; the options are those of `qjax.generate.generate`."""
        return generate(self, ids, attention_mask, **options)

    def stream(self, ids, attention_mask=None, **options) -> Iterator[np.ndarray]:
        """Yield the new tokens of `generate` as they come: see `qjax.generate.stream`."""
        return stream(self, ids, attention_mask, **options)

    def _positions(self, ids, attention_mask, cache: KVCache | None) -> jax.Array:
        if self.config.positions_from_mask and attention_mask is not None:
            before = 0 if cache is None else cache.valid.sum(axis=1, keepdims=True, dtype=jnp.int32)
            counted = jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32)
            return jnp.where(attention_mask, before + counted - 1, 0)
        start = jnp.int32(0 if cache is None else cache.length)
        return jnp.broadcast_to(start + jnp.arange(ids.shape[1]), ids.shape)

    def _embed(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        c = self.config
        x = self.embed_tokens(ids).astype(self.dtype)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.embedding_size:
            x = self.project_in(x)
        if c.positions == "learned":
            x = x + self.embed_positions(positions + c.position_offset)
        if c.embedding_norm:
            x = self.embed_norm(x)
        return x
