"""AWQ: the search against float64 numpy, the folds against the unscaled model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.calibration.awq import fold
from qjax.core.codebook import codebook
from qjax.swap.leaves import iter_leaves
from tests.models.golden import TOLERANCE, error, golden_model, reference

K, N, BLOCK = 128, 48, 32
NF4 = codebook("nf4").astype(np.float64)


class Net(nnx.Module):
    """A norm that two layers read, the first of which makes the input of another."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(K, rngs=rngs)
        self.up = nnx.Linear(K, K, rngs=rngs)
        self.gate = nnx.Linear(K, K, rngs=rngs)
        self.down = nnx.Linear(K, N, rngs=rngs)
        # Activations as models have them: a few channels are much larger than the others.
        self.norm.scale[...] = jnp.where(jnp.arange(K) % 16 == 0, 20.0, 1.0)
        self.norm.bias[...] = 0.1 * jax.random.normal(jax.random.key(1), (K,))

    def __call__(self, x):
        x = self.norm(x)
        return self.down(self.up(x) * nnx.sigmoid(self.gate(x)))


FOLDS = {"norm": ("up/kernel", "gate/kernel"), "up": ("down/kernel",)}
DATA = [np.random.default_rng(i).standard_normal((64, K)).astype(np.float32) for i in range(5)]


def config(format: str = "nf4") -> qjax.QuantConfig:
    double = None if format == "int4_asym" else False
    return qjax.QuantConfig(format, BLOCK, double_quant=double, compute_dtype=jnp.float32)


def calibrated(method: str | None, format: str = "nf4", **options) -> tuple[Net, Net]:
    float_model = Net(nnx.Rngs(0))
    model = qjax.quantize_model(nnx.clone(float_model), config(format))
    if method is not None:
        model = qjax.calibrate(model, float_model, DATA[:4], method=method, **options)
    return model, float_model


def rounded(w: np.ndarray) -> np.ndarray:
    """A kernel [in, out] in NF4."""
    blocks = w.T.reshape(w.shape[1], -1, BLOCK)
    absmax = np.abs(blocks).max(-1, keepdims=True)
    nearest = NF4[np.abs((blocks / absmax)[..., None] - NF4).argmin(-1)]
    return (nearest * absmax).reshape(w.shape[1], -1).T


def test_the_scales_of_a_norm_are_the_best_of_those_tried():
    model, float_model = calibrated("awq", folds=FOLDS)
    x = np.asarray(float_model.norm(np.concatenate(DATA[:4])), np.float64)
    size = np.abs(x).mean(0)
    kernels = [np.asarray(getattr(float_model, n).kernel[...], np.float64) for n in ("up", "gate")]
    tried = {}
    for power in np.arange(20) / 20:
        s = size**power
        s = s / np.sqrt(s.max() * s.min())
        lost = sum(((x @ (rounded(s[:, None] * w) / s[:, None] - w)) ** 2).sum() for w in kernels)
        tried[power] = lost, s
    power = min(tried, key=lambda p: tried[p][0])
    assert power > 0  # scales that are worth something
    found = float_model.norm.scale[...] / model.norm.scale[...]
    # The powers are taken in float32.
    np.testing.assert_allclose(found, tried[power][1], rtol=1e-5)
    np.testing.assert_allclose(model.norm.bias[...] * found, float_model.norm.bias[...], rtol=1e-5)
    # The layers that read it hold scaled rows, with blocks of the least weighted error.
    s = np.asarray(found, np.float64)
    w = np.asarray(float_model.gate.kernel[...], np.float64)
    weighed = (x**2).mean(0)[:, None]
    got = np.asarray(model.gate.kernel.q.dequantize(), np.float64) / s[:, None]
    plain = rounded(s[:, None] * w) / s[:, None]
    assert (weighed * (got - w) ** 2).sum() < (weighed * (plain - w) ** 2).sum()


@pytest.mark.parametrize("format", ["nf4", "int4", "int4_asym"])
def test_outputs_on_other_data_are_nearer(format):
    def lost(model, float_model):
        return float(np.linalg.norm(model(DATA[4]) - float_model(DATA[4])))

    plain, awq = lost(*calibrated(None, format)), lost(*calibrated("awq", format, folds=FOLDS))
    assert awq < 0.9 * plain
    if format == "int4":  # evenly spaced, as the formats that AWQ is for; with absmax scales
        assert awq < lost(*calibrated("activation", format))


def test_formats_and_bytes_stay():
    (awq, _), (plain, _) = calibrated("awq", folds=FOLDS), calibrated(None)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype,
                        nnx.state(awq), nnx.state(plain))  # fmt: skip
    assert all(jax.tree.leaves(same))


def test_linen_parameters():
    net = nn.Sequential([nn.LayerNorm(), nn.Dense(64), nn.relu, nn.Dense(N)])
    params = net.init(jax.random.key(0), DATA[0])["params"]
    params["layers_0"]["scale"] = jnp.where(jnp.arange(K) % 16 == 0, 20.0, 1.0)
    qparams = qjax.quantize_params(params, config("int4"))

    def call(params, x):
        return qjax.apply(net, {"params": params}, x)

    folds = {"layers_0": ["layers_1/kernel"], "layers_1": ["layers_3/kernel"]}
    better = qjax.calibrate(qparams, params, DATA[:4], method="awq", call=call, folds=folds)
    assert jax.tree.structure(better) == jax.tree.structure(qparams)
    want = call(params, DATA[4])
    errors = [np.linalg.norm(call(p, DATA[4]) - want) for p in (qparams, better)]
    assert errors[1] < 0.9 * errors[0]


# Norms with an offset on both sides of each half; biases and heads of one size; MLPs of which `up`
# is a factor, plain with another activation than ReLU; blocks in parallel; no folds into experts.
@pytest.mark.parametrize(
    "family, producers",
    [
        ("gemma2", {"input_layernorm", "pre_feedforward_layernorm", "mlp/up_proj"}),
        ("llama", {"input_layernorm", "post_attention_layernorm", "mlp/up_proj"}),
        ("gpt_neox", {"input_layernorm", "post_attention_layernorm"}),
        ("opt", {"input_layernorm", "post_attention_layernorm", "self_attn/v_proj", "mlp/up_proj"}),
        ("mixtral", {"input_layernorm"}),
        ("bert", {"self_attn/v_proj"}),
    ],
)
def test_folds_of_a_model_leave_its_logits(family, producers):
    model = nnx.clone(golden_model(family))
    folds = model.foldings()
    assert {producer.partition("/0/")[2] for producer in folds if "/0/" in producer} == producers
    floats = {path: leaf for path, leaf, _ in iter_leaves(model)}
    rng = np.random.default_rng(0)
    scales = {
        producer: jnp.asarray(2.0 ** rng.uniform(-2, 2, floats[readers[0]].shape[0]), jnp.float32)
        for producer, readers in folds.items()
    }
    offset = 1.0 if family.startswith("gemma") else 0.0
    offsets = {f"{producer}/scale": offset for producer in folds}
    new = fold(scales, {}, floats, folds, offsets)
    assert len(new) >= 2 * len(folds)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = "/".join(map(str, path))
        variable.set_raw_value(new.get(name, variable.get_raw_value()))
    ref = reference(family)
    extra = {"token_type_ids": ref["token_type_ids"]} if family == "bert" else {}
    logits = nnx.jit(lambda model, ids, **kwargs: model(ids, **kwargs))(
        model, ref["input_ids"], **extra
    )
    assert error(logits, ref["logits"]).max() < TOLERANCE


def test_a_language_model_knows_its_folds():
    model = nnx.clone(golden_model("gemma2"))
    quantized = qjax.quantize_model(nnx.clone(model), config("int4"))
    ids = reference("gemma2")["input_ids"]
    before = [np.linalg.norm(quantized(ids[1:]) - model(ids[1:]))]
    better = qjax.calibrate(quantized, model, [ids[:1]], method="awq")
    assert np.linalg.norm(better(ids[1:]) - model(ids[1:])) < before[0]
    name = "layers/0/input_layernorm/scale"
    scale = {path: leaf for path, leaf, _ in iter_leaves(better)}[name]
    assert not np.allclose(scale, model.layers[0].input_layernorm.scale[...])


def bad_calls():
    float_model = Net(nnx.Rngs(0))

    def call(folds, change=lambda model: model):
        model = change(qjax.quantize_model(nnx.clone(float_model), config()))
        return lambda: qjax.calibrate(model, float_model, DATA[:1], method="awq", folds=folds)

    def adapted(model):
        return qjax.add_lora(model, qjax.LoraConfig(rank=2), rngs=nnx.Rngs(1))

    return {
        'method="awq" needs folds=': call(None),
        "no norm and no dense layer at 'nrm'": call({"nrm": ["up/kernel"]}),
        r"folds\['norm'\]: there is no weight at 'up'": call({"norm": ["up"]}),
        r"folds\['down'\]: outputs and inputs differ: .*48.*128": call({"down": ["up/kernel"]}),
        "folds: up/kernel reads the output of one layer": call(
            {"norm": ["up/kernel"], "gate": ["up/kernel"]}
        ),
        "calibrate before adding adapters": call(FOLDS, adapted),
        'folds= is of method="awq", got method=': lambda: qjax.calibrate(
            qjax.quantize_model(nnx.clone(float_model), config()),
            float_model,
            DATA[:1],
            folds=FOLDS,
        ),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_misuse(message):
    with pytest.raises(ValueError, match=message):
        bad_calls()[message]()
