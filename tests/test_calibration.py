"""Calibrated weights against an independent search and GPTQ written out in numpy's float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.core.codebook import codebook

K, N, BLOCK = 128, 48, 32
NF4 = codebook("nf4").astype(np.float64)
CONFIG = qjax.QuantConfig(block_size=BLOCK, double_quant=False, compute_dtype=jnp.float32)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(K, N, rngs=rngs)

    def __call__(self, x):
        return self.up(x)


@pytest.fixture(scope="module")
def data() -> list[np.ndarray]:
    """Activations as they are in models: correlated, of very different sizes."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((K, K)) * np.logspace(-1, 1, K)
    return [(rng.standard_normal((64, K)) @ mix).astype(np.float32) for _ in range(5)]


def calibrated(method: str | None, data, cfg=CONFIG) -> tuple[Net, Net]:
    reference = Net(nnx.Rngs(0))
    model = qjax.quantize_model(nnx.clone(reference), cfg)
    if method is not None:
        model = qjax.calibrate(model, reference, data[:4], method=method)
    return model, reference


def weight_error(model, reference) -> float:
    return float(np.linalg.norm(model.up.kernel.q.dequantize() - reference.up.kernel[...]))


def output_error(model, reference, x) -> float:
    return float(np.linalg.norm(model(x) - reference(x)))


def nearest(values: np.ndarray) -> np.ndarray:
    return NF4[np.abs(values[..., None] - NF4).argmin(-1)]


def best_scales(rows: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """The least error over the same ratios, by trying each: [N, K / BLOCK]."""
    blocks = rows.reshape(N, -1, BLOCK)
    absmax = np.abs(blocks).max(-1)
    tried = []
    for ratio in np.linspace(0.7, 1.1, 33):
        scale = (absmax * ratio)[..., None]
        errors = importance.reshape(1, -1, BLOCK) * (nearest(blocks / scale) * scale - blocks) ** 2
        tried.append(errors.sum(-1))
    return np.min(tried, axis=0)


@pytest.mark.parametrize("method", ["mse", "activation"])
def test_scales_are_the_best_of_those_tried(method, data):
    model, reference = calibrated(method, data)
    rows = np.asarray(reference.up.kernel[...], np.float64).T
    x = np.concatenate(data[:4]).astype(np.float64)
    importance = np.ones(K) if method == "mse" else (x**2).mean(0)
    decoded = np.asarray(model.up.kernel.q.dequantize(), np.float64).T
    errors = importance.reshape(1, -1, BLOCK) * ((decoded - rows) ** 2).reshape(N, -1, BLOCK)
    # float32 sums of 32 squares.
    np.testing.assert_allclose(errors.sum(-1), best_scales(rows, importance), rtol=1e-4)


def test_gptq_is_algorithm_1(data):
    """Frantar et al. 2022, algorithm 1, in float64 with the scales that were found."""
    model, reference = calibrated("gptq", data)
    q = model.up.kernel.q
    x = np.concatenate(data[:4]).astype(np.float64)
    hessian = x.T @ x / len(x)
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(K)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left = np.asarray(reference.up.kernel[...], np.float64).T.copy()
    want = np.zeros_like(left)
    for i in range(K):
        scale = np.asarray(q.scales, np.float64)[:, i // BLOCK]
        want[:, i] = nearest(left[:, i] / scale) * scale
        error = (left[:, i] - want[:, i]) / upper[i, i]
        left -= error[:, None] * upper[i]
    got = np.asarray(q.dequantize()).T
    # A float32 column that lands beside a decision bound takes another code, and all after it in
    # its row shift a little: few do.
    different = ~np.isclose(got, want, rtol=1e-5, atol=1e-6)
    assert different.mean() < 0.02


@pytest.mark.parametrize("double_quant", [False, True])
def test_each_method_is_better_at_what_it_is_for(double_quant, data):
    cfg = qjax.QuantConfig(double_quant=double_quant, compute_dtype=jnp.float32)
    models = {m: calibrated(m, data, cfg) for m in (None, "mse", "hqq", "activation", "gptq")}
    weight = {m: weight_error(*pair) for m, pair in models.items()}
    held_out = {m: output_error(*pair, data[4]) for m, pair in models.items()}
    assert weight["mse"] < 0.95 * weight[None] and weight["hqq"] < 0.98 * weight[None]
    assert held_out["activation"] < held_out["mse"] < held_out[None]
    assert held_out["gptq"] < held_out["activation"]
    plain, calibrated_q = (models[m][0].up.kernel.q for m in (None, "gptq"))
    assert jax.tree.structure(plain) == jax.tree.structure(calibrated_q)
    assert plain.nbytes == calibrated_q.nbytes


def test_linen_parameters(data):
    net = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(N)])
    params = net.init(jax.random.key(0), data[0])["params"]
    cfg = qjax.QuantConfig(compute_dtype=jnp.float32)
    qparams = qjax.quantize_params(params, cfg)

    def call(params, x):
        return qjax.apply(net, {"params": params}, x)

    better = qjax.calibrate(qparams, params, data[:4], call=call)
    want = call(params, data[4])
    errors = [np.linalg.norm(call(p, data[4]) - want) for p in (qparams, better)]
    assert errors[1] < 0.95 * errors[0]


def test_stacked_layers_each_have_their_moments(data):
    w = np.random.default_rng(1).standard_normal((2, K, N)).astype(np.float32)
    q = qjax.quantize(jnp.asarray(w), CONFIG, batch_ndim=1)
    x = np.stack([data[0], data[1] ** 2])

    def call(params, x):
        return qjax.matmul(x, params["w"])

    better = qjax.calibrate({"w": q}, {"w": w}, [x], call=call)["w"]
    one = qjax.quantize(jnp.asarray(w[1]), CONFIG)
    alone = qjax.calibrate({"w": one}, {"w": w[1]}, [x[1]], call=call)["w"]
    np.testing.assert_array_equal(better.packed[1], alone.packed)


def bad_calls():
    reference = Net(nnx.Rngs(0))
    model = qjax.quantize_model(nnx.clone(reference), CONFIG)
    x = np.ones((4, K), np.float32)
    return {
        "method must be one of": lambda: qjax.calibrate(model, reference, [x], method="magic"),
        "batches is empty": lambda: qjax.calibrate(model, reference, []),
        r"batches\[1\] does not fit the model: x must be .*got shape": lambda: qjax.calibrate(
            model, reference, [x, x[:, 1:]]
        ),
        "up/kernel: no activations": lambda: qjax.calibrate(model, reference, [x[:0]]),
        "activations of the calibration data hold NaN": lambda: qjax.calibrate(
            model, reference, [x * np.nan]
        ),
        "up/kernel: reference must have its float weight": lambda: qjax.calibrate(
            model, model, [x]
        ),
        "no 4-bit weight": lambda: qjax.calibrate(reference, reference, [x]),
        "activations are traced": lambda: jax.jit(
            lambda x: qjax.calibrate(model, reference, [x]).up.kernel.q.packed
        )(x),
        "never reach this layer": lambda: qjax.calibrate(
            model, reference, [x], call=lambda model, x: x
        ),
        "call must say": lambda: qjax.calibrate(
            {"w": model.up.kernel.q}, {"w": reference.up.kernel[...]}, [x]
        ),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_misuse(message):
    with pytest.raises(ValueError, match=message):
        bad_calls()[message]()
