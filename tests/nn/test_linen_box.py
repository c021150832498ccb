"""The 4-bit leaf of Linen trees: content, axes, names, serialization."""

import dataclasses

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from jax.sharding import PartitionSpec as P

import qjax
from qjax.linen import QuantBox
from qjax.nn.linen_box import box_kernel, with_adapter

CFG = qjax.QuantConfig(block_size=32)
PATH = "mlp/up/kernel"


@pytest.fixture
def w(rng):
    return jnp.asarray(rng.normal(size=(64, 8)).astype(np.float32))


@pytest.fixture
def box(w):
    return box_kernel(w, CFG, (0,), 0, PATH)


@pytest.fixture
def adapted(box, rng):
    box = with_adapter(box, qjax.LoraConfig(rank=4, alpha=6), jax.random.key(0), PATH)
    b = jnp.asarray(rng.normal(size=(4, 8)).astype(np.float32))
    return dataclasses.replace(box, lora_b=b)


def paths(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def test_paths_of_the_leaves(adapted):
    assert paths({"kernel": adapted}) == [
        "kernel/q/packed",
        "kernel/q/scales/codes",
        "kernel/q/scales/absmax",
        "kernel/q/scales/offset",
        "kernel/lora_a",
        "kernel/lora_b",
    ]


def test_content_is_the_decoded_weight(box, w):
    np.testing.assert_array_equal(box.unbox(), qjax.quantize(w, CFG).dequantize())


def test_content_with_adapter(adapted):
    a, b = (np.asarray(x, np.float64) for x in adapted.adapter)
    expected = np.asarray(adapted.q.dequantize(), np.float64) + 6 / 4 * a @ b
    # One float32 product of 4 terms of size 1 / 8 and one sum: a few ulps of 2.
    np.testing.assert_allclose(adapted.unbox(), expected, atol=1e-6)


def test_only_the_adapter_has_a_gradient(adapted):
    grad = jax.grad(lambda box: (box.unbox() ** 2).sum(), allow_int=True)(adapted)
    assert jnp.any(grad.lora_a != 0) and jnp.any(grad.lora_b != 0)
    assert not jnp.any(grad.q.scales.absmax) and not jnp.any(grad.q.scales.offset)


def test_dropout_needs_qjax_apply(adapted):
    box = dataclasses.replace(adapted, dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout=0\.1 .*qjax\.apply"):
        box.unbox()
    with pytest.raises(ValueError, match=r"qjax\.apply"):
        nn.Dense(8).apply({"params": {"kernel": box, "bias": jnp.zeros(8)}}, jnp.ones((1, 64)))


def test_flax_checks_the_shape_of_the_content(box):
    with pytest.raises(errors.ScopeParamShapeError):
        nn.Dense(9, use_bias=False).apply({"params": {"kernel": box}}, jnp.ones((1, 64)))


def test_replacing_the_content_quantizes_it(adapted, w):
    new = nn.meta.replace_boxed({"k": adapted}, {"k": 2 * w})["k"]
    np.testing.assert_array_equal(new.unbox(), qjax.quantize(2 * w, CFG).dequantize())
    assert new.lora_a is adapted.lora_a
    other = qjax.quantize(w)
    assert adapted.replace_boxed(other).q is other


def test_a_second_adapter_is_refused(adapted):
    with pytest.raises(ValueError, match=f"{PATH} has an adapter already"):
        with_adapter(adapted, qjax.LoraConfig(), jax.random.key(0), PATH)


def test_names_follow_the_axes(w):
    partitioned = nn.Partitioned(jnp.stack([w, w]), ("layers", "embed", "mlp"))
    stacked = box_kernel(partitioned, CFG, (0,), 1, PATH)
    assert stacked.names == ("layers", "embed", "mlp")
    params = {nn.PARTITION_NAME: "layers"}
    inner = stacked.remove_axis(0, params)
    assert inner.names == ("embed", "mlp")
    assert inner.add_axis(0, params).names == stacked.names
    with pytest.raises(ValueError, match=r"'layers' in the kernel's .* 'stages'"):
        stacked.remove_axis(0, {nn.PARTITION_NAME: "stages"})
    with pytest.raises(errors.PartitioningUnspecifiedError):
        stacked.remove_axis(0, {})


def test_a_box_is_scanned_along_the_axis_of_its_stack(box):
    with pytest.raises(NotImplementedError, match="along axis 0, got axis 1"):
        box.add_axis(1, {})
    with pytest.raises(ValueError, match="was stacked along axis 0, and is scanned along 1"):
        box.remove_axis(1, {})


def test_partition_specs_follow_the_layout(rng):
    """[layers, heads, dim, embed] contracts heads and dim: codes are [layers, embed, K]."""
    w = jnp.asarray(rng.normal(size=(2, 4, 16, 8)).astype(np.float32))
    box = box_kernel(nn.Partitioned(w, ("pipe", "tp", None, "fsdp")), CFG, (0, 1), 1, PATH)
    box = with_adapter(box, qjax.LoraConfig(rank=4), jax.random.key(0), PATH)
    specs = nn.get_partition_spec({"kernel": box, "bias": jnp.zeros(8)})
    assert jax.tree.structure(specs["kernel"]) == jax.tree.structure(box)
    spec = specs["kernel"]
    assert spec.q.packed == spec.q.scales.codes == P("pipe", "fsdp", "tp")
    assert spec.q.scales.absmax == P("pipe", None) and spec.q.scales.offset == P("pipe")
    assert spec.lora_a == P("pipe", "tp", None, None)
    assert spec.lora_b == P("pipe", None, "fsdp")
    for leaf, leaf_spec in zip(jax.tree.leaves(box), jax.tree.leaves(spec), strict=True):
        assert len(leaf_spec) == leaf.ndim


def test_flat_layout_splits_batch_axes_only(rng):
    w = jnp.asarray(rng.normal(size=(2, 33, 8)).astype(np.float32))
    box = box_kernel(nn.Partitioned(w, ("pipe", "fsdp", "tp")), CFG, (0,), 1, PATH)
    assert box.q.layout == "flat"
    assert nn.get_partition_spec(box).q.packed == P("pipe", None)


def test_arrays_can_be_placed_on_a_mesh(adapted):
    box = dataclasses.replace(adapted, names=(None, "model"))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("model",))
    shardings = nn.get_sharding({"kernel": box}, mesh)
    placed = jax.device_put({"kernel": box}, shardings)["kernel"]
    assert placed.q.packed.sharding.shard_shape(placed.q.packed.shape) == (2, 32)
    assert placed.lora_b.sharding.shard_shape(placed.lora_b.shape) == (4, 2)
    assert placed.q.scales.absmax.sharding.is_fully_replicated


def test_flax_serialization(adapted):
    tree = {"up": {"kernel": adapted, "bias": jnp.ones(8)}}
    data = flax.serialization.to_bytes(tree)
    back = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, tree), data)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(new, old)
        assert new.dtype == old.dtype
    raw = flax.serialization.msgpack_restore(data)  # readable without qjax
    assert sorted(raw["up"]["kernel"]["q"]["scales"]) == ["absmax", "codes", "offset"]


def test_serialized_kernels_have_to_fit(adapted, box):
    state = flax.serialization.to_state_dict({"up": adapted})
    with pytest.raises(ValueError, match=r"up: .*does not know \['lora_a', 'lora_b'\]"):
        flax.serialization.from_state_dict({"up": box}, state)
    state["up"]["lora_a"] = np.zeros((64, 5), np.float32)
    with pytest.raises(ValueError, match=r"up/lora_a must be float32\[64, 4\], got float32\[64, 5"):
        flax.serialization.from_state_dict({"up": adapted}, state)


def test_a_box_is_a_leaf_for_flax(box):
    assert isinstance(box, QuantBox) and nn.meta.is_axis_metadata(box)
    np.testing.assert_array_equal(nn.meta.unbox({"k": box})["k"], box.q.dequantize())
