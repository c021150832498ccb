"""Where arrays go on a mesh: from annotations, in checkpoints, in Flax's own functions."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import meta
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from tests.test_mesh_training import CFG, HIDDEN, IN, LORA, LinenMLP, make_model, model_on, train


def mesh_of(*shape, names=("d", "t")):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def on(tree, shardings) -> bool:
    """Whether each array is on the sharding in its place."""
    same = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), tree, shardings)
    return all(jax.tree.leaves(same))


def linen_params(spec=("d", "t")):
    params = LinenMLP(spec).init(jax.random.key(0), jnp.ones((1, IN)))["params"]
    params = qjax.quantize_params(params, CFG)
    return qjax.add_lora_params(params, LORA, jax.random.key(1))


def test_linen_boxes_have_a_spec_for_each_array():
    params, mesh = linen_params(), mesh_of(2, 4)
    placed = jax.device_put(params, qjax.shardings(params, mesh))
    kernel = placed["Dense_0"]["kernel"]
    specs = [kernel.q.packed, kernel.q.scales.codes, kernel.q.scales.absmax, *kernel.adapter]
    expected = [P("t", "d"), P("t", "d"), P(None), P("d", None), P(None, "t")]
    assert [a.sharding.spec for a in specs] == expected
    assert on(placed, nn.get_sharding(params, mesh))
    # Adapters that come later, and the optimizer's state, go with the weight.
    moments = optax.adam(1e-3).init(qjax.partition(placed)[0])[0]
    assert on(moments.mu, qjax.shardings(moments.mu, mesh))
    fresh = qjax.quantize_params(qjax.dequantize_model(bare(placed)), CFG)
    assert on(fresh, qjax.shardings(fresh, mesh))
    again = qjax.add_lora_params(fresh, LORA, jax.random.key(1))
    assert on(again, qjax.shardings(again, mesh))


def bare(params):
    def drop(leaf):
        return dataclasses.replace(leaf, lora_a=None, lora_b=None)

    is_box = meta.is_axis_metadata
    return jax.tree.map(lambda x: drop(x) if is_box(x) else x, params, is_leaf=is_box)


def test_a_decoded_linen_kernel_is_constrained_as_the_float_one():
    kernel = linen_params()["Dense_0"]["kernel"]
    with jax.set_mesh(mesh_of(2, 4)):
        assert jax.jit(meta.unbox)(kernel).sharding.spec == P("d", "t")


def test_logical_names_and_their_rules():
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    layer = nn.Dense(HIDDEN, kernel_init=init, use_bias=False)
    params = layer.init(jax.random.key(0), jnp.ones((1, IN)))["params"]
    params, mesh = qjax.quantize_params(params, CFG), mesh_of(2, 4)
    with nn.logical_axis_rules((("embed", None), ("mlp", "t"))):
        placed = jax.device_put(params, qjax.shardings(params, mesh))
        with jax.set_mesh(mesh):
            y = jax.jit(layer.apply)({"params": placed}, jnp.ones((4, IN)))
    assert placed["kernel"].q.packed.sharding.spec == P("t", None)
    assert y.sharding.spec == P(None, "t")
    merged = qjax.dequantize_model(params)["kernel"]
    assert isinstance(merged, nn.LogicallyPartitioned) and merged.names == ("embed", "mlp")


def test_errors_name_the_parameter():
    params = linen_params(("t", "d"))
    with pytest.raises(ValueError, match=r"Dense_1/kernel: axis 0 .* 'd' \(32 devices\), which"):
        qjax.shardings(params, jax.sharding.AbstractMesh((32, 1), ("d", "t")))
    with pytest.raises(ValueError, match=r"Dense_0/kernel: axis 1 \(of 512\) .*does not divide it"):
        qjax.shardings(params, jax.sharding.AbstractMesh((3, 1), ("d", "t")))
    with pytest.raises(ValueError, match=r"mesh=None needs a mesh that jax.set_mesh has set"):
        qjax.shardings(params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_flax_functions_on_nnx_models(axis_type):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(axis_type,) * 2)
    model = model_on(mesh, ("d", "t"))
    state = nnx.state(model)
    expected = qjax.shardings(model, mesh)
    assert on(state, expected)
    assert on(state, nnx.get_named_sharding(state, mesh))
    with jax.set_mesh(mesh):
        abstract = nnx.eval_shape(lambda: make_model(("d", "t")))
    specs = jax.tree.map(lambda a: a.sharding.spec, nnx.state(abstract))
    assert [padded(s) for s in jax.tree.leaves(specs)] == [
        padded(s.spec) for s in jax.tree.leaves(expected)
    ]
    merged = qjax.merge_lora(model, jnp.float32)  # outside of the mesh's context
    assert merged.up.kernel[...].sharding.spec == P("d", "t")
    assert merged.up.kernel.get_metadata()["out_sharding"] == ("d", "t")


def padded(spec):
    return (*spec, *[None] * (2 - len(spec)))


def test_a_model_made_under_jit_is_placed_by_its_annotations():
    mesh = mesh_of(2, 4)

    with jax.set_mesh(mesh):
        state = nnx.state(nnx.jit(lambda: make_model(("d", "t")))())
    assert on(state, qjax.shardings(state, mesh))


@pytest.mark.slow
def test_saved_on_one_mesh_and_restored_on_others(tmp_path):
    eight = mesh_of(2, 4)
    model = model_on(eight, ("d", "t"))
    _, _, optimizer = train(model, eight, P("d"), steps=2)
    qjax.save(tmp_path / "eight", {"model": model, "optimizer": optimizer})

    two = jax.sharding.Mesh(
        np.array(jax.devices()[:2]).reshape(1, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2
    )
    source = tmp_path / "eight"
    for mesh in (two, eight):
        like = {"model": model_on(mesh, ("d", "t"))}
        like["optimizer"] = nnx.Optimizer(like["model"], optax.adam(1e-2), wrt=nnx.LoRAParam)
        loaded = qjax.load(source, like=like)
        for name, original in (("model", model), ("optimizer", optimizer)):
            jax.tree.map(
                np.testing.assert_array_equal, nnx.state(loaded[name]), nnx.state(original)
            )
            state = nnx.state(loaded[name])
            assert on(state, jax.tree.map(lambda a: a.sharding, nnx.state(like[name])))
        assert loaded["model"].up.kernel.q.packed.sharding == NamedSharding(mesh, P("t", "d"))
        source = tmp_path / f"from {len(mesh.devices.flat)}"
        qjax.save(source, loaded)
