"""Linen models as other libraries write them: call-time equations, shared scopes, raw weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp

VOCAB, DIM, HEADS, HEAD_DIM, HIDDEN = 50, 64, 2, 32, 96


class Einsum(nn.Module):
    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, eqn, x):
        w = self.param(self.weight_name, nn.initializers.normal(0.1), self.shape)
        return jnp.einsum(eqn, x, w)


class Embedder(nn.Module):
    def setup(self):
        init = nn.with_partitioning(nn.initializers.normal(1.0), ("vocab", None))
        self.table = self.param("input_embedding", init, (VOCAB, DIM))

    def encode(self, ids):
        return self.table[(ids,)]

    def decode(self, x):
        return x @ self.table.T


class Attention(nn.Module):
    def setup(self):
        self.q_einsum = Einsum((HEADS, DIM, HEAD_DIM))
        self.kv_einsum = Einsum((2, 1, DIM, HEAD_DIM))
        self.attn_vec_einsum = Einsum((HEADS, HEAD_DIM, DIM))

    def __call__(self, x):
        q = self.q_einsum("BTD,NDH->BTNH", x)
        k, v = self.kv_einsum("BSD,CKDH->CBSKH", x)
        share = jax.nn.softmax(jnp.einsum("BTNH,BSKH->BNTS", q, k))
        return self.attn_vec_einsum("BTNH,NHD->BTD", jnp.einsum("BNTS,BSKH->BTNH", share, v))


class FeedForward(nn.Module):
    """Its einsums put their weights into its own scope."""

    @nn.compact
    def __call__(self, x):
        gating = Einsum((2, HIDDEN, DIM), "gating_einsum")
        nn.share_scope(self, gating)
        gate, up = jnp.moveaxis(gating("...F,NHF->...NH", x), -2, 0)
        linear = Einsum((HIDDEN, DIM), "linear")
        nn.share_scope(self, linear)
        return linear("...H,HF->...F", nn.gelu(gate) * up)


class Experts(nn.Module):
    """Raw parameters, read by nothing that is known."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(0.1), ("expert", None, "model"))
        up = self.param("up", init, (4, DIM, HIDDEN))
        down = self.param("down", nn.initializers.normal(0.1), (4, HIDDEN, DIM))
        shift = self.param("shift", nn.initializers.zeros, (DIM,))
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, up))
        return jnp.einsum("btef,efd->btd", hidden, down) + shift


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + Attention(name="attn")(nn.RMSNorm(name="norm")(x))
        x = x + FeedForward(name="mlp")(x)
        return x + Experts(name="moe")(x)


class Model(nn.Module):
    """The block as it is, or two of them under scan and remat, stacked along `scan_axis`."""

    scan_axis: int | None = None

    @nn.compact
    def __call__(self, ids):
        embedder = Embedder(name="embedder")
        x = embedder.encode(ids)
        if self.scan_axis is None:
            return embedder.decode(Block(name="layer")(x))
        scanned = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": self.scan_axis},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return embedder.decode(scanned(nn.remat(Block)(name="layers"), x, None)[0])
