"""NNX models of other libraries: raw parameters, einsum modules, experts, tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from tests.swap.nnx_foreign_models import (
    CLOSE,
    DIM,
    EXPERTS,
    F32,
    HEAD_DIM,
    HEADS,
    IDS,
    VOCAB,
    Einsum,
    by_hand,
    quantized,
    weights,
)

FUSED = {"layers/0/attn/qkv/w", "layers/0/attn/o_proj/w"}
DECODED = {"layers/0/moe/up", "layers/0/moe/down"}


def test_whole_model(mode):
    model = quantized()
    assert set(weights(model)) == FUSED | DECODED
    np.testing.assert_allclose(model(IDS), by_hand(model)(IDS), **CLOSE)
    graphdef, state = nnx.split(model)
    jitted = jax.jit(lambda state: nnx.merge(graphdef, state)(IDS))(state)
    np.testing.assert_allclose(jitted, model(IDS), **CLOSE)


def test_axes_and_report():
    model = quantized()
    q = {path: variable.q for path, variable in weights(model).items()}
    assert q["layers/0/attn/qkv/w"].contract_axes == (2,)
    assert q["layers/0/attn/o_proj/w"].contract_axes == (0, 1)
    for path in DECODED:
        assert (q[path].batch_shape, q[path].contract_axes) == ((EXPERTS,), (0,))
    report = qjax.report(model, IDS)
    assert {row.path for row in report.rows if row.uses == ("einsum: xla",)} == FUSED
    for path in DECODED:
        assert report[path].uses == ("decode: whole weight",)
        assert report[path].note.startswith("decoded at each use")
    assert report["layers/0/moe/router/kernel"].note == "routers are kept by default"
    assert report["embedder/input_embedding"].note == "embeddings are kept by default"
    assert report["lm_head/w"].note == "the output head is kept by default"
    arrays = jax.tree.leaves(nnx.state(model))
    assert report.totals.nbytes == sum(array.nbytes for array in arrays)


def test_tables_and_heads_if_asked():
    model = quantized(qjax.QuantConfig(block_size=32, include=".*", compute_dtype=jnp.float32))
    assert {"embedder/input_embedding", "lm_head/w"} < set(weights(model))
    assert "layers/0/attn/q_bias" not in weights(model)  # a vector for each head
    np.testing.assert_allclose(model(IDS), by_hand(model)(IDS), **CLOSE)
    assert qjax.report(model, IDS)["embedder/input_embedding"].uses == ("take: rows decoded",)
    table = model.embedder.input_embedding
    ids = jnp.array([0, -1, VOCAB + 7, -VOCAB - 7])  # array indexing takes the nearest row
    np.testing.assert_array_equal(table[ids], table.q.dequantize()[ids])


def test_bfloat16_compute_dtype_gives_the_dtype_of_the_float_model():
    model = quantized(qjax.QuantConfig(block_size=32))
    assert model(IDS).dtype == jnp.float32
    assert model.layers[0].attn.qkv(jnp.ones((1, 2, DIM), jnp.bfloat16)).dtype == jnp.float32
    want = np.asarray(by_hand(model)(IDS))
    # bfloat16 has 8 bits: an error of 2^-8 in each of the products, of results below 5.
    np.testing.assert_allclose(model(IDS), want, atol=0.1)


class Stack(nnx.Module):
    """Two blocks made by nnx.vmap, run by nnx.scan, with remat."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return nnx.Dict(up=Einsum("bd,dnh->bnh", (DIM, HEADS, HEAD_DIM), rngs), down=Raw(rngs))

        self.layers = make(rngs)

    def __call__(self, x):
        def step(layer, x):
            return x + layer["down"](layer["up"](x))

        return nnx.scan(nnx.remat(step), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


class Raw(nnx.Module):
    """A parameter whose use nothing tells but its shape, and a vector for each layer."""

    def __init__(self, rngs):
        self.matrix = nnx.Param(0.1 * rngs.normal((HEADS, HEAD_DIM, DIM)))
        self.shift = nnx.Param(jnp.zeros(DIM))

    def __call__(self, x):
        return jnp.tensordot(x, self.matrix[...], 2) + self.shift[...]


def test_stacked_layers():
    model, plain = Stack(nnx.Rngs(0)), Stack(nnx.Rngs(0))
    with pytest.warns(UserWarning, match="layers/down/matrix"):
        qjax.quantize_model(model, F32)
    assert set(weights(model)) == {"layers/up/w", "layers/down/matrix"}
    up, down = (weights(model)[f"layers/{name}"].q for name in ("up/w", "down/matrix"))
    assert up.batch_shape == down.batch_shape == (2,)
    plain.layers["up"].w.set_value(up.dequantize())
    plain.layers["down"].matrix.set_value(down.dequantize())
    x = jnp.ones((3, DIM))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), plain(x), **CLOSE)
    qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(1))
    assert model.layers["up"].w_lora_a.shape == (2, DIM, 4)
    assert model.layers["down"].matrix_lora_b.shape[:2] == (2, 4)

    @nnx.jit
    def gradients(model):
        loss = lambda model: (model(x) ** 2).sum()  # noqa: E731
        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)

    for path, gradient in nnx.to_flat_state(gradients(model)):
        if path[-1].endswith("_b"):  # that of A is zero as long as B is
            assert np.all(np.abs(gradient[...]).max(axis=tuple(range(1, gradient.ndim))) > 0)


class Tanh(nnx.Module):
    """Looks like an einsum module, and does more."""

    def __init__(self, rngs):
        self.einsum_str = "bd,df->bf"
        self.w = nnx.Param(rngs.normal((64, 40)))

    def __call__(self, x):
        return jnp.tanh(jnp.einsum(self.einsum_str, x, self.w[...]))


class Halved(Tanh):
    def __call__(self, x):
        return 0.5 * jnp.einsum(self.einsum_str, x, self.w[...])


class Transposed(Tanh):
    def __call__(self, x):
        return jnp.einsum("bf,df->bd", x, self.w[...])


class Rounded(Tanh):
    """Its result has not the dtype that it says."""

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...]).astype(jnp.bfloat16)


@pytest.mark.parametrize("cls", [Tanh, Halved, Transposed, Rounded])
def test_what_is_not_one_einsum_is_decoded(cls):
    layer = cls(nnx.Rngs(0))
    with pytest.warns(UserWarning, match="each call: w;"):
        qjax.quantize_model(layer, F32)
    assert type(layer) is cls
    x, plain = jnp.ones((2, 40 if cls is Transposed else 64)), cls(nnx.Rngs(0))
    plain.w.set_value(layer.w.q.dequantize())
    np.testing.assert_array_equal(layer(x), plain(x))


class RoutedMoE(nnx.Module):
    """Experts by the name of their class alone."""

    def __init__(self, rngs):
        self.wi, self.wo = (
            nnx.Param(rngs.params.normal(shape)) for shape in [(4, 64, 128), (4, 128, 64)]
        )


def test_the_name_of_a_class_tells_experts():
    model = nnx.Dict(layer=RoutedMoE(nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="decode their whole 4-bit weight"):
        qjax.quantize_model(model)
    model = qjax.add_lora(model, qjax.LoraConfig(rank=2), rngs=nnx.Rngs(1))
    for weight, adapter in [("wi", (4, 64, 2)), ("wo", (4, 128, 2))]:
        q = vars(model.layer)[weight].q
        assert (q.batch_shape, q.contract_axes) == ((4,), (0,))
        assert getattr(model.layer, f"{weight}_lora_a").shape == adapter


class Containers(nnx.Module):
    """Raw parameters in Flax's own containers."""

    def __init__(self, rngs):
        def weight():
            return nnx.Param(rngs.params.normal((64, 64)) / 8)

        self.layers = nnx.List([weight() for _ in range(11)])
        self.by_name = nnx.Dict(out=weight(), bias=nnx.Param(jnp.zeros((64,))))
        self.tables = nnx.List([weight()])

    def __call__(self, x):
        for w in self.layers:
            x = jnp.tanh(x @ w[...])
        return x @ self.by_name["out"] + self.by_name.bias + self.tables[0][jnp.array([3])]


def test_parameters_in_lists_and_dicts(tmp_path):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64)), jnp.float32)
    model = Containers(nnx.Rngs(0))
    with pytest.warns(UserWarning, match="decode their whole 4-bit weight"):
        model = qjax.quantize_model(model, F32)
    notes = {row.path: row for row in qjax.report(model).rows}
    quantized = {path for path, row in notes.items() if row.format == "nf4"}
    assert quantized == {*(f"layers/{i}" for i in range(11)), "by_name/out"}
    y = model(x)
    np.testing.assert_allclose(y, qjax.dequantize_model(nnx.clone(model))(x), rtol=1e-6, atol=1e-6)
    model = qjax.add_lora(model, qjax.LoraConfig(rank=2), rngs=nnx.Rngs(1))
    assert set(model.by_name) == {"out", "bias"} and len(model.layers) == 11
    np.testing.assert_array_equal(model(x), y)  # B is zero

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean(), argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.LoRAParam)
    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[2] < losses[0]
    qjax.save(tmp_path / "model", model)
    np.testing.assert_array_equal(qjax.load(tmp_path / "model", like=model)(x), model(x))
    merged = qjax.merge_lora(model, dtype=jnp.float32)
    assert type(merged.layers) is nnx.List and type(merged.by_name) is nnx.Dict
