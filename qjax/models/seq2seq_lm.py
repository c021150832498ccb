"""T5 in NNX: an encoder, a decoder that also attends to what it made, and an output head."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.generate import as_tokens, generate
from qjax.models.attention import Attention, attend
from qjax.models.base import Pretrained
from qjax.models.block import Block
from qjax.models.cache import KVCache, init_cache
from qjax.models.config import FULL, ModelConfig
from qjax.models.context import Context, causal_contexts, encoder_contexts, encoder_mask
from qjax.models.mlp import MLP
from qjax.models.norm import make_norm
from qjax.models.relative import RelativeBias
from qjax.models.stack import run_layers


@dataclass(frozen=True)
class T5Config(ModelConfig):
    """A `ModelConfig`, whose layers are the encoder's, and what T5 adds.

    Attributes:
        num_decoder_layers: blocks of the decoder.
        relative_buckets, relative_distance: see `RelativeBias`.
        scale_logits: multiply by 1 / sqrt(hidden_size) before the head (the first T5).
        decoder_start_token_id: what a generated text begins with.
    """

    num_decoder_layers: int = 1
    relative_buckets: int = 32
    relative_distance: int = 128
    scale_logits: bool = True
    decoder_start_token_id: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.scan_layers:
            raise NotImplementedError("scan_layers is not implemented for encoder-decoder models")


class Memory(NamedTuple):
    """What the decoder keeps of the text that the encoder has read.

    Attributes:
        keys_values: for each decoder layer, both [B, T, heads, head_dim].
        mask: bool [B or 1, 1, 1, T or 1], True on real tokens.
    """

    keys_values: tuple[tuple[jax.Array, jax.Array], ...]
    mask: jax.Array


class Seq2SeqLM(Pretrained):
    """An encoder-decoder of the T5 kind (arXiv:1910.10683).

    Args:
        dtype: of the computation; logits are float32 whatever it is.
        param_dtype: of the stored weights; None is `dtype`.

    Example:
        >>> config = T5Config(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        ...     positions="none", attention_scale=1.0, mlp="plain", hidden_act="relu")
        >>> model = Seq2SeqLM(config, rngs=nnx.Rngs(0))
        >>> ids = jnp.ones((1, 4), jnp.int32)
        >>> model(ids, decoder_input_ids=ids[:, :2]).shape
        (1, 2, 32)
    """

    def __init__(self, config: T5Config, *, dtype=jnp.float32, param_dtype=None, rngs: nnx.Rngs):
        param_dtype = dtype if param_dtype is None else param_dtype
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, **kinds)
        self.encoder = Encoder(config, **kinds)
        self.decoder = Decoder(config, **kinds)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, **kinds
            )

    def __call__(self, ids, attention_mask=None, *, decoder_input_ids) -> jax.Array:
        """Return float32 logits [B, D, vocab] for the token after each of `decoder_input_ids`.

        Args:
            ids: int32 [B, T], the text that the encoder reads.
            attention_mask: int32 or bool [B, T], 0 on its padding, on any side.
            decoder_input_ids: int32 [B, D], without padding.
        """
        decoder_input_ids, _ = as_tokens(decoder_input_ids)
        memory = self.encode(ids, attention_mask)
        x = self.embed_tokens(decoder_input_ids).astype(self.dtype)
        hidden, _ = self.decoder(x, memory, None, None)
        return self.logits(hidden)

    def encode(self, ids, attention_mask=None) -> Memory:
        """Read ids [B, T]: run the encoder."""
        ids, attention_mask = as_tokens(ids, attention_mask)
        encoded = self.encoder(self.embed_tokens(ids).astype(self.dtype), attention_mask)
        keys_values = tuple(layer.cross_attn.memory(encoded) for layer in self.decoder.layers)
        return Memory(keys_values, encoder_mask(attention_mask))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply the output head: [..., hidden] to float32 [..., vocab]."""
        if self.config.scale_logits:
            hidden = hidden * jnp.asarray(self.config.hidden_size**-0.5, hidden.dtype)
        tied = self.config.tie_word_embeddings
        out = self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
        return out.astype(jnp.float32)

    def generate(self, ids, attention_mask=None, **options) -> jax.Array:
        """Answer each row of `ids`: int32 [B, 1 + max_new_tokens], the start token first.

        The options are those of `qjax.generate.generate`.
        """
        decoding = Decoding(self, _encode(self, ids, attention_mask))
        start = jnp.full((jnp.shape(ids)[0], 1), self.config.decoder_start_token_id, jnp.int32)
        return generate(decoding, start, **options)


_encode = nnx.jit(Seq2SeqLM.encode)


class Decoding(nnx.Module):
    """A model and the text it has read: what `qjax.generate` asks of a language model."""

    def __init__(self, model: Seq2SeqLM, memory: Memory):
        self.model = model
        self.config, self.dtype = model.config, model.dtype
        self.memory = nnx.Cache(memory)

    def init_cache(self, batch: int, slots: int, kv_format: str | None = None) -> KVCache:
        """Return an empty key-value cache of the decoder's self-attention."""
        c = self.config
        heads = (c.num_key_value_heads, c.head_dim)
        dtype = self.model.dtype
        sizes = (c.num_decoder_layers, batch, slots, *heads)
        return init_cache(*sizes, dtype, stacked=False, kv_format=kv_format)

    def hidden(self, ids, attention_mask=None, *, positions=None, cache: KVCache | None = None):
        """Return the decoder's normed stream [B, D, hidden] and the cache; needs no positions."""
        x = self.model.embed_tokens(ids).astype(self.model.dtype)
        return self.model.decoder(x, self.memory.get_value(), attention_mask, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply the output head."""
        return self.model.logits(hidden)


class Encoder(nnx.Module):
    """Blocks that see the whole text, sharing one relative bias."""

    def __init__(self, config: T5Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.relative_bias = _relative_bias(config, both_ways=True, **kinds)
        self.layers = nnx.List(Block(config, **kinds) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size, **kinds)

    def __call__(self, x: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        """Map embeddings [B, T, hidden] to hidden states."""
        columns = jnp.arange(x.shape[1])
        bias = self.relative_bias((columns[:, None] - columns[None, :])[None])
        contexts = encoder_contexts(attention_mask, bias)
        x, _ = run_layers(self.layers, self.config, x, contexts, None)
        return self.norm(x)


class Decoder(nnx.Module):
    """Blocks that see the text so far, sharing one relative bias, and the encoded text."""

    def __init__(self, config: T5Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.relative_bias = _relative_bias(config, both_ways=False, **kinds)
        count = config.num_decoder_layers
        self.layers = nnx.List(DecoderBlock(config, **kinds) for _ in range(count))
        self.norm = make_norm(config, config.hidden_size, **kinds)

    def __call__(self, x, memory: Memory, attention_mask, cache: KVCache | None):
        """Map embeddings [B, D, hidden] to hidden states and the cache."""
        length = x.shape[1]
        contexts, cache = causal_contexts(
            self.config, length, attention_mask, None, cache, self.relative_bias
        )
        for i, block in enumerate(self.layers):
            x, cache = block(x, contexts[FULL], memory, cache, i)
        if cache is not None:
            cache = cache._replace(length=cache.length + length)
        return self.norm(x), cache


class DecoderBlock(nnx.Module):
    """Self-attention, attention to the encoded text, and an MLP."""

    def __init__(self, config: T5Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input_layernorm = make_norm(config, config.hidden_size, **kinds)
        self.self_attn = Attention(config, **kinds)
        self.cross_layernorm = make_norm(config, config.hidden_size, **kinds)
        self.cross_attn = CrossAttention(config, **kinds)
        self.post_attention_layernorm = make_norm(config, config.hidden_size, **kinds)
        self.mlp = MLP(config, **kinds)

    def __call__(self, x, context: Context, memory: Memory, cache: KVCache | None, layer):
        """Map the stream x [B, D, hidden] to (x, cache)."""
        attended, cache = self.self_attn(self.input_layernorm(x), context, cache, layer)
        x = x + attended
        keys, values = memory.keys_values[layer]
        x = x + self.cross_attn(self.cross_layernorm(x), keys, values, memory.mask)
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class CrossAttention(Attention):
    """Attention whose keys and values come from the encoded text."""

    def memory(self, encoded: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return its keys and values of encoded [B, T, hidden], once for all decoder tokens."""
        heads = (*encoded.shape[:2], -1, self.config.head_dim)
        return self.k_proj(encoded).reshape(heads), self.v_proj(encoded).reshape(heads)

    def __call__(self, x: jax.Array, keys, values, mask: jax.Array) -> jax.Array:
        """Map [B, D, hidden] to the same."""
        q = self.q_proj(x).reshape(*x.shape[:2], -1, self.config.head_dim)
        out = attend(q, keys, values, Context(mask), self.config.attention_scale)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


def _relative_bias(config: T5Config, *, both_ways: bool, **kinds) -> RelativeBias:
    return RelativeBias(
        config.num_attention_heads,
        config.relative_buckets,
        config.relative_distance,
        both_ways=both_ways,
        **kinds,
    )
