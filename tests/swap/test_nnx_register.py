"""register: how a class of another library contracts its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nn.registry import Entry, entries_of
from tests.swap.nnx_foreign_models import CLOSE, DIM, EXPERTS, F32, IDS, Experts, Model, by_hand


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
        # Sums of 4 float32 products and one more, in another order.
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
