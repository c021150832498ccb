"""NNX models of other libraries: raw parameters, einsum modules, experts, tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
import qjax.nnx
from qjax.nn.registry import Entry, entries_of
from tests.swap.foreign_models import (
    DIM,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    VOCAB,
    Einsum,
    Embedder,
    Experts,
    Model,
)

F32 = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)
IDS = np.arange(6).reshape(2, 3)
FUSED = {"layers/0/attn/qkv/w", "layers/0/attn/o_proj/w"}
DECODED = {"layers/0/moe/up", "layers/0/moe/down"}
WARNING = r"decode their whole 4-bit weight at each call: layers/0/moe/down, layers/0/moe/up; "
# float32 sums in another order, of numbers around 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def quantized(cfg=F32, warning=WARNING):
    with pytest.warns(UserWarning, match=warning):
        return qjax.quantize_model(Model(nnx.Rngs(0)), cfg)


def weights(model):
    return {
        "/".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, qjax.nnx.QuantParam))
    }


def by_hand(model):
    """The float model, which knows nothing of qjax, with the weights of `model` decoded."""
    plain = Model(nnx.Rngs(0))
    floats = {"/".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(plain))}
    for path, variable in weights(model).items():
        floats[path].set_value(variable.q.dequantize())
    return plain


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


class TestLora:
    def model(self, cfg=None):
        cfg = cfg or qjax.LoraConfig(rank=4, alpha=8)
        return qjax.add_lora(quantized(), cfg, rngs=nnx.Rngs(1))

    def test_shapes(self):
        model = self.model()
        attn, moe = model.layers[0].attn, model.layers[0].moe
        assert attn.qkv.w_lora_a.shape == (DIM, 4)
        assert attn.qkv.w_lora_b.shape == (4, 3, HEADS, HEAD_DIM)
        assert attn.o_proj.w_lora_a.shape == (HEADS, HEAD_DIM, 4)
        assert moe.up_lora_a.shape == (EXPERTS, DIM, 4)
        assert moe.up_lora_b.shape == (EXPERTS, 4, HIDDEN)
        np.testing.assert_allclose(model(IDS), quantized()(IDS), **CLOSE)  # B is zero

    def test_twenty_steps_and_back(self, mode, tmp_path):
        model = self.model()
        frozen = {path: np.asarray(v.q.packed) for path, v in weights(model).items()}
        graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
        tx = optax.adamw(1e-2)
        state = tx.init(lora)

        @jax.jit
        def step(lora, state):
            def loss_fn(lora):
                logits = nnx.merge(graphdef, lora, rest)(IDS)
                return -jax.nn.log_softmax(logits)[..., 7].mean()

            loss, grads = jax.value_and_grad(loss_fn)(lora)
            updates, state = tx.update(grads, state, lora)
            return optax.apply_updates(lora, updates), state, loss

        losses = []
        for _ in range(20):
            lora, state, loss = step(lora, state)
            losses.append(float(loss))
        assert losses[-1] < 0.5 * losses[0]
        model = nnx.merge(graphdef, lora, rest)
        assert all(np.any(v[...] != 0) for _, v in nnx.to_flat_state(lora))
        for path, variable in weights(model).items():
            np.testing.assert_array_equal(variable.q.packed, frozen[path])

        trained = model(IDS)
        merged = qjax.merge_lora(model, jnp.float32)
        assert type(merged.layers[0].attn.qkv) is Einsum
        assert not nnx.to_flat_state(nnx.state(merged, nnx.LoRAParam))
        # x (W + A B) against x W + (x A) B, after 20 steps of a large rate.
        np.testing.assert_allclose(merged(IDS), trained, rtol=1e-3, atol=1e-3)
        kept = qjax.dequantize_model(model)
        np.testing.assert_allclose(kept(IDS), trained, rtol=1e-3, atol=1e-3)

        qjax.save(tmp_path / "model", model)
        again = qjax.load(tmp_path / "model", like=self.model())
        np.testing.assert_array_equal(again(IDS), trained)
        qjax.save(tmp_path / "adapters", model, only="adapters")
        again = qjax.load(tmp_path / "adapters", like=self.model())
        np.testing.assert_array_equal(again(IDS), trained)
        other = self.model(qjax.LoraConfig(rank=4, alpha=9))
        with pytest.raises(ValueError, match=r"o_proj/w: expected scaling=2\.25, found 2"):
            qjax.load(tmp_path / "adapters", like=other)

    def test_nnx_update_reaches_weights_with_adapters(self):
        model, other = self.model(), Model(nnx.Rngs(5))
        with pytest.warns(UserWarning, match=WARNING):
            qjax.quantize_model(other, F32)
        variable = vars(model.layers[0].moe)["up"]
        nnx.update(model, nnx.state(other, qjax.nnx.QuantParam))
        assert vars(model.layers[0].moe)["up"] is variable
        np.testing.assert_array_equal(variable.q.packed, weights(other)["layers/0/moe/up"].q.packed)

    def test_patterns(self):
        model = self.model(qjax.LoraConfig(rank=4, include=["qkv$", "moe/up$"]))
        adapters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        assert {path[-1] for path, _ in adapters} == {
            *("w_lora_a", "w_lora_b", "up_lora_a", "up_lora_b")
        }
        model = qjax.add_lora(
            model, qjax.LoraConfig(rank=2, include="lm_head"), rngs=nnx.Rngs(1)
        )  # a float one
        assert model.lm_head.w_lora_a.shape == (DIM, 2)
        before = model(IDS)
        model.lm_head.w_lora_b[...] = jnp.ones((2, VOCAB))
        merged = qjax.merge_lora(model, jnp.float32)
        assert np.abs(model(IDS) - before).max() > 0.1
        np.testing.assert_allclose(merged(IDS), model(IDS), rtol=1e-3, atol=1e-3)

    def test_dropout(self):
        message = "layers/0/moe/down is decoded at each use, where its adapter can have no dropout"
        with pytest.raises(ValueError, match=message):
            self.model(qjax.LoraConfig(rank=4, dropout=0.5))
        model = self.model(qjax.LoraConfig(rank=4, dropout=0.5, exclude="moe"))
        qkv, x = model.layers[0].attn.qkv, jnp.ones((1, 2, DIM))
        qkv.w_lora_b[...] = jnp.ones(qkv.w_lora_b.shape)
        assert np.abs(qkv(x) - qkv(x)).max() > 0
        model = nnx.view(model, deterministic=True)
        qkv = model.layers[0].attn.qkv
        np.testing.assert_array_equal(qkv(x), qkv(x))

    def test_refusals(self):
        with pytest.raises(ValueError, match="layers/0/attn/qkv/w has an adapter already"):
            qjax.add_lora(self.model(), qjax.LoraConfig(include="qkv"), rngs=nnx.Rngs(0))


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


def test_rows_of_a_table_with_an_adapter():
    model = Embedder(nnx.Rngs(0))
    qjax.quantize_model(model, qjax.QuantConfig(include="embedding"))
    qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(1))
    model.input_embedding_lora_b[...] = jnp.ones((4, VOCAB))
    merged = qjax.merge_lora(model, jnp.float32)
    ids, x = jnp.array([[0, -1], [VOCAB + 7, 3]]), jnp.ones((1, 2, DIM))
    # float32 sums in another order.
    np.testing.assert_allclose(model.encode(ids), merged.encode(ids), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.decode(x), merged.decode(x), rtol=1e-4, atol=1e-4)


class Project(nnx.Module):
    def __init__(self, rngs):
        self.matrix = nnx.Param(rngs.normal((64, 40)))

    def __call__(self, x, double=False):
        return (2 if double else 1) * (x @ self.matrix[...])


class TestRegister:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        monkeypatch.setattr("qjax.nn.registry._entries", {})

    def test_calls(self):
        def call(module, weight, x, double=False):
            return (2 if double else 1) * weight.einsum("...d,df->...f", x)

        qjax.register(Project, "matrix", equation="...d,df->...f", calls={"__call__": call})
        model = qjax.quantize_model(Project(nnx.Rngs(0)), F32)
        x = jnp.ones((2, 3, 64))
        want = 2 * (x @ model.matrix.q.dequantize())
        np.testing.assert_allclose(model(x, double=True), want, rtol=1e-5, atol=1e-5)
        assert qjax.report(model, x)["matrix"].uses == ("einsum: xla",)

        class Child(Project):
            def __call__(self, x):
                return -super().__call__(x)

        with pytest.warns(UserWarning, match="each call: matrix;"):  # its call is another one
            child = qjax.quantize_model(Child(nnx.Rngs(0)), F32)
        np.testing.assert_allclose(child(x), -want / 2, rtol=1e-5, atol=1e-5)

    def test_two_weights_in_one_method(self):
        def run(module, up, x):
            tokens = x.reshape(-1, DIM)
            chosen = module.router(tokens).argmax(-1)
            hidden = up.einsum("nd,edf->nef", tokens)
            hidden = jax.nn.silu(jnp.take_along_axis(hidden, chosen[:, None, None], 1)[:, 0])
            order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=EXPERTS)
            out = up.beside("down").ragged_dot(hidden[order], sizes)
            scale = module.per_expert_scale[chosen][:, None]
            return (out[jnp.argsort(order)] * scale).reshape(x.shape)

        axes = {"contract_axes": (0,), "batch_ndim": 1}
        qjax.register(Experts, "up", **axes, calls={"__call__": run})
        qjax.register(Experts, "down", **axes)
        model = qjax.quantize_model(Model(nnx.Rngs(0)), F32)  # and no warning
        np.testing.assert_allclose(model(IDS), by_hand(model)(IDS), **CLOSE)
        report = qjax.report(model, IDS)
        assert report["layers/0/moe/up"].uses == ("einsum: xla",)
        assert report["layers/0/moe/down"].uses[0].startswith("ragged_dot: decoded inside")
        cfg = qjax.LoraConfig(rank=4, include="moe", dropout=0.1)  # allowed: the products are known
        model = nnx.view(qjax.add_lora(model, cfg, rngs=nnx.Rngs(1)), deterministic=True)
        for name in ("up_lora_b", "down_lora_b"):
            b = vars(model.layers[0].moe)[name]
            b.set_value(0.1 * jax.random.normal(jax.random.key(0), b.shape))
        merged = qjax.merge_lora(model, jnp.float32)
        np.testing.assert_allclose(model(IDS), merged(IDS), rtol=1e-3, atol=1e-3)

    def test_axes_alone(self):
        qjax.register(Project, "matrix", contract_axes=(1,))
        with pytest.warns(UserWarning, match="each call: matrix;"):
            model = qjax.quantize_model(Project(nnx.Rngs(0)), qjax.QuantConfig(block_size=32))
        assert model.matrix.q.contract_axes == (1,)

    def test_table(self):
        calls = {"__call__": lambda module, weight, ids: weight.take(ids)}
        qjax.register(Project, "matrix", role="embedding", calls=calls)
        kept = qjax.quantize_model(Project(nnx.Rngs(0)))
        assert isinstance(kept.matrix, nnx.Param)
        model = qjax.quantize_model(Project(nnx.Rngs(0)), qjax.QuantConfig(include="matrix"))
        rows = model.matrix.q.dequantize()[:2]
        np.testing.assert_array_equal(model(jnp.arange(2)), rows)
        qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(0))
        model.matrix_lora_b[...] = jnp.ones((4, 64))
        want = qjax.merge_lora(model, jnp.float32).matrix[...][:2]
        np.testing.assert_allclose(model(jnp.arange(2)), want, rtol=1e-5, atol=1e-5)

    def test_a_subclass_goes_before_its_base(self):
        class Child(Project):
            pass

        qjax.register(Project, "matrix", contract_axes=(1,))
        qjax.register(Child, "matrix", contract_axes=(0,))
        assert [e.contract_axes for e in entries_of(Child)] == [(0,)]
        assert next(entries_of(Project)) == Entry(Project, "matrix", contract_axes=(1,))

    @pytest.mark.parametrize(
        "args, kwargs, error, message",
        [
            ((int, "w"), {}, TypeError, "cls must be a subclass of nnx.Module or nn.Mod"),
            ((Project, "w"), {}, ValueError, r"Project.w needs equation= or contract_axes="),
            ((Project, "w"), {"role": "table"}, ValueError, "role must be one of .*, got 'table'"),
            (
                (Project, "w"),
                {"equation": "a,ab->b", "contract_axes": (0,)},
                ValueError,
                "give equation= or contract_axes=, not both",
            ),
            (
                (Project, "w"),
                {"contract_axes": (0,), "calls": {"encode": print}},
                ValueError,
                "Project has no method 'encode'",
            ),
        ],
    )
    def test_errors(self, args, kwargs, error, message):
        with pytest.raises(error, match=message):
            qjax.register(*args, **kwargs)

    def test_an_equation_that_does_not_fit(self):
        qjax.register(Project, "matrix", equation="bd,def->bf")
        with pytest.raises(ValueError, match=r"does not fit a weight of shape \(64, 40\)"):
            qjax.quantize_model(Project(nnx.Rngs(0)))


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
