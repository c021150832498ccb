"""Training adapters on Linen models: the split tree, and a TrainState over the whole tree."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import qjax
from qjax.nn.linen_box import is_quant_box
from qjax.swap.linen import dequantize_params
from qjax.swap.linen_plan import leaves_by_path
from tests.swap.linen_models import LAYERS, VOCAB, WIDTH, Loop, Scanned, make, paths

STEPS = 20
TX = optax.adamw(1e-2)
# The defaults: double quantization, bfloat16 products.
CFG = qjax.QuantConfig(include="layer")
LORA = qjax.LoraConfig(rank=4, alpha=8)


def task(cls):
    """A model, its 4-bit parameters with adapters, and a batch: the next id is 3 id + 1."""
    model, params, ids = make(cls)
    params = qjax.add_lora_params(qjax.quantize_params(params, CFG), LORA, jax.random.key(1))
    return model, params, (ids, (3 * ids + 1) % VOCAB)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(step, carry):
    losses = []
    for _ in range(STEPS):
        *carry, loss = step(*carry)
        losses.append(float(loss))
    return carry, losses


@functools.cache
def reference_losses(cls):
    """Train the adapters by hand: W + scaling * A B, of decoded weights, in the float model."""
    model, params, batch = task(cls)
    boxes = {path: box for path, box in leaves_by_path(params).items() if is_quant_box(box)}
    bare = jax.tree.map(
        lambda x: dataclasses.replace(x, lora_a=None, lora_b=None) if is_quant_box(x) else x,
        params,
        is_leaf=is_quant_box,
    )
    decoded = dequantize_params(bare)

    def product(a, b):  # [*contract, rank] [rank, *out]
        return jnp.tensordot(a, b, 1)

    def loss(adapters):
        def merge(path, w):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in adapters:
                return w
            multiply = jax.vmap(product) if isinstance(model, Scanned) else product
            return w + LORA.scaling * multiply(*adapters[name])

        merged = jax.tree_util.tree_map_with_path(merge, decoded)
        return cross_entropy(model.apply({"params": merged}, batch[0]), batch[1])

    @jax.jit
    def step(adapters, state):
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = TX.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    adapters = {path: (box.lora_a, box.lora_b) for path, box in boxes.items()}
    return train(step, (adapters, TX.init(adapters)))[1]


def assert_learns_like(losses, expected):
    assert expected[-1] < 0.7 * expected[0], "the reference itself has to learn"
    # The target of the project: within 5 % of the same run on decoded weights.
    assert abs(losses[-1] / expected[-1] - 1) < 0.05
    # Every step: the products here are in bfloat16, 8 bits, and the reference's in float32.
    np.testing.assert_allclose(losses, expected, rtol=0.05)


def assert_same_bits(actual, expected):
    for path, new, old in zip(
        paths(expected), jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert new.dtype == old.dtype, path
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes(), path


def frozen_gradients(compiled) -> set[tuple[int, ...]]:
    """The matrices of a frozen weight's shape that a dot or a scatter of a function results in."""
    weights = {(WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (VOCAB, WIDTH)}
    weights |= {shape[::-1] for shape in weights}
    found = re.findall(r"= \w+\[([\d,]*)\][^=]*? (?:dot|scatter)\(", compiled.as_text())
    return {
        tuple(int(n) for n in shape.split(",") if n not in ("", "1")) for shape in found
    } & weights


@pytest.mark.parametrize("cls", [Loop, Scanned])
def test_split_tree(cls):
    model, params, (ids, labels) = task(cls)
    trainable, frozen = qjax.partition(params)
    before = jax.tree.map(np.array, frozen)

    def loss(trainable, frozen):
        params = {"params": qjax.combine(trainable, frozen)}
        return cross_entropy(qjax.apply(model, params, ids), labels)

    @jax.jit
    def step(trainable, state, frozen):
        value, grads = jax.value_and_grad(loss)(trainable, frozen)
        updates, state = TX.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, frozen, value

    state = TX.init(trainable)
    adapters = 2 * 7 * (1 if cls is Scanned else LAYERS)
    assert len(jax.tree.leaves(trainable)) == adapters
    assert len(jax.tree.leaves(state)) == 2 * adapters + 1  # two moments and a count
    compiled = step.lower(trainable, state, frozen).compile()
    (trained, _, frozen), losses = train(compiled, (trainable, state, frozen))
    assert_learns_like(losses, reference_losses(cls))
    assert_same_bits(frozen, before)
    assert all(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (trained, trainable))))
    assert not frozen_gradients(compiled)


def test_the_check_above_finds_gradients_of_weights():
    """Full fine-tuning of the decoded weights has what the adapters' step must not have."""
    model, params, ids = make(Scanned)
    grad = jax.jit(jax.grad(lambda p: model.apply({"params": p}, ids).sum()))
    found = {tuple(sorted(shape)) for shape in frozen_gradients(grad.lower(params).compile())}
    assert found == {(WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (VOCAB, WIDTH)}


def test_train_state_over_the_whole_tree():
    model, params, (ids, labels) = task(Scanned)
    before = jax.tree.map(np.array, qjax.partition(params)[1])
    apply_fn = functools.partial(qjax.apply, model)
    state = TrainState.create(apply_fn=apply_fn, params=params, tx=qjax.lora_optimizer(TX))
    assert len(jax.tree.leaves(state.opt_state)) == 2 * 14 + 1

    @jax.jit
    def step(state):
        def loss(params):
            return cross_entropy(state.apply_fn({"params": params}, ids), labels)

        value, grads = jax.value_and_grad(loss, allow_int=True)(state.params)
        return state.apply_gradients(grads=grads), value

    compiled = step.lower(state).compile()
    (state,), losses = train(compiled, (state,))
    assert_learns_like(losses, reference_losses(Scanned))
    assert_same_bits(qjax.partition(state.params)[1], before)
    assert not frozen_gradients(compiled)
