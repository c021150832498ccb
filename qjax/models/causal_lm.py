"""A decoder-only language model in NNX: embedding, blocks, final norm, output head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.generate import as_tokens, generate
from qjax.models.cache import KVCache, init_cache
from qjax.models.config import ModelConfig
from qjax.models.layers import Block, rms_norm
from qjax.models.rope import rotation


class CausalLM(nnx.Module):
    """A decoder-only language model of the Llama kind.

    Layers carry Hugging Face's names: `embed_tokens`, `layers/0/self_attn/q_proj`, ...,
    `layers/0/mlp/down_proj`, `norm`, `lm_head` (absent when the embeddings are tied). With
    `config.scan_layers` there is one stacked block at `layers` and no index in the path.

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
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, **kinds, rngs=rngs)
        if config.scan_layers:
            make = nnx.vmap(lambda rngs: Block(config, **kinds, rngs=rngs))
            self.layers: Any = nnx.split_rngs(splits=config.num_hidden_layers)(make)(rngs)
        else:
            self.layers = nnx.List(
                Block(config, **kinds, rngs=rngs) for _ in range(config.num_hidden_layers)
            )
        self.norm = rms_norm(config, **kinds, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, **kinds, rngs=rngs
            )

    def __call__(self, ids, attention_mask=None, *, positions=None) -> jax.Array:
        """Return float32 logits [B, T, vocab] for the token after each of `ids`.

        Args:
            ids: int32 [B, T].
            attention_mask: int32 or bool [B, T], 0 on padding (left, right or both). Logits at
                padding are meaningless.
            positions: int32 [B, T]; None counts columns from 0.
        """
        ids, attention_mask = as_tokens(ids, attention_mask)
        hidden, _ = self.hidden(ids, attention_mask, positions=positions)
        return self.logits(hidden)

    def hidden(self, ids, attention_mask=None, *, positions=None, cache: KVCache | None = None):
        """Return the normed stream [B, T, hidden] and the cache with these tokens appended.

        With a cache, `ids` take the next T slots and also attend to the valid slots before them.
        """
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(ids.shape[1]), ids.shape)
        mask, cache = _mask(ids, attention_mask, cache)
        rope = rotation(self.config.rope, self.config.head_dim, positions)
        x = self.embed_tokens(ids).astype(self.dtype)
        run = self._scan if self.config.scan_layers else self._loop
        x, cache = run(x, rope, mask, cache)
        if cache is not None:
            cache = cache._replace(length=cache.length + ids.shape[1])
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply the output head: [..., hidden] to float32 [..., vocab]."""
        tied = self.config.tie_word_embeddings
        out = self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
        return out.astype(jnp.float32)

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """Return an empty key-value cache for `slots` tokens a row, in the compute dtype."""
        c = self.config
        return init_cache(
            c.num_hidden_layers,
            batch,
            slots,
            c.num_key_value_heads,
            c.head_dim,
            self.dtype,
            stacked=c.scan_layers,
        )

    def generate(self, ids, attention_mask=None, **options) -> jax.Array:
        """Continue each row of `ids`; the options are those of `qjax.generate.generate`."""
        return generate(self, ids, attention_mask, **options)

    def _loop(self, x, rope, mask, cache):
        call = nnx.remat(_call, static_argnums=(5,)) if self.config.remat else _call
        for i, block in enumerate(self.layers):
            x, cache = call(block, x, rope, mask, cache, i)
        return x, cache

    def _scan(self, x, rope, mask, cache):
        # The cache is carried, so that XLA updates it in place. Of the layers' state only the
        # random streams (dropout) come back out: the weights stay where they are.
        graphdef, streams, weights = nnx.split(self.layers, nnx.RngState, ...)

        def body(carry, layer):
            x, cache = carry
            index, streams, weights = layer
            block = nnx.merge(graphdef, streams, weights)
            carry = block(x, rope, mask, cache, index)
            return carry, nnx.state(block, nnx.RngState)

        body = jax.checkpoint(body) if self.config.remat else body
        indices = jnp.arange(self.config.num_hidden_layers)
        carry, streams = jax.lax.scan(body, (x, cache), (indices, streams, weights))
        nnx.update(self.layers, streams)
        return carry


def _call(block, x, rope, mask, cache, layer):
    return block(x, rope, mask, cache, layer)


def _mask(ids, attention_mask, cache: KVCache | None):
    """Return the mask bool [B, 1, T, slots] (None: plain causal) and the cache with new `valid`."""
    if cache is None and attention_mask is None:
        return None, None
    real = jnp.ones(ids.shape, jnp.bool_) if attention_mask is None else attention_mask != 0
    start = 0
    if cache is not None:
        start = cache.length
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, real, start, axis=1)
        cache, real = cache._replace(valid=valid), valid
    query = start + jnp.arange(ids.shape[1])
    causal = jnp.arange(real.shape[1])[None, :] <= query[:, None]  # [T, slots]
    return real[:, None, None, :] & causal[None, None], cache
