"""The NNX layers by cases, each with the float64 einsum that it has to equal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qjax
from qjax.nn.lora import LoraConfig
from qjax.nnx import QuantConv, QuantEinsum, QuantEmbed, QuantLinear, QuantLinearGeneral

F32 = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)
LORA = LoraConfig(rank=4, alpha=12)


class Case(NamedTuple):
    make: type
    args: tuple
    kwargs: dict
    x_shape: tuple[int, ...]
    equation: str  # x, weight -> y
    adapter: str  # A, B -> weight
    weight: str = "kernel"
    call: str = "__call__"


CASES = {
    "linear": Case(QuantLinear, (64, 8), {}, (2, 3, 64), "btk,kn->btn", "kr,rn->kn"),
    "general": Case(
        QuantLinearGeneral,
        ((4, 16), (2, 3)),
        {"axis": (-2, -1)},
        (2, 5, 4, 16),
        "btij,ijno->btno",
        "ijr,rno->ijno",
    ),
    "general_first_axis": Case(
        QuantLinearGeneral, (64, 8), {"axis": 1}, (2, 64, 3), "bkt,kn->btn", "kr,rn->kn"
    ),
    "general_batch": Case(
        QuantLinearGeneral,
        (64, 8),
        {"batch_axis": {0: 3}},
        (3, 2, 64),
        "ebk,ekn->ebn",
        "ekr,ern->ekn",
    ),
    "einsum": Case(
        QuantEinsum,
        ("btd,dnh->btnh", (64, 2, 3), (2, 3)),
        {},
        (2, 5, 64),
        "btd,dnh->btnh",
        "dr,rnh->dnh",
    ),
    "einsum_middle": Case(
        QuantEinsum,
        ("...d,ndh->n...h", (2, 64, 3), (2, 3)),
        {},
        (5, 64),
        "td,ndh->nth",
        "dr,rnh->ndh",
    ),
    "conv": Case(
        QuantConv,
        (64, 8, (1, 1)),
        {},
        (2, 3, 4, 64),
        "bhwk,ijkn->bhwn",
        "ijkr,rn->ijkn",
    ),
    "einsum_experts": Case(
        QuantEinsum,
        ("ebd,edf->ebf", (3, 64, 8)),
        {},
        (3, 2, 64),
        "ebd,edf->ebf",
        "edr,erf->edf",
    ),
    "embed_attend": Case(
        QuantEmbed, (10, 64), {}, (2, 64), "bd,vd->bv", "dr,rv->vd", "embedding", "attend"
    ),
}


def build(case: Case, config=F32, **kwargs):
    layer = case.make(*case.args, **case.kwargs, config=config, rngs=nnx.Rngs(0), **kwargs)
    if getattr(layer, "bias", None) is not None:
        layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape)
    if layer.lora_b is not None:
        layer.lora_b[...] = jax.random.normal(jax.random.key(2), layer.lora_b.shape)
    return layer


def inputs(case: Case, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(3), case.x_shape, dtype)


def call(layer, case, x):
    return getattr(layer, case.call)(x)


def oracle(layer, case, x):
    """float64: x W + bias + scaling * x (A B)."""
    w = np.asarray(getattr(layer, case.weight).q.dequantize(jnp.float32), np.float64)
    if layer.lora_a is not None:
        a, b = np.asarray(layer.lora_a[...], np.float64), np.asarray(layer.lora_b[...], np.float64)
        w = w + layer.lora_config.scaling * np.einsum(case.adapter, a, b)
    y = np.einsum(case.equation, np.asarray(x, np.float64), w)
    bias = getattr(layer, "bias", None)
    if bias is None:
        return y
    bias = np.asarray(bias[...], np.float64)
    if case.kwargs.get("batch_axis") or case.equation.endswith("nth"):
        bias = bias[:, None]
    return y + bias
