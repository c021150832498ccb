"""The chunked cross-entropy, packed rows and kept activations, against float64 and other calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.models import CausalLM
from tests.models.golden import TINY, TOLERANCE, golden_model, reference

TRAINED = dataclasses.replace(TINY, remat=True)


def numpy_loss(logits, labels):
    """Mean negative log-likelihood in float64."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    counted = labels != -100
    return -log_p[counted, labels[counted]].mean()


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 12])
def test_chunks_change_neither_the_loss_nor_its_gradient(chunk_size, rng):
    hidden = rng.normal(size=(3, 4, 8)).astype(np.float32)
    head = jnp.asarray(rng.normal(size=(8, 11)), jnp.float32)
    labels = rng.integers(0, 11, (3, 4))
    labels[1] = -100

    def loss(hidden, head):
        return qjax.cross_entropy(lambda h: h @ head, hidden, labels, chunk_size=chunk_size)

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    logits = hidden.astype(np.float64) @ np.asarray(head, np.float64)
    # float32 sums of at most 32 terms of size 1 to 10.
    np.testing.assert_allclose(value, numpy_loss(logits, labels), rtol=1e-5)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_logits = (p - np.eye(11)[labels % 11]) * (labels != -100)[..., None] / (labels != -100).sum()
    np.testing.assert_allclose(grads[0], d_logits @ np.asarray(head).T, atol=1e-5)
    flat = hidden.reshape(-1, 8).T @ d_logits.reshape(-1, 11)
    np.testing.assert_allclose(grads[1], flat, atol=1e-5)


def test_no_label_is_no_loss_and_all_logits_are_never_held():
    hidden, labels = jnp.ones((64, 8)), jnp.full((64,), -100)
    assert qjax.cross_entropy(lambda h: h, hidden, labels) == 0
    shapes = []

    def head(h):
        shapes.append(h.shape)
        return jnp.zeros((*h.shape[:-1], 2**22))

    jax.eval_shape(lambda h: qjax.cross_entropy(head, h, labels), hidden)
    assert shapes[-1] == (8, 8)  # 8 tokens of 2**22 logits are 128 MiB


def test_the_loss_of_a_model_is_that_of_transformers():
    model, ref = golden_model("llama"), reference("llama")
    # A mean over 46 float32 losses of about 5, each from logits within TOLERANCE.
    np.testing.assert_allclose(model.loss(ref["input_ids"]), ref["loss"], atol=2 * TOLERANCE)


def test_padding_and_labels_choose_what_is_predicted():
    model, ref = golden_model("llama"), reference("llama")
    ids, mask = np.asarray(ref["input_ids_left"]), np.asarray(ref["attention_mask_left"])
    logits = np.asarray(ref["logits_left"])[:, :-1]
    targets = np.where(mask[:, 1:] == 1, ids[:, 1:], -100)
    # As above; half the predictions.
    np.testing.assert_allclose(
        model.loss(ids, mask), numpy_loss(logits, targets), atol=2 * TOLERANCE
    )
    labels = np.where(np.arange(ids.shape[1]) % 2 == 0, ids, -100)
    targets = np.where(mask[:, 1:] == 1, labels[:, 1:], -100)
    np.testing.assert_allclose(
        model.loss(ids, mask, labels=labels), numpy_loss(logits, targets), atol=2 * TOLERANCE
    )


@pytest.mark.parametrize("family", ["llama", "mistral"])  # full and sliding attention
def test_packed_texts_do_not_see_each_other(family):
    model = golden_model(family)
    ids = np.asarray(reference(family)["input_ids"])[:1, :20]
    segments = np.asarray([[1] * 8 + [2] * 12])
    forward = nnx.jit(lambda model, ids, segments: model(ids, segment_ids=segments))
    packed = forward(model, ids, segments)
    for part in (slice(0, 8), slice(8, 20)):
        alone = nnx.jit(lambda model, ids: model(ids))(model, ids[:, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=TOLERANCE)
    losses = [float(model.loss(ids[:, :8])), float(model.loss(ids[:, 8:]))]
    # 7 and 11 predictions: none over the border.
    want = (7 * losses[0] + 11 * losses[1]) / 18
    np.testing.assert_allclose(model.loss(ids, segment_ids=segments), want, atol=TOLERANCE)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_kept_activations_are_kept_and_change_no_gradient(scan_layers, capsys):
    ids = jax.random.randint(jax.random.key(0), (2, 6), 0, 32)

    def gradient(saves):
        config = dataclasses.replace(TRAINED, scan_layers=scan_layers, remat_saves=saves)
        graphdef, state = nnx.split(CausalLM(config, rngs=nnx.Rngs(0)))
        loss = lambda state: nnx.merge(graphdef, state).loss(ids)  # noqa: E731
        jax.ad_checkpoint.print_saved_residuals(loss, state)
        return jax.jit(jax.grad(loss))(state), len(capsys.readouterr().out.splitlines())

    want, few = gradient(())
    got, more = gradient(("attention", "stream", "qkv", "gate_up"))
    assert more >= few + 7  # gate and up are two, queries, keys and values three
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # The same float32 sums, fused differently: some rounding steps of the largest term.
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda m, i: m.loss(i, labels=i[:, 1:]),
            ValueError,
            r"labels has shape \(1, 3\), must be",
        ),
        (lambda m, i: m.loss(i, labels=i * 1.0), TypeError, "labels must be an integer array"),
        (lambda m, i: m.loss(i, chunk_size=0), ValueError, "chunk_size=0 must be 1 or more"),
        (lambda m, i: m(i, segment_ids=i[:, :2]), ValueError, "segment_ids has shape"),
        (
            lambda m, i: m.hidden(i, segment_ids=i, cache=m.init_cache(1, 8)),
            ValueError,
            "segment_ids cannot be used with a cache",
        ),
        (
            lambda m, i: dataclasses.replace(m.config, remat_saves=("logits",)),
            ValueError,
            r"remat_saves=\('logits',\) must be among \('attention'",
        ),
    ],
)
def test_misuse_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(golden_model("llama"), jnp.ones((1, 4), jnp.int32))
