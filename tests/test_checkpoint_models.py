"""Checkpoints of NNX models and of Linen parameters, with the real layers."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

import qjax
from qjax.linen import QuantBox
from tests.test_checkpoint import assert_plain_orbax_restores, assert_same, zeros_like
from tests.test_checkpoint_errors import edit

WIDTH = 64


# --- NNX


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.dropout(jnp.tanh(self.up(self.norm(x)))))


class Model(nnx.Module):
    """A shared block, a stack of blocks made by vmap, and a list."""

    def __init__(self, rngs: nnx.Rngs):
        self.shared = Block(rngs)
        self.blocks = nnx.List([self.shared, Block(rngs)])
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))
        self.stack = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        graphdef, state = nnx.split(self.stack)
        for i in range(3):
            x = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))(x)
        return self.shared(x)


def make_model(seed: int = 0, alpha: float = 8, lora: bool = True) -> Model:
    model = qjax.quantize_model(Model(nnx.Rngs(seed)))
    if lora:
        config = qjax.LoraConfig(rank=2, alpha=alpha, dropout=0.1, include="up|stack")
        model = qjax.add_lora(model, config, rngs=nnx.Rngs(seed + 100))
        for path, leaf in nnx.iter_graph(model):
            if path and path[-1] == "lora_b":
                leaf[...] = jnp.full_like(leaf[...], 0.01)
    return model


def state_of(model) -> dict:
    return nnx.to_pure_dict(nnx.state(model))


def output(model) -> np.ndarray:
    model = nnx.clone(model)
    model.eval()
    return np.asarray(model(jnp.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def model_path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("nnx") / "model"
    qjax.save(path, model)
    return path


@pytest.mark.parametrize(
    "like", [lambda: nnx.eval_shape(make_model), lambda: make_model(1)], ids=["abstract", "other"]
)
def test_nnx_model(model, model_path, like):
    like = like()
    before = state_of(like)
    loaded = qjax.load(model_path, like)
    assert type(loaded) is Model
    assert loaded.blocks[0] is loaded.shared
    assert_same(state_of(loaded), state_of(model))
    np.testing.assert_array_equal(output(loaded), output(model))
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, state_of(like), before))


def test_nnx_state(model, model_path, tmp_path):
    state = nnx.state(model)
    assert_same(qjax.load(model_path, like=state), state)
    qjax.save(tmp_path / "state", state)
    assert_same(state_of(qjax.load(tmp_path / "state", like=make_model(1))), state_of(model))


def test_nnx_without_like(model, model_path):
    loaded = nnx.restore_int_paths(qjax.load(model_path))
    assert_same(loaded, state_of(model))


def test_nnx_adapters_alone(model, tmp_path):
    qjax.save(tmp_path / "x", model, only="adapters")
    leaves = jax.tree.leaves_with_path(qjax.load(tmp_path / "x"))
    names = sorted(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    layers = ("blocks/0/up", "blocks/1/up", "stack")
    assert names == [f"{layer}/lora_{part}" for layer in layers for part in "ab"]
    trained = nnx.clone(model)
    like = jax.tree.map(jnp.zeros_like, nnx.state(trained, nnx.LoRAParam))
    nnx.update(trained, like)
    base = trained.shared.up.kernel.q.packed
    loaded = qjax.load(tmp_path / "x", trained)
    assert_same(state_of(loaded), state_of(model))
    assert loaded.shared.up.kernel.q.packed is base
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
    qjax.save(tmp_path / "z", {"model": model, "optimizer": optimizer}, only="adapters")
    assert_same(qjax.load(tmp_path / "z"), {"model": qjax.load(tmp_path / "x")})
    # An adapter's own state is enough, and what is a LoRAParam counts, whatever its name.
    assert_same(qjax.load(tmp_path / "x", like), nnx.state(model, nnx.LoRAParam))
    named = nnx.Dict(vector=nnx.LoRAParam(jnp.ones(2)), base=nnx.Param(jnp.zeros(2)))
    qjax.save(tmp_path / "y", named, only="adapters")
    assert_same(qjax.load(tmp_path / "y"), {"vector": jnp.ones(2)})


def test_nnx_training_goes_on_where_it_was(tmp_path):
    def build(seed):
        layer = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(seed)))
        model = qjax.add_lora(
            qjax.quantize_model(layer), qjax.LoraConfig(rank=2), rngs=nnx.Rngs(seed)
        )
        return {
            "model": model,
            "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam),
        }

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(jnp.eye(WIDTH)) - 1) ** 2)

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    run = build(0)
    for _ in range(3):
        step(**run)
    qjax.save(tmp_path / "x", run)
    again = qjax.load(tmp_path / "x", build(1))
    for one in (run, again):
        step(**one)
        step(**one)
    assert_same(state_of(again["model"]), state_of(run["model"]))
    assert int(again["optimizer"].step[...]) == 5


def test_a_model_among_other_things(tmp_path):
    def make(seed):
        layer = qjax.quantize_model(nnx.Sequential(nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(seed))))
        q = qjax.quantize(jax.random.normal(jax.random.key(seed), (WIDTH, 2)))
        return {"a": [layer, {"q": q, "same": layer}], "step": seed, "none": None}

    run = make(3)
    qjax.save(tmp_path / "x", run)
    loaded = qjax.load(tmp_path / "x", make(0))
    assert loaded["step"] == 3
    assert_same(loaded["a"][1]["q"], run["a"][1]["q"])
    assert_same(state_of(loaded["a"][0]), state_of(run["a"][0]))
    assert loaded["a"][1]["same"] is loaded["a"][0]


def test_nnx_in_tree_mode(tmp_path):
    def build(seed):
        return qjax.quantize_model(nnx.Sequential(nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(seed))))

    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        qjax.save(tmp_path / "x", build(0))
        loaded = qjax.load(tmp_path / "x", build(1))
        assert_same(state_of(loaded), state_of(build(0)))


def test_another_scaling_is_refused(model_path, model, tmp_path):
    message = r"up: expected scaling=8.0, found 4.0"
    with pytest.raises(ValueError, match=message):
        qjax.load(model_path, make_model(0, alpha=16))
    qjax.save(tmp_path / "x", model, only="adapters")
    with pytest.raises(ValueError, match=message):
        qjax.load(tmp_path / "x", make_model(0, alpha=16))


def test_another_nnx_model_is_refused(model, model_path, tmp_path):
    with pytest.raises(ValueError, match=r"not in `like`: .*lora_a.*\. Add adapters to `like` f"):
        qjax.load(model_path, make_model(lora=False))
    qjax.save(tmp_path / "x", model, only="adapters")
    with pytest.raises(ValueError, match=r"`like` has none: add them first, with qjax.add_lora"):
        qjax.load(tmp_path / "x", make_model(lora=False))
    with pytest.raises(ValueError, match=r"like` must hold the rest, and blocks/0/.* is abstract"):
        qjax.load(tmp_path / "x", nnx.eval_shape(make_model))
    with pytest.raises(ValueError, match=r"5 in `like` and .*: .*kernel.*\. Quantize `like` first"):
        qjax.load(model_path, Model(nnx.Rngs(0)))
    qjax.save(tmp_path / "float", Model(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"It holds no quantized weight: load it into a float mod"):
        qjax.load(tmp_path / "float", make_model(lora=False))


def test_nnx_onto_a_mesh_and_back(model, model_path, tmp_path):
    mesh = jax.make_mesh((8,), ("d",))

    def put(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        spec = PartitionSpec("d") if leaf.ndim and leaf.shape[0] % 8 == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    graphdef, state = nnx.split(model)
    sharded = nnx.merge(graphdef, jax.tree.map(put, state))
    loaded = qjax.load(model_path, like=sharded)
    assert_same(state_of(loaded), state_of(model))
    kernel = loaded.shared.up.kernel.q
    assert kernel.packed.sharding == NamedSharding(mesh, PartitionSpec("d"))
    qjax.save(tmp_path / "x", loaded)
    assert_same(state_of(qjax.load(tmp_path / "x", like=model)), state_of(model))


def test_an_abstract_model_on_a_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def make():
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "d"))
        return nnx.Linear(WIDTH, WIDTH, kernel_init=init, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh):
        qjax.save(tmp_path / "x", make())
        abstract = nnx.eval_shape(make)
        loaded = qjax.load(tmp_path / "x", abstract)
        assert loaded.kernel[...].sharding == NamedSharding(mesh, PartitionSpec(None, "d"))
    with pytest.raises(ValueError, match=r"bias is on an abstract mesh: load inside jax.set_mesh"):
        qjax.load(tmp_path / "x", abstract)


# --- Linen


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        bias_init = nn.with_partitioning(nn.initializers.zeros_init(), ("out",))
        dense = functools.partial(nn.Dense, kernel_init=kernel_init, bias_init=bias_init)
        return x + dense(WIDTH)(jnp.tanh(dense(2 * WIDTH)(x))), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={meta.PARTITION_NAME: "layer"},
        )
        x, _ = scan()(x, None)
        return nn.Dense(WIDTH)(x)


X = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)


def make_params(seed: int = 0, alpha: float = 8) -> dict:
    params = LinenModel().init(jax.random.key(seed), X)["params"]
    qparams = qjax.quantize_params(params, qjax.QuantConfig(compute_dtype=jnp.float32))
    config = qjax.LoraConfig(rank=2, alpha=alpha, include="Scan")
    trainable, frozen = qjax.partition(
        qjax.add_lora_params(qparams, config, jax.random.key(seed + 1))
    )
    return qjax.combine(jax.tree.map(lambda a: a + 0.01, trainable), frozen)


@pytest.fixture(scope="module")
def params():
    return make_params()


def boxes_of(tree) -> list:
    is_box = lambda node: isinstance(node, QuantBox)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_box) if is_box(node)]


def test_linen_with_like(params, tmp_path):
    qjax.save(tmp_path / "x", params)
    assert_same(qjax.load(tmp_path / "x", like=zeros_like(params)), params)
    assert_same(qjax.load(tmp_path / "x", like=jax.eval_shape(make_params)), params)


def test_linen_without_like_gives_parameters_to_apply(params, tmp_path):
    qjax.save(tmp_path / "x", params)
    loaded = qjax.load(tmp_path / "x")
    assert len(boxes_of(loaded)) == len(boxes_of(params)) == 3
    for one, other in zip(boxes_of(loaded), boxes_of(params), strict=True):
        for field in ("scaling", "dropout", "names", "compute_dtype"):
            assert getattr(one, field) == getattr(other, field)
        assert_same(one, other)
    assert boxes_of(loaded)[1].names == ("layer", "in", "out")
    for apply in (qjax.apply, LinenModel.apply):
        got, expected = (apply(LinenModel(), {"params": p}, X) for p in (loaded, params))
        np.testing.assert_array_equal(got, expected)


def test_linen_adapters_alone(params, tmp_path):
    qjax.save(tmp_path / "x", params, only="adapters")
    trainable, frozen = qjax.partition(params)
    like = qjax.combine(zeros_like(trainable), frozen)
    assert_same(qjax.load(tmp_path / "x", like), params)
    assert_same(qjax.load(tmp_path / "x", zeros_like(trainable)), trainable)
    assert len(jax.tree.leaves(qjax.load(tmp_path / "x"))) == 4
    with pytest.raises(ValueError, match=r"Dense_0/kernel: expected scaling=8.0, found 4.0"):
        qjax.load(tmp_path / "x", make_params(0, alpha=16))


def test_dropout_is_that_of_like_or_of_the_checkpoint(params, tmp_path):
    def with_dropout(rate):
        is_box = lambda node: isinstance(node, QuantBox)  # noqa: E731
        change = lambda n: dataclasses.replace(n, dropout=rate) if is_box(n) else n  # noqa: E731
        return jax.tree.map(change, params, is_leaf=is_box)

    qjax.save(tmp_path / "x", with_dropout(0.25))
    assert {box.dropout for box in boxes_of(qjax.load(tmp_path / "x"))} == {0.25}
    assert_same(qjax.load(tmp_path / "x", like=params), params)


def test_linen_trees_with_plain_orbax(params, tmp_path):
    assert_plain_orbax_restores(params, tmp_path)


def test_nnx_states_with_plain_orbax(model, tmp_path):
    assert_plain_orbax_restores(nnx.state(model, nnx.Not(nnx.RngState)), tmp_path)


KERNEL = "ScanLinenBlock_0/Dense_0/kernel"
TAMPERED = {
    r"kernel'\].dropout must be in \[0, 1\), got 2": lambda q: q["boxes"][KERNEL].update(dropout=2),
    r"kernel'\].names must hold strings": lambda q: q["boxes"][KERNEL].update(names=["a", 3]),
    r"kernel'\].compute_dtype is no dtype": lambda q: q["boxes"][KERNEL].update(compute_dtype="x"),
    r"kernel'\] has unknown fields": lambda q: q["boxes"][KERNEL].update(more=1),
    r"scalings\['.*kernel'\] must be a positive number": lambda q: q["scalings"].update(
        {KERNEL: -1.0}
    ),
    r"a QuantBox is a QTensor q with or without lora_a and lora_b, .* found \['bias'": (
        lambda q: q["boxes"].update({KERNEL.removesuffix("/kernel"): q["boxes"].pop(KERNEL)})
    ),
    r"a QuantBox is a QTensor q .* found \[\]": lambda q: q["boxes"].update(
        other=q["boxes"][KERNEL]
    ),
}


@pytest.mark.parametrize("message", TAMPERED)
def test_tampered_boxes(message, params, tmp_path):
    qjax.save(tmp_path / "x", params)
    edit(tmp_path / "x", TAMPERED[message])
    for like in (None, params):
        with pytest.raises(ValueError, match=message):
            qjax.load(tmp_path / "x", like)


def test_names_of_axes_that_json_cannot_hold(params, tmp_path):
    box = dataclasses.replace(boxes_of(params)[1], names=(None, ("a", "b"), 3))
    with pytest.raises(TypeError, match=r"k: names of axes must be strings, got .*3"):
        qjax.save(tmp_path / "x", {"k": box})
    qjax.save(tmp_path / "x", {"k": dataclasses.replace(box, names=(None, ("a", "b"), "c"))})
    assert qjax.load(tmp_path / "x")["k"].names == (None, ("a", "b"), "c")
