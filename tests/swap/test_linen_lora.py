"""Adapters in a Linen tree: added, merged, decoded away."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.swap.linen import add_lora_params, dequantize_params, merge_lora_params
from tests.swap.linen_models import Scanned, make, paths

CFG = qjax.QuantConfig(block_size=32, double_quant=False, include="layers")
LORA = qjax.LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def qparams():
    _, params, _ = make(Scanned)
    return qjax.quantize_params(params, CFG)


def test_adapters_have_the_kernels_axes_and_stack(qparams, key):
    params = add_lora_params(qparams, LORA, key)["layers"]
    shapes = {
        "attn/query": ((2, 64, 4), (2, 4, 4, 16)),
        "attn/out": ((2, 4, 16, 4), (2, 4, 64)),
        "down": ((2, 128, 4), (2, 4, 64)),
    }
    for name, expected in shapes.items():
        box = params
        for part in name.split("/"):
            box = box[part]
        box = box["kernel"]
        assert (box.lora_a.shape, box.lora_b.shape) == expected
        assert box.scaling == 2.0 and not box.lora_b.any()
        # kaiming: uniform within 1 / sqrt(fan_in), and as wide as that.
        bound = 1 / np.sqrt(np.prod(expected[0][1:-1]))
        assert 0.9 * bound < jnp.abs(box.lora_a).max() <= bound
        assert not jnp.array_equal(box.lora_a[0], box.lora_a[1])
    assert not jnp.array_equal(params["gate"]["kernel"].lora_a, params["up"]["kernel"].lora_a)


def test_include_and_exclude_choose_layers(qparams, key):
    cfg = dataclasses.replace(LORA, include="attn", exclude="key$")
    found = {path for path in paths(add_lora_params(qparams, cfg, key)) if path.endswith("lora_a")}
    assert found == {f"layers/attn/{name}/kernel/lora_a" for name in ("query", "value", "out")}


def test_an_adapter_does_not_depend_on_the_others(qparams, key):
    every = add_lora_params(qparams, LORA, key)
    only = add_lora_params(qparams, dataclasses.replace(LORA, include="down"), key)
    a = [tree["layers"]["down"]["kernel"].lora_a for tree in (every, only)]
    np.testing.assert_array_equal(*a)


def test_what_cannot_take_an_adapter(qparams, key):
    with pytest.raises(ValueError, match=r"include='norm' matches no 4-bit layer.*attn/key"):
        add_lora_params(qparams, dataclasses.replace(LORA, include="norm"), key)
    with pytest.raises(ValueError, match=r"no kernel is in 4 bits.*quantize_params first"):
        add_lora_params({"up": {"kernel": jnp.ones((64, 8))}}, LORA, key)
    with pytest.raises(ValueError, match="kernel has an adapter already"):
        add_lora_params(add_lora_params(qparams, LORA, key), LORA, key)


def test_merge_is_exact(rng, key):
    """dequantize(W) + scaling * A B in float64, rounded once to the dtype that is asked for."""
    w = nn.Partitioned(jnp.asarray(rng.normal(size=(3, 64, 8)), jnp.float32), (None, "in", "out"))
    tree = {"params": {"up": {"kernel": w, "bias": jnp.ones((3, 8))}}}
    qparams = qjax.quantize_params(tree, CFG_ALL)
    params = add_lora_params(qparams, LORA, key)
    box = params["params"]["up"]["kernel"]
    box = dataclasses.replace(box, lora_b=jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.float32))
    params["params"]["up"]["kernel"] = box
    decoded, a, b = (np.asarray(x, np.float64) for x in (box.q.dequantize(), *box.adapter))
    expected = decoded + 2.0 * a @ b
    for dtype in (jnp.float32, jnp.bfloat16):
        merged = merge_lora_params(params, dtype)["params"]["up"]["kernel"]
        assert merged.names == w.names and merged.value.dtype == dtype
        # Half an ulp of the dtype, and the float32 sum before it.
        eps = float(jnp.finfo(dtype).eps) / 2 + 8 * np.finfo(np.float32).eps
        error = np.abs(np.asarray(merged.value, np.float64) - expected)
        assert (error <= eps * np.maximum(np.abs(expected), 1)).all()
    assert merge_lora_params(params)["params"]["up"]["kernel"].value.dtype == jnp.bfloat16
    assert merge_lora_params(params)["params"]["up"]["bias"].dtype == jnp.float32


CFG_ALL = qjax.QuantConfig(block_size=32, double_quant=False)


def test_dequantize_gives_the_float_tree_back(qparams, key):
    _, params, _ = make(Scanned)
    decoded = dequantize_params(qparams)
    assert jax.tree.structure(decoded) == jax.tree.structure(params)
    assert jax.tree.map(lambda x: x.dtype, decoded) == jax.tree.map(lambda x: x.dtype, params)
    w = qparams["layers"]["down"]["kernel"].q.dequantize()
    np.testing.assert_array_equal(decoded["layers"]["down"]["kernel"], w)
    with pytest.raises(ValueError, match=r"layers/attn/key/kernel has an adapter: use merge_lora"):
        dequantize_params(add_lora_params(qparams, LORA, key))
