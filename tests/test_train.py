"""Splitting, masking and optimizing parameter trees whose adapters alone are trained."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

import qjax
from qjax.ops.lora import lora_matmul

K, N, RANK, ROWS = 128, 96, 4, 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Box:
    """A kernel and its adapter in one leaf of the parameters, as the Linen box has them."""

    q: qjax.QTensor
    lora_a: jax.Array | None
    lora_b: jax.Array | None
    scaling: float = dataclasses.field(default=2.0, metadata={"static": True})


def box(seed: int, k: int = K, n: int = N) -> Box:
    keys = jax.random.split(jax.random.key(seed), 2)
    q = qjax.quantize(jax.random.normal(keys[0], (k, n)) / np.sqrt(k))
    a = jax.random.normal(keys[1], (k, RANK)) / np.sqrt(k)
    return Box(q, a, jnp.zeros((RANK, n)))


@functools.cache
def cached_params() -> dict:
    bias = jnp.full(N, -0.0).at[1].set(1e-40).at[2].set(0.5)  # zeros and subnormals that must stay
    return {"up": {"kernel": box(0), "bias": bias}, "down": {"kernel": box(1, N, K)}}


def make_params() -> dict:
    """The same arrays each time, in new dicts."""
    return {name: dict(layer) for name, layer in cached_params().items()}


def dense(x, layer: dict):
    kernel = layer["kernel"]
    y = qjax.matmul(x, kernel.q)
    y += np.float32(kernel.scaling) * lora_matmul(x, kernel.lora_a, kernel.lora_b)
    return y + layer["bias"][None] if "bias" in layer else y


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(dense(x, params["up"]))
    return jnp.mean((dense(hidden, params["down"]) - y) ** 2)


@pytest.fixture(scope="module")
def batch():
    x = jax.random.normal(jax.random.key(7), (ROWS, K))
    return x, jnp.roll(x, 1, axis=1)


def split_step(tx):
    @jax.jit
    def step(trainable, opt_state, frozen, batch):
        value, grads = jax.value_and_grad(lambda t: loss(qjax.combine(t, frozen), batch))(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return step


def whole_step(tx):
    @jax.jit
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss, allow_int=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


def array_sizes(tree) -> list[int]:
    return sorted(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)


# --- partition and combine


@pytest.mark.parametrize("wrap", [dict, freeze, lambda p: (p, [p])], ids=["dict", "frozen", "list"])
def test_partition_and_combine_round_trip(wrap):
    params = wrap(make_params())
    trainable, frozen = qjax.partition(params)
    copies = 1 if isinstance(params, dict | FrozenDict) else 2
    assert len(jax.tree.leaves(trainable)) == 4 * copies
    # Each kernel: codes, and scales in three arrays; and one bias.
    assert len(jax.tree.leaves(frozen)) == (2 * 4 + 1) * copies
    assert_same_bits(qjax.combine(trainable, frozen), params)
    assert_same_bits(qjax.combine(frozen, trainable), params)


def test_partition_leaves_none_in_the_holes():
    trainable, frozen = qjax.partition(make_params())
    kernel = trainable["up"]["kernel"]
    assert kernel.q.packed is None
    assert kernel.q.scales.codes is None
    assert kernel.lora_a.shape == (K, RANK)
    assert trainable["up"]["bias"] is None
    assert frozen["up"]["kernel"].lora_a is None
    assert frozen["up"]["kernel"].q.packed.dtype == jnp.uint8


def test_layers_without_an_adapter_come_back():
    params = make_params()
    params["down"]["kernel"] = dataclasses.replace(
        params["down"]["kernel"], lora_a=None, lora_b=None
    )
    assert_same_bits(qjax.combine(*qjax.partition(params)), params)


def test_partition_works_on_shapes():
    params = jax.eval_shape(lambda p: p, make_params())
    trainable, frozen = qjax.partition(params)
    assert qjax.combine(trainable, frozen) == params


@pytest.mark.parametrize("function", [qjax.partition, qjax.lora_mask])
@pytest.mark.parametrize("params", [{}, {"lora_a": {"kernel": np.ones(2)}}, {"lora_a": None}])
def test_a_tree_without_adapters_is_refused(function, params):
    with pytest.raises(ValueError, match=r"no adapters.*lora_a or lora_b.*add_lora_params"):
        function(params)


def test_combine_names_the_leaf_that_both_halves_have():
    trainable, frozen = qjax.partition(make_params())
    with pytest.raises(ValueError, match=r"both have a leaf at down/kernel/lora_a"):
        qjax.combine(trainable, trainable)
    with pytest.raises(ValueError, match=r"both have a leaf at down/kernel/q/packed"):
        qjax.combine(frozen, frozen)


def test_combine_names_where_the_halves_differ():
    trainable, frozen = qjax.partition(make_params())
    other = qjax.partition({**make_params(), "up": {"kernel": box(0, 64), "bias": jnp.zeros(N)}})[1]
    # The 64 is a static field of the other QTensor: the arrays alone would fit.
    with pytest.raises(ValueError, match=r"do not fit: at up/kernel/q one has .*128.*64"):
        qjax.combine(trainable, other)
    del frozen["up"]["bias"]
    with pytest.raises(ValueError, match=r"do not fit: at up one has .*bias"):
        qjax.combine(trainable, frozen)


# --- the mask


def test_mask_is_true_at_the_adapters_alone():
    mask = qjax.lora_mask(make_params())
    true = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(mask) if leaf]
    assert all(re.search(r"\.lora_[ab]$", path) for path in true)
    assert (len(true), len(jax.tree.leaves(mask))) == (4, 13)
    assert all(type(leaf) is bool for leaf in jax.tree.leaves(mask))


@pytest.mark.parametrize("as_function", [False, True])
def test_mask_fits_optax_masked_on_a_split_tree(batch, as_function):
    params = make_params()
    trainable, frozen = qjax.partition(params)
    masked = optax.masked(
        optax.adam(1e-2), qjax.lora_mask if as_function else qjax.lora_mask(params)
    )
    plain = optax.adam(1e-2)
    got, _, _ = split_step(masked)(trainable, masked.init(trainable), frozen, batch)
    expected, _, _ = split_step(plain)(trainable, plain.init(trainable), frozen, batch)
    assert_same_bits(got, expected)


# --- the three ways to train agree


ADAPTER_SIZES = sorted([K * RANK, RANK * N, N * RANK, RANK * K])


def test_state_exists_for_adapters_only():
    params = make_params()
    whole = qjax.lora_optimizer(optax.adamw(1e-2)).init(params)
    split = optax.adamw(1e-2).init(qjax.partition(params)[0])
    # Two moments of each adapter; scalars are Adam's step count.
    assert array_sizes(whole) == array_sizes(split) == sorted(2 * ADAPTER_SIZES)


def test_whole_tree_trains_as_the_split_tree_does(batch):
    params = make_params()
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-2, weight_decay=0.1))
    whole_tx = qjax.lora_optimizer(chain)
    whole, whole_state, step = params, whole_tx.init(params), whole_step(whole_tx)
    trainable, frozen = qjax.partition(params)
    split_state, other_step = chain.init(trainable), split_step(chain)
    losses = []
    for _ in range(20):
        whole, whole_state, value = step(whole, whole_state, batch)
        trainable, split_state, other = other_step(trainable, split_state, frozen, batch)
        # The same sums in another order of fusion: 20 float32 steps apart.
        np.testing.assert_allclose(value, other, rtol=1e-4)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert_same_bits(qjax.partition(whole)[1], qjax.partition(params)[1])


def test_train_state_over_the_whole_tree(batch):
    params = make_params()
    state = TrainState.create(
        apply_fn=loss, params=params, tx=qjax.lora_optimizer(optax.adam(2e-2))
    )

    @jax.jit
    def step(state, batch):
        value, grads = jax.value_and_grad(state.apply_fn, allow_int=True)(state.params, batch)
        return state.apply_gradients(grads=grads), value

    first = None
    for _ in range(5):
        state, value = step(state, batch)
        first = value if first is None else first
    assert value < first
    assert int(state.step) == 5
    assert array_sizes(state.opt_state) == sorted(2 * ADAPTER_SIZES)
    assert_same_bits(qjax.partition(state.params)[1], qjax.partition(params)[1])
    adapters = zip(
        jax.tree.leaves(qjax.partition(state.params)[0]),
        jax.tree.leaves(qjax.partition(params)[0]),
        strict=True,
    )
    assert all((new != old).any() for new, old in adapters)


def test_updates_outside_jit():
    params = make_params()
    params["up"]["bias"] = jnp.full(N, -0.0)
    tx = qjax.lora_optimizer(optax.sgd(1.0))
    grads = jax.tree.map(
        lambda leaf: (
            jnp.ones_like(leaf)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else np.zeros(leaf.shape, jax.dtypes.float0)
        ),
        params,
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    for leaf, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert (leaf.shape, leaf.dtype) == (update.shape, update.dtype)
    new = optax.apply_updates(params, updates)
    assert_same_bits(qjax.partition(new)[1], qjax.partition(params)[1])
    np.testing.assert_array_equal(new["up"]["kernel"].lora_b, -np.ones((RANK, N), np.float32))


def test_arguments_of_the_inner_optimizer_pass_through():
    params = {"kernel": jnp.ones(2, jnp.uint8), "lora_a": jnp.ones(3)}
    tx = qjax.lora_optimizer(optax.scale_by_polyak())
    grads = {"kernel": np.zeros(2, jax.dtypes.float0), "lora_a": jnp.full(3, 2.0)}
    updates, _ = tx.update(grads, tx.init(params), params, value=jnp.float32(6.0))
    # Polyak's step: value / |g|^2 = 6 / 12, times g = 2.
    np.testing.assert_allclose(updates["lora_a"], 1.0, rtol=1e-6)


def test_update_needs_params():
    params = {"lora_a": jnp.ones(3)}
    tx = qjax.lora_optimizer(optax.sgd(1.0))
    with pytest.raises(ValueError, match="update needs params"):
        tx.update(params, tx.init(params))


# --- what is in the compiled step


def dot_count(compiled) -> int:
    return len(re.findall(r" dot\(|custom-call\(.*matmul", compiled.as_text()))


def test_no_gradient_of_a_frozen_leaf_is_in_the_compiled_step(batch):
    """The whole-tree step does the split step's products, and none for a base weight's gradient."""
    params = make_params()
    tx = optax.sgd(1e-2)
    trainable, frozen = qjax.partition(params)
    split = split_step(tx).lower(trainable, tx.init(trainable), frozen, batch).compile()
    whole_tx = qjax.lora_optimizer(tx)
    whole = whole_step(whole_tx).lower(params, whole_tx.init(params), batch).compile()
    assert dot_count(whole) == dot_count(split) > 0

    def full(params, batch):
        """The gradient that must not be there: of the decoded base weights."""
        decode = lambda leaf: leaf.dequantize() if isinstance(leaf, qjax.QTensor) else leaf  # noqa: E731
        weights = jax.tree.map(decode, params, is_leaf=lambda x: isinstance(x, qjax.QTensor))

        def dense(x, layer):
            kernel = layer["kernel"]
            return x @ kernel.q + x @ kernel.lora_a @ kernel.lora_b

        def loss(weights):
            hidden = jnp.tanh(dense(batch[0], weights["up"]))
            return jnp.mean((dense(hidden, weights["down"]) - batch[1]) ** 2)

        return jax.grad(loss)(weights)

    assert dot_count(jax.jit(full).lower(params, batch).compile()) > dot_count(whole)
    # The step returns the frozen leaves and hands each over as it is.
    assert whole.cost_analysis()["flops"] < 1.2 * split.cost_analysis()["flops"]
