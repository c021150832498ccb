"""Perplexity, KL and agreement against numpy's float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.evaluation import layer_errors

VOCAB = 11
TABLES = np.random.default_rng(0).standard_normal((2, VOCAB, VOCAB)).astype(np.float32)


def model(table):
    return lambda ids: jnp.asarray(table)[ids]


def test_against_float64():
    ids = [np.random.default_rng(i).integers(0, VOCAB, (2, 7)) for i in range(3)]
    found = qjax.evaluate(model(TABLES[0]), ids, reference=model(TABLES[1]))
    all_ids = np.concatenate(ids)
    logs = []
    for table in TABLES.astype(np.float64):
        logits = table[all_ids[:, :-1]]
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    losses = [-np.take_along_axis(x, all_ids[:, 1:, None], -1).mean() for x in logs]
    kl = (np.exp(logs[1]) * (logs[1] - logs[0])).sum(-1).mean()
    assert found.tokens == 3 * 2 * 6
    # float32 sums.
    np.testing.assert_allclose(found.perplexity, np.exp(losses[0]), rtol=1e-5)
    np.testing.assert_allclose(found.reference_perplexity, np.exp(losses[1]), rtol=1e-5)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-5)
    assert found.agreement == (logs[0].argmax(-1) == logs[1].argmax(-1)).mean()
    alone = qjax.evaluate(model(TABLES[0]), ids)
    assert alone.perplexity == found.perplexity and alone.kl is None


def test_layer_errors_are_relative():
    class Net(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(64, 32, rngs=nnx.Rngs(0))

    reference, net = Net(), qjax.quantize_model(Net())
    w = np.asarray(reference.fc.kernel[...], np.float64)
    want = np.linalg.norm(net.fc.kernel.q.dequantize() - w) / np.linalg.norm(w)
    errors = layer_errors(net, reference)
    assert list(errors) == ["fc/kernel"]
    np.testing.assert_allclose(errors["fc/kernel"], want, rtol=1e-5)  # float32 norms


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "batches is empty"),
        ([np.zeros((2, 1), np.int32)], r"T at least 2, got int32\[2, 1\]"),
        ([np.zeros((2, 3), np.float32)], r"token ids \[B, T\]"),
    ],
)
def test_misuse(batches, message):
    with pytest.raises(ValueError, match=message):
        qjax.evaluate(model(TABLES[0]), batches)
