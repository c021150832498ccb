"""Self-attention with grouped key-value heads, and the attention product itself."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import decode_attention
from pallas_kernels.dispatch import target
from qjax.models.cache import KVCache, append_one, attend_one, read, write
from qjax.models.config import ModelConfig
from qjax.models.context import Context
from qjax.models.norm import make_norm
from qjax.models.rope import rotate
from qjax.models.step_linear import adapter_ahead, is_step, linear


class Attention(nnx.Module):
    """Self-attention over the stream, or over the cache that it is appended to."""

    def __init__(self, config: ModelConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.config = config
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, **kinds)
        query = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        if config.fused_qkv:
            self.qkv_proj = linear(config.hidden_size, query + 2 * kv, use_bias=config.qkv_bias)
        else:
            self.q_proj = linear(config.hidden_size, query, use_bias=config.qkv_bias)
            self.k_proj = linear(config.hidden_size, kv, use_bias=config.qkv_bias)
            self.v_proj = linear(config.hidden_size, kv, use_bias=config.qkv_bias)
        self.o_proj = linear(query, config.hidden_size, use_bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, config.head_dim, **kinds)
            self.k_norm = make_norm(config, config.head_dim, **kinds)
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros((config.num_attention_heads,), param_dtype))

    def __call__(
        self, x: jax.Array, context: Context, cache: KVCache | None, layer, norm=None, residual=None
    ) -> tuple[jax.Array, KVCache | None]:
        """Map [B, T, hidden] to the same and the cache, written at `layer`.

        Args:
            norm: applied to x first.
            residual: added to the result.
        """
        step = is_step(x, cache)
        if step and cache is not None and self._appends(context, cache):
            qkv = [linear(layer, x, before=norm, step=step) for layer in self._inputs()]
            qkv = jnp.concatenate(qkv, axis=-1).reshape(len(x), -1, self.config.head_dim)
            width = self.config.num_attention_heads * self.config.head_dim
            ahead = adapter_ahead(self.o_proj, jax.ShapeDtypeStruct((len(x), width), x.dtype))
            known: Any = context.mask, context.rope, self.config.attention_scale, ahead
            out, hidden, cache = append_one(qkv, cache, layer, *known)
        else:
            hidden = None
            q, k, v = self._project(x, norm, step)
            out, cache = self._attend(q, k, v, context, cache, layer)
        out = out.reshape(*x.shape[:2], -1)
        return linear(self.o_proj, out, residual=residual, step=step, hidden=hidden), cache

    def _appends(self, context: Context, cache: KVCache) -> bool:
        """Whether one kernel can rotate, write and attend."""
        c, mask, rope = self.config, context.mask, context.rope
        plain = c.fused_qkv != "heads" and not c.qk_norm and context.bias is None
        plain = plain and c.attention_softcap is None and not c.attention_sinks
        old = mask is not None and mask.shape[-1] == cache.slots and not cache.is_fresh
        turned = rope is not None and 2 * rope[0].shape[-1] == c.head_dim
        return plain and old and turned and not cache.is_packed

    def _attend(self, q, k, v, context: Context, cache: KVCache | None, layer):
        """Return what the queries see, [B, T, heads, head_dim], and the cache."""
        c, mask = self.config, context.mask
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
        scale = c.attention_scale
        more = c.attention_softcap, self.sinks[...] if c.attention_sinks else None
        if cache is not None:
            cache = write(cache, layer, k, v)
            if mask is not None and mask.shape[-1] != k.shape[1]:  # earlier ones too
                if _takes_one(q, context, *more):
                    return attend_one(q, cache, layer, mask, scale), cache
                k, v = (x.astype(q.dtype) for x in read(cache, layer))
        return attend(q, k, v, context, scale, *more), cache

    def foldings(self) -> dict[str, tuple[str, ...]]:
        """See `Pretrained.foldings`: weights on tokens do not mix the entries of a value."""
        own_values = self.config.num_key_value_heads == self.config.num_attention_heads
        return {"v_proj": ("o_proj/kernel",)} if own_values and hasattr(self, "v_proj") else {}

    def _inputs(self) -> list[Any]:
        """The layers that x is projected by."""
        if self.config.fused_qkv:
            return [self.qkv_proj]
        return [self.q_proj, self.k_proj, self.v_proj]

    def _project(self, x: jax.Array, norm, step) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values [B, T, heads, head_dim]."""
        c = self.config
        heads = (*x.shape[:2], -1, c.head_dim)
        if c.fused_qkv is None:
            if not step and norm is not None:  # once; in a step each product has it in a kernel
                x, norm = norm(x), None
            q, k, v = (linear(layer, x, before=norm, step=step) for layer in self._inputs())
            return q.reshape(heads), k.reshape(heads), v.reshape(heads)
        qkv = linear(self.qkv_proj, x, before=norm, step=step)
        if x.shape[1] == 1:  # each use of it would sum up the adapter again
            qkv = jax.lax.optimization_barrier(qkv)
        if c.fused_qkv == "heads":
            qkv = qkv.reshape(*x.shape[:2], c.num_attention_heads, 3, c.head_dim)
            return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        ends = np.cumsum([c.num_attention_heads, c.num_key_value_heads]) * c.head_dim
        q, k, v = jnp.split(qkv, ends, axis=-1)
        return q.reshape(heads), k.reshape(heads), v.reshape(heads)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: Context,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(scale * q k + bias) v, with the softmax in float32.

    Args:
        q: [B, T, heads, head_dim].
        k, v: [B, S, kv_heads, head_dim].
        context: mask and bias; no mask is plain causal.
        scale: None is 1 / sqrt(head_dim).
        softcap: caps the logits, before the bias.
        sinks: [heads] more logits, of a key without a value.
    """
    mask, bias = context.mask, context.bias
    if mask is not None and _takes_one(q, context, softcap, sinks):
        mask = jnp.broadcast_to(mask[:, 0, 0], k.shape[:2])
        # XLA's, which reads k and v as they lie here: a kernel would have them copied.
        one = functools.partial(decode_attention, scale=scale, implementation="xla")
        return one(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), mask, k.shape[1])[:, None]
    if softcap is None and sinks is None:
        how: dict[str, Any] = {"scale": scale, "is_causal": mask is None}
        if bias is None and _runs_cudnn(q, k):
            if mask is not None:
                mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))
            return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn", **how)
        out = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, **how)
        return checkpoint_name(out, "attention")
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, length, -1)
    logits *= head_dim**-0.5 if scale is None else scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits if bias is None else logits + bias
    if mask is None:
        mask = jnp.tri(length, k.shape[1], dtype=jnp.bool_)[None, None]
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        column = sinks.astype(jnp.float32)[None, :, None, None]
        column = jnp.broadcast_to(column, (batch, heads, length, 1))
        logits = jnp.concatenate([logits, column], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    weights = weights.reshape(batch, k.shape[2], -1, length, k.shape[1])
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return checkpoint_name(out.reshape(q.shape).astype(q.dtype), "attention")


def _takes_one(q: jax.Array, context: Context, softcap, sinks) -> bool:
    """Whether this is one query a row, as in decoding, with a mask and nothing more."""
    plain = context.bias is None and softcap is None and sinks is None
    return q.shape[1] == 1 and context.mask is not None and plain


def _runs_cudnn(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN's flash attention takes these, with its gradient (no smaller GPU has it)."""
    where = target()
    if where.capability is None or where.capability < (8, 0):
        return False
    widest = 256 if where.capability >= (9, 0) else 128
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and q.dtype == k.dtype
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= widest
        and q.shape[1] % 2 == 0
        and k.shape[1] % 2 == 0
    )
