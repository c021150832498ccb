"""Small Linen models that know nothing of qjax."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, LAYERS = 17, 64, 4, 2


class Block(nn.Module):
    """Attention and a gated MLP; `use_bias` as most models before or after Llama have it."""

    use_bias: bool = False
    dropout: float = 0.0
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x, deterministic=True):
        h = nn.RMSNorm(name="attn_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=HEADS, use_bias=self.use_bias, name="attn"
        )(h, h)
        h = nn.RMSNorm(name="mlp_norm")(x)
        gate, up, down = (
            self.dense(features, use_bias=self.use_bias, name=name)
            for name, features in [("gate", 2 * WIDTH), ("up", 2 * WIDTH), ("down", WIDTH)]
        )
        h = nn.silu(gate(h)) * up(h)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        return x + down(h)


class Loop(nn.Module):
    """A language model whose layers are separate modules."""

    use_bias: bool = False
    dropout: float = 0.0
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, ids, deterministic=True):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(ids)
        for i in range(LAYERS):
            block = Block(self.use_bias, self.dropout, self.dense, name=f"layer_{i}")
            x = block(x, deterministic)
        return self.dense(VOCAB, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


class Scanned(nn.Module):
    """The same with stacked layers under scan and remat, and the output head tied."""

    use_bias: bool = False
    dropout: float = 0.0
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, ids, deterministic=True):
        embed = nn.Embed(VOCAB, WIDTH, name="embed")

        def body(block, x, _):
            return block(x, deterministic), None

        scan = nn.scan(
            nn.remat(body),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=LAYERS,
        )
        x, _ = scan(Block(self.use_bias, self.dropout, self.dense, name="layers"), embed(ids), None)
        return embed.attend(nn.RMSNorm(name="norm")(x))


def make(cls, *, abstract=False, **fields):
    """Return a model, its parameters (or their shapes) and a batch of ids [4, 8]."""
    model = cls(**fields)
    ids = np.random.default_rng(7).integers(0, VOCAB, (4, 8), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    return model, shapes if abstract else values(shapes), jnp.asarray(ids)


def values(shapes):
    """Return numbers of the size that initializers give, without compiling the model for them."""
    rng = np.random.default_rng(0)

    def value(path, leaf):
        if path[-1].key in ("scale", "bias"):
            return jnp.full(leaf.shape, float(path[-1].key == "scale"), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) / WIDTH**0.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def paths(tree) -> list[str]:
    """Return the "/"-joined paths of the leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def max_error(actual, expected) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())
