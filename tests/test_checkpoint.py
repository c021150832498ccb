"""What is saved comes back bit for bit: whole, adapters alone, on other layouts, asynchronously."""

import concurrent.futures
import dataclasses
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp_v0
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import qjax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Box:
    """A user's own pytree around a QTensor."""

    q: qjax.QTensor
    lora_a: jax.Array | None
    scaling: float = dataclasses.field(default=2.0, metadata={"static": True})


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def quantized(*shape: int, axes=(0,), batch_ndim=0, **fields) -> qjax.QTensor:
    return qjax.quantize(normal(*shape), qjax.QuantConfig(**fields), axes, batch_ndim=batch_ndim)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    special = np.array([np.nan, np.inf, -0.0, 1e-45, -1e-40], np.float32)
    return {
        "rows": {"kernel": quantized(128, 8), "bias": normal(8).astype(jnp.bfloat16)},
        "stacked": {"kernel": quantized(3, 64, 8, batch_ndim=1, double_quant=False)},
        "heads": {"kernel": quantized(4, 32, 8, axes=(0, 1), format="fp4", block_size=32)},
        "flat": {"kernel": quantized(33, 5, double_quant=False)},
        "box": Box(quantized(64, 8), normal(64, 2)),
        "adapter": {"lora_a": normal(8, 2), "lora_b": jnp.zeros((2, 4))},
        "special": jnp.asarray(special),
    }


def assert_same(left, right):
    """The same structure, static fields, dtypes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(one) is type(other)
        if isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert one.dtype == other.dtype
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def assert_plain_orbax_restores(tree, folder):
    """Orbax alone, of both of its versions, saves the tree and restores it."""
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree
    )
    ocp.save(folder / "v1", tree)
    assert_same(ocp.load(folder / "v1", abstract), tree)
    with ocp_v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "v0", tree)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(folder / "v0", abstract), tree)


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


# --- whole trees


def test_round_trip_without_like(params, tmp_path):
    qjax.save(tmp_path / "x", params)
    loaded = qjax.load(tmp_path / "x")
    box = params["box"]
    assert_same(loaded, params | {"box": {"q": box.q, "lora_a": box.lora_a}})
    assert not loaded["special"].committed


@pytest.mark.parametrize(
    "wrap",
    [lambda p: p, flax.core.freeze, lambda p: [p, (p["rows"], None)]],
    ids=["dict", "frozen", "list"],
)
def test_round_trip_with_like(params, wrap, tmp_path):
    tree = wrap(params)
    qjax.save(tmp_path / "x", tree)
    assert_same(qjax.load(tmp_path / "x", like=zeros_like(tree)), tree)
    abstract = jax.eval_shape(lambda: tree)
    assert_same(qjax.load(tmp_path / "x", like=abstract), tree)


def test_numbers_and_keys(tmp_path):
    tree = {
        "step": 3,
        "rate": 0.1,
        "flag": True,
        "numpy": np.arange(3, dtype=np.int64),
        "scalar": np.float64(0.1),
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(2, impl="rbg"), 3),
    }
    qjax.save(tmp_path / "x", tree)
    like = tree | {"step": 0, "rate": 0.0, "flag": False, "numpy": np.zeros(3, np.int64)}
    assert_same(qjax.load(tmp_path / "x", like), tree)
    loaded = qjax.load(tmp_path / "x")
    assert (loaded["step"], loaded["rate"], loaded["flag"]) == (3, 0.1, True)
    assert_same(loaded["keys"], tree["keys"])


def test_a_single_qtensor(tmp_path):
    q = quantized(64, 4)
    qjax.save(tmp_path / "x", q)
    assert_same(qjax.load(tmp_path / "x"), q)
    assert_same(qjax.load(tmp_path / "x", like=zeros_like(q)), q)


def test_train_state(params, tmp_path):
    tx = qjax.lora_optimizer(optax.adam(1e-3))
    state = TrainState.create(apply_fn=None, params=params, tx=tx).replace(step=7)
    qjax.save(tmp_path / "x", state)
    like = TrainState.create(apply_fn=None, params=zeros_like(params), tx=tx)
    assert_same(qjax.load(tmp_path / "x", like), state)


def test_like_is_not_changed(params, tmp_path):
    qjax.save(tmp_path / "x", params)
    like = zeros_like(params)
    qjax.load(tmp_path / "x", like)
    assert_same(like, zeros_like(params))


def test_parents_are_made_and_relative_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qjax.save("some/where/x", {"w": jnp.ones(2)})
    assert_same(qjax.load("some/where/x"), {"w": jnp.ones(2)})


# --- adapters alone


def test_adapters_alone(params, tmp_path):
    qjax.save(tmp_path / "x", params, only="adapters")
    loaded = qjax.load(tmp_path / "x")
    assert_same(loaded, {"adapter": params["adapter"], "box": {"lora_a": params["box"].lora_a}})


def test_moments_of_adapters_are_no_adapters(params, tmp_path):
    trainable, _ = qjax.partition(params)
    moments = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(trainable)
    qjax.save(tmp_path / "x", {"params": params, "opt_state": moments}, only="adapters")
    loaded = qjax.load(tmp_path / "x")["params"]
    assert_same(loaded, {"adapter": params["adapter"], "box": {"lora_a": params["box"].lora_a}})
    with pytest.raises(ValueError, match="has no adapters, so none can be saved"):
        qjax.save(tmp_path / "y", moments, only="adapters")


def test_adapters_load_into_a_tree_that_has_the_base(params, tmp_path):
    qjax.save(tmp_path / "x", params, only="adapters")
    trainable, frozen = qjax.partition(params)
    like = qjax.combine(zeros_like(trainable), frozen)
    loaded = qjax.load(tmp_path / "x", like)
    assert_same(loaded, params)
    # The base is shared and not copied.
    assert loaded["rows"]["kernel"].packed is params["rows"]["kernel"].packed


def test_adapters_load_into_the_trainable_half(params, tmp_path):
    trainable, _ = qjax.partition(params)
    qjax.save(tmp_path / "x", params, only="adapters")
    qjax.save(tmp_path / "y", trainable)
    for name in ("x", "y"):
        assert_same(qjax.load(tmp_path / name, zeros_like(trainable)), trainable)


# --- asynchronous


def test_async_save_lets_arrays_change_at_once(tmp_path):
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    donated, written = jnp.zeros((512, 512)), np.zeros((512, 512), np.float32)
    pending = qjax.save_async(tmp_path / "x", {"donated": donated, "written": written})
    step(step(donated)).block_until_ready()
    written[:] = 1
    assert isinstance(pending, concurrent.futures.Future)
    assert pending.result(timeout=60) is None
    loaded = qjax.load(tmp_path / "x")
    assert not any(array.any() for array in loaded.values())


def test_several_async_saves_at_once(params, tmp_path):
    pending = [qjax.save_async(tmp_path / str(i), {"w": jnp.full(4, i)}) for i in range(4)]
    for i, one in enumerate(pending):
        one.result(timeout=60)
        assert_same(qjax.load(tmp_path / str(i)), {"w": jnp.full(4, i)})


# --- device layouts


@pytest.fixture
def mesh():
    assert len(jax.devices()) == 8
    return jax.make_mesh((8,), ("d",))


def place(q: qjax.QTensor, mesh, spec) -> qjax.QTensor:
    """Shard the codes and the first-level scales, replicate the rest."""
    shard = NamedSharding(mesh, spec)

    def put(leaf):
        fits = leaf.ndim == q.packed.ndim and all(
            axis is None or size % 8 == 0 for axis, size in zip(spec, leaf.shape, strict=True)
        )
        return jax.device_put(leaf, shard if fits else NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, q)


def test_one_device_to_eight_and_back(mesh, tmp_path):
    q = quantized(512, 16)
    single, key = {"q": q, "key": jax.random.key(0)}, jax.random.key(0)
    sharded = {
        "q": place(q, mesh, PartitionSpec("d", None)),
        "key": jax.device_put(key, NamedSharding(mesh, PartitionSpec())),
    }
    other = {"q": place(q, mesh, PartitionSpec(None, "d")), "key": sharded["key"]}
    assert len(sharded["q"].packed.addressable_shards) == 8
    for i, (saved, like) in enumerate(
        [(single, sharded), (sharded, other), (sharded, single), (other, jax.eval_shape(lambda: q))]
    ):
        like = {"q": like, "key": key} if isinstance(like, qjax.QTensor) else like
        qjax.save(tmp_path / str(i), saved)
        loaded = qjax.load(tmp_path / str(i), like=like)
        assert_same(loaded, single)
        for got, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(like), strict=True):
            if isinstance(expected, jax.Array):
                assert got.sharding == expected.sharding
                assert got.committed == expected.committed


def test_a_sharding_given_by_an_abstract_tree(mesh, tmp_path):
    qjax.save(tmp_path / "x", {"w": jnp.arange(16.0)})
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    like = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}
    assert qjax.load(tmp_path / "x", like)["w"].sharding == sharding
    qjax.save(tmp_path / "y", {"layer": {"w": jnp.arange(12.0)}})
    like = {"layer": {"w": jax.ShapeDtypeStruct((12,), jnp.float32, sharding=sharding)}}
    with pytest.raises(ValueError, match=r"layer/w: .*divide"):
        qjax.load(tmp_path / "y", like)


# --- an existing path


def test_an_existing_path_is_refused(tmp_path):
    qjax.save(tmp_path / "x", {"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"x exists; overwrite=True replaces"):
        qjax.save(tmp_path / "x", {"w": jnp.ones(2)})
    assert_same(qjax.load(tmp_path / "x"), {"w": jnp.zeros(2)})


def test_overwrite_replaces_a_checkpoint(tmp_path):
    qjax.save(tmp_path / "x", {"w": jnp.zeros(2)}, overwrite=True)
    qjax.save(tmp_path / "x", {"v": jnp.ones(3)}, overwrite=True)
    assert_same(qjax.load(tmp_path / "x"), {"v": jnp.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_overwrite_replaces_nothing_but_a_checkpoint(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/draft.txt").write_text("four years")
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match=f"{name} is no checkpoint"):
            qjax.save(tmp_path / name, {"w": jnp.zeros(2)}, overwrite=True)
    assert (tmp_path / "thesis/draft.txt").read_text() == "four years"


# --- plain Orbax


def plain(params) -> dict[str, Any]:
    """The arrays of `params` as nested dicts, written out by hand."""

    def q(q):
        if not q.double_quant:
            return {"packed": q.packed, "scales": q.scales}
        scales = {name: getattr(q.scales, name) for name in ("codes", "absmax", "offset")}
        return {"packed": q.packed, "scales": scales}

    layers = ("rows", "stacked", "heads", "flat")
    kernels = {name: params[name] | {"kernel": q(params[name]["kernel"])} for name in layers}
    box = {"q": q(params["box"].q), "lora_a": params["box"].lora_a}
    return params | kernels | {"box": box}


def test_plain_orbax_reads_a_checkpoint(params, tmp_path):
    qjax.save(tmp_path / "x", params)
    like = jax.tree.map(np.asarray, plain(params))
    assert_same(ocp.load(tmp_path / "x", like), like)
    with ocp_v0.StandardCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "x/state", plain(params)), plain(params))


def test_plain_orbax_saves_and_restores_the_trees(params, tmp_path):
    assert_plain_orbax_restores(params, tmp_path)
