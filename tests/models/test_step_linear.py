"""A step of generation by the kernels of few rows, here as XLA runs them, gives the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from pallas_kernels import dispatch
from qjax.core.qslice import ArraySlice
from qjax.models import CausalLM, ModelConfig, cache, step_linear

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
IDS = np.random.default_rng(0).integers(0, 64, (2, 9))


def make(lora, fused=True, **changes):
    model = CausalLM(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
    if fused:
        qjax.fuse_projections(model)
    qjax.quantize_model(model, qjax.QuantConfig(compute_dtype=jnp.float32))
    if lora is not None:
        qjax.add_lora(model, lora, rngs=nnx.Rngs(1))
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
            leaf.set_value(0.3 * jax.random.normal(jax.random.key(len(path)), leaf.shape))
    return model


@pytest.fixture
def calls(monkeypatch):
    """What the layers ask of `adapted_matmul`, on a GPU that is not there."""
    seen = []

    def spy(*args, **options):
        seen.append((args, options))
        return adapted_matmul(*args, **options)

    adapted_matmul = step_linear.adapted_matmul
    gpu = dispatch.Target("gpu", "NVIDIA H100", (9, 0))
    for module in ("qjax.generate", "qjax.models.step_linear"):
        monkeypatch.setattr(f"{module}.target", lambda: gpu)
    for module in (step_linear, cache):
        monkeypatch.setattr(module, "has_kernel", lambda *args, **options: True)
    monkeypatch.setattr(step_linear, "adapted_matmul", spy)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    return seen


LORA = qjax.LoraConfig(rank=4, alpha=6, rslora=True, dropout=0.5)


@pytest.mark.parametrize(
    "lora, changes, adapted",
    [
        pytest.param(LORA, {"scan_layers": True}, 4, marks=pytest.mark.slow),
        pytest.param(LORA, {}, 8, marks=pytest.mark.slow),
        (None, {"norm": "rms_offset", "hidden_act": "gelu"}, 8),
        pytest.param(dataclasses.replace(LORA, dora=True), {}, 0, marks=pytest.mark.slow),
        pytest.param(LORA, {"block": "parallel"}, 4, marks=pytest.mark.slow),
        pytest.param(LORA, {"fused": False}, 14, marks=pytest.mark.slow),
        pytest.param(None, {"qk_norm": True, "qkv_bias": True}, 6, marks=pytest.mark.slow),
    ],
    ids=["scan", "loop", "base", "dora", "parallel", "single", "qk_norm"],
)
def test_tokens_stay_the_same(lora, changes, adapted, request):
    model = make(lora, **changes)
    plain = np.asarray(model.generate(IDS, max_new_tokens=8))
    calls = request.getfixturevalue("calls")
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=8), plain)
    assert len(calls) == adapted  # of the layers of two blocks, traced once under scan
    if changes.get("scan_layers"):
        (_, packed, *_), options = calls[0]
        assert packed.shape[0] == 2  # the stack, which nobody has sliced
        assert options["sections"] == (64, 32, 32)
        assert options["layer"] is not None


def test_a_slice_of_an_array_is_an_array():
    stack = jnp.arange(24.0).reshape(2, 3, 4)
    slice_ = ArraySlice(stack, jnp.int32(1))
    assert (slice_.shape, slice_.dtype) == ((3, 4), stack.dtype)
    np.testing.assert_array_equal(slice_[...], stack[1])
    np.testing.assert_array_equal(slice_[2, ::2], stack[1, 2, ::2])
