"""Bits go where the output feels them, within the budget."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax

SIZES = (64, 64, 64, 64)


class Net(nnx.Module):
    """Layers of which the second matters much more than the others."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List(nnx.Linear(64, 64, rngs=rngs) for _ in SIZES)
        self.gains = (1.0, 30.0, 3.0, 0.1)

    def __call__(self, x):
        return sum(g * layer(x) for g, layer in zip(self.gains, self.layers, strict=True))


BATCHES = [np.random.default_rng(i).standard_normal((8, 64)).astype(np.float32) for i in range(2)]
CONFIG = qjax.QuantConfig(compute_dtype=jnp.float32)


def formats(cfg) -> tuple[str, ...]:
    return tuple(cfg.at(f"layers/{i}/kernel").format for i in range(len(SIZES)))


def output_error(model, choice) -> float:
    overrides = {f"layers/{i}/": {"format": f} for i, f in enumerate(choice)}
    cfg = qjax.QuantConfig(compute_dtype=jnp.float32, overrides=overrides)
    quantized = qjax.quantize_model(nnx.clone(model), cfg)
    return float(np.mean([jnp.mean((quantized(x) - model(x)) ** 2) for x in BATCHES]))


def test_the_best_of_all_choices_within_the_budget():
    model = Net(nnx.Rngs(0))
    # int8 takes 8.5 bits of these 64 x 64 weights, nf4 4.14: two layers in int8.
    cfg = qjax.allocate_bits(model, BATCHES, budget_bits=6.5, cfg=CONFIG)
    chosen = formats(cfg)
    assert chosen == ("nf4", "int8", "int8", "nf4")
    quantized = qjax.quantize_model(nnx.clone(model), cfg)
    weights = [layer.kernel.q for layer in quantized.layers]
    assert 8 * sum(q.nbytes for q in weights) / sum(q.size for q in weights) <= 6.5
    twos = [c for c in itertools.product(("nf4", "int8"), repeat=4) if c.count("int8") == 2]
    errors = {c: output_error(model, c) for c in twos}
    assert min(errors, key=lambda c: errors[c]) == chosen


def test_parameters_and_a_distance_of_ones_own():
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}}
    seen = []

    def distance(a, b):
        seen.append(a.shape)
        return jnp.max(jnp.abs(a - b))

    def call(params, x):
        return x @ params["a"]["kernel"]

    cfg = qjax.allocate_bits(params, BATCHES, 9.0, cfg=CONFIG, call=call, distance=distance)
    assert cfg.at("a/kernel").format == "int8" and set(seen) == {(8, 64)}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"batches": [], "budget_bits": 5.0}, "batches is empty"),
        (
            {"batches": [BATCHES[0], np.ones((8, 63))], "budget_bits": 5.0},
            r"batches\[1\] does not fit the model: .*63",
        ),
        (
            {"batches": BATCHES, "budget_bits": 4.0},
            r"budget_bits=4.0 cannot be met: the smallest of the formats needs 4.141",
        ),
        ({"batches": BATCHES, "budget_bits": 9.0, "formats": ["nf5"]}, "format must be one of"),
    ],
)
def test_misuse(kwargs, message):
    with pytest.raises(ValueError, match=message):
        qjax.allocate_bits(Net(nnx.Rngs(0)), cfg=CONFIG, **kwargs)
