"""The NNX layers against float64 einsums of their decoded weights, and under NNX's transforms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nn.lora import LoraConfig
from qjax.nnx import QuantConv, QuantEinsum, QuantEmbed, QuantLinear, QuantLinearGeneral, QuantParam

F32 = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)
BF16 = qjax.QuantConfig(block_size=32)
LORA = LoraConfig(rank=4, alpha=12)


class Case(NamedTuple):
    make: type
    args: tuple
    kwargs: dict
    x_shape: tuple[int, ...]
    equation: str  # x, weight -> y
    adapter: str  # A, B -> weight
    weight: str = "kernel"
    call: str = "__call__"


CASES = {
    "linear": Case(QuantLinear, (64, 8), {}, (2, 3, 64), "btk,kn->btn", "kr,rn->kn"),
    "general": Case(
        QuantLinearGeneral,
        ((4, 16), (2, 3)),
        {"axis": (-2, -1)},
        (2, 5, 4, 16),
        "btij,ijno->btno",
        "ijr,rno->ijno",
    ),
    "general_first_axis": Case(
        QuantLinearGeneral, (64, 8), {"axis": 1}, (2, 64, 3), "bkt,kn->btn", "kr,rn->kn"
    ),
    "general_batch": Case(
        QuantLinearGeneral,
        (64, 8),
        {"batch_axis": {0: 3}},
        (3, 2, 64),
        "ebk,ekn->ebn",
        "ekr,ern->ekn",
    ),
    "einsum": Case(
        QuantEinsum,
        ("btd,dnh->btnh", (64, 2, 3), (2, 3)),
        {},
        (2, 5, 64),
        "btd,dnh->btnh",
        "dr,rnh->dnh",
    ),
    "einsum_middle": Case(
        QuantEinsum,
        ("...d,ndh->n...h", (2, 64, 3), (2, 3)),
        {},
        (5, 64),
        "td,ndh->nth",
        "dr,rnh->ndh",
    ),
    "conv": Case(
        QuantConv,
        (64, 8, (1, 1)),
        {},
        (2, 3, 4, 64),
        "bhwk,ijkn->bhwn",
        "ijkr,rn->ijkn",
    ),
    "einsum_experts": Case(
        QuantEinsum,
        ("ebd,edf->ebf", (3, 64, 8)),
        {},
        (3, 2, 64),
        "ebd,edf->ebf",
        "edr,erf->edf",
    ),
    "embed_attend": Case(
        QuantEmbed, (10, 64), {}, (2, 64), "bd,vd->bv", "dr,rv->vd", "embedding", "attend"
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def build(case: Case, config=F32, **kwargs):
    layer = case.make(*case.args, **case.kwargs, config=config, rngs=nnx.Rngs(0), **kwargs)
    if getattr(layer, "bias", None) is not None:
        layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape)
    if layer.lora_b is not None:
        layer.lora_b[...] = jax.random.normal(jax.random.key(2), layer.lora_b.shape)
    return layer


def inputs(case: Case, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(3), case.x_shape, dtype)


def call(layer, case, x):
    return getattr(layer, case.call)(x)


def oracle(layer, case, x):
    """float64: x W + bias + scaling * x (A B)."""
    w = np.asarray(getattr(layer, case.weight).q.dequantize(jnp.float32), np.float64)
    if layer.lora_a is not None:
        a, b = np.asarray(layer.lora_a[...], np.float64), np.asarray(layer.lora_b[...], np.float64)
        w = w + layer.lora_config.scaling * np.einsum(case.adapter, a, b)
    y = np.einsum(case.equation, np.asarray(x, np.float64), w)
    bias = getattr(layer, "bias", None)
    if bias is None:
        return y
    bias = np.asarray(bias[...], np.float64)
    if case.kwargs.get("batch_axis") or case.equation.endswith("nth"):
        bias = bias[:, None]
    return y + bias


def test_matches_float64(case):
    layer = build(case)
    y = call(layer, case, inputs(case))
    # K = 64 products accumulated in float32: an error of some 64 * 2**-24 of values near 1.
    np.testing.assert_allclose(y, oracle(layer, case, inputs(case)), rtol=1e-5, atol=1e-5)
    assert y.dtype == jnp.float32


def test_adapter_matches_float64(case):
    layer = build(case, lora=LORA)
    y = call(layer, case, inputs(case))
    # As above; the adapter adds values of some 20.
    np.testing.assert_allclose(y, oracle(layer, case, inputs(case)), rtol=1e-4, atol=1e-4)


def test_same_structure_as_flax(case):
    """The paths, shapes and attributes are those of Flax's layer."""
    layer = build(case)
    plain = layer.float_class(*case.args, **case.kwargs, rngs=nnx.Rngs(0))
    shapes = lambda m: {  # noqa: E731
        path: tuple(leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(m))
    }
    assert shapes(layer) == shapes(plain)
    assert set(vars(plain)) <= set(vars(layer))
    weight = getattr(layer, case.weight)
    assert type(weight) is QuantParam
    assert not isinstance(weight, nnx.Param)
    w = getattr(plain, case.weight)[...]
    # NF4 steps are at most 0.28 of a block's absmax, so no value is off by more than half that.
    assert jnp.abs(weight[...] - w).max() <= 0.15 * jnp.abs(w).max()


def test_from_float_copies(case):
    plain = case.make.float_class(*case.args, **case.kwargs, rngs=nnx.Rngs(0))
    layer = case.make.from_float(plain, F32)
    assert type(plain) is case.make.float_class
    assert isinstance(getattr(plain, case.weight), nnx.Param)
    y = call(layer, case, inputs(case))
    np.testing.assert_allclose(y, oracle(layer, case, inputs(case)), rtol=1e-5, atol=1e-5)


def test_compute_dtype_leaves_the_result_dtype(case):
    """Products in bfloat16; the result is what Flax's own promotion gives."""
    layer = build(case, BF16, lora=LORA)
    x = inputs(case)
    y = call(layer, case, x)
    assert y.dtype == jnp.float32
    # Three roundings to bfloat16 (2**-9 each) of inputs, weights and the adapter's hidden values,
    # averaged over sums of 64: within 2 % of the largest value.
    want = oracle(layer, case, x)
    assert np.abs(np.asarray(y) - want).max() < 0.02 * np.abs(want).max()
    narrow = build(case, BF16, dtype=jnp.bfloat16)
    assert call(narrow, case, inputs(case, jnp.bfloat16)).dtype == jnp.bfloat16


def test_split_jit_and_gradients(case):
    layer = build(case, lora=LORA)
    x = inputs(case)
    graphdef, lora, rest = nnx.split(layer, nnx.LoRAParam, ...)

    @jax.jit
    def loss(lora, x):
        return (call(nnx.merge(graphdef, lora, rest), case, x) ** 2).sum()

    grads, dx = jax.grad(loss, argnums=(0, 1))(lora, x)
    # Against the decoded weight, by JAX's own rules.
    w = getattr(layer, case.weight).q.dequantize()

    def plain(lora, x):
        a, b = lora["lora_a"][...], lora["lora_b"][...]
        y = jnp.einsum(case.equation, x, w + LORA.scaling * jnp.einsum(case.adapter, a, b))
        bias = getattr(layer, "bias", None)
        if bias is not None:
            shape = bias.shape
            if case.kwargs.get("batch_axis") or case.equation.endswith("nth"):
                shape = (shape[0], 1, *shape[1:])
            y = y + bias[...].reshape((1,) * (y.ndim - len(shape)) + shape)
        return (y**2).sum()

    want, want_x = jax.grad(plain, argnums=(0, 1))(lora, x)
    for got, expected in zip(
        jax.tree.leaves((grads, dx)), jax.tree.leaves((want, want_x)), strict=True
    ):
        # float32 sums of some 64 terms in another order.
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_eval_shape(case):
    abstract = nnx.eval_shape(lambda: build(case, lora=LORA))
    q = getattr(abstract, case.weight).q
    assert isinstance(q, qjax.QTensor)
    assert isinstance(q.packed, jax.ShapeDtypeStruct)
    assert q.shape == getattr(build(case), case.weight).shape


class TestEmbed:
    def layer(self, **kwargs):
        return build(CASES["embed_attend"], **kwargs)

    def test_lookup_with_adapter(self):
        layer = self.layer(lora=LORA)
        ids = jnp.array([[1, 9], [0, -1]])
        w = np.asarray(layer.embedding.q.dequantize(), np.float64)
        a, b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
        w = w + LORA.scaling * np.einsum("dr,rv->vd", a, b)
        np.testing.assert_allclose(layer(ids), w[np.asarray(ids)], rtol=1e-5, atol=1e-5)

    def test_one_row_is_broadcast(self):
        layer = QuantEmbed(1, 64, config=F32, rngs=nnx.Rngs(0))
        plain = nnx.Embed(1, 64, rngs=nnx.Rngs(0))
        ids = jnp.array([0, 3])
        assert layer(ids).shape == plain(ids).shape
        np.testing.assert_array_equal(layer(ids)[0], layer(ids)[1])

    def test_out_of_range_is_nan_as_in_flax(self):
        assert jnp.isnan(self.layer()(jnp.array([10]))).all()

    def test_refuses_float_inputs(self):
        with pytest.raises(ValueError, match="inputs must be integers, got float32"):
            self.layer()(jnp.ones(3))


class TestTransforms:
    def stack(self, lora=None, n=3):
        @nnx.split_rngs(splits=n)
        @nnx.vmap
        def make(rngs):
            return QuantLinear(32, 32, config=F32, lora=lora, rngs=rngs)

        layer = make(nnx.Rngs(0, dropout=1))
        if lora is not None:
            layer.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(5), layer.lora_b.shape)
        return layer

    @pytest.mark.parametrize("remat", [False, True])
    def test_scan_over_layers(self, remat):
        stacked = self.stack(LORA)
        assert stacked.kernel.q.shape == (3, 32, 32)
        assert stacked.lora_a.shape == (3, 32, 4)
        apply = nnx.remat(lambda layer, x: layer(x)) if remat else (lambda layer, x: layer(x))

        @nnx.jit
        def forward(stacked, x):
            return nnx.scan(apply, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(stacked, x)

        x = jax.random.normal(jax.random.key(0), (2, 32))
        y = forward(stacked, x)
        want = np.asarray(x, np.float64)
        w = np.asarray(stacked.kernel.q.dequantize(), np.float64)
        a, b = np.asarray(stacked.lora_a[...]), np.asarray(stacked.lora_b[...])
        for i in range(3):
            want = want @ (w[i] + LORA.scaling * a[i] @ b[i])
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)

    def test_vmap_over_stacked_layers(self):
        stacked = self.stack()
        x = jax.random.normal(jax.random.key(0), (3, 2, 32))
        y = nnx.vmap(lambda layer, x: layer(x))(stacked, x)
        want = np.einsum("lbk,lkn->lbn", x, stacked.kernel.q.dequantize())
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)

    def test_dropout_in_a_scan(self):
        stacked = self.stack(LoraConfig(rank=4, alpha=12, dropout=0.5))
        run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        x = jnp.ones((2, 32))
        assert not jnp.array_equal(run(stacked, x), run(stacked, x))


class TestDropout:
    def layer(self):
        return build(CASES["linear"], lora=LoraConfig(rank=4, alpha=12, dropout=0.5))

    def test_train_and_eval_modes(self):
        layer, x = self.layer(), jnp.ones((2, 64))
        assert not jnp.array_equal(layer(x), layer(x))
        layer.eval()
        np.testing.assert_array_equal(layer(x), layer(x))
        # As test_adapter_matches_float64.
        np.testing.assert_allclose(
            layer(x), oracle(layer, CASES["linear"], x[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
        layer.train()
        assert not jnp.array_equal(layer(x), layer(x))

    def test_view(self):
        layer, x = self.layer(), jnp.ones((2, 64))
        view = nnx.view(layer, deterministic=True)
        np.testing.assert_array_equal(view(x), view(x))
        assert not jnp.array_equal(layer(x), layer(x))

    def test_acts_on_the_adapter_alone(self):
        layer, x = self.layer(), jnp.ones((2, 64))
        layer.lora_b[...] = jnp.zeros_like(layer.lora_b)
        np.testing.assert_array_equal(layer(x), layer(x))

    def test_mean_is_kept(self):
        layer = self.layer()
        x = jnp.ones((4000, 64))
        mean = np.asarray(layer(x)).mean(0)
        layer.eval()
        want = np.asarray(layer(x[:1]))[0]
        # 4000 samples of values with a deviation near 15: a mean within 5 * 15 / sqrt(4000).
        np.testing.assert_allclose(mean, want, atol=1.2)


class TestQuantParam:
    def test_foreign_code_sees_the_decoded_array(self):
        kernel = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0)).kernel
        w, x = kernel.q.dequantize(), jnp.ones((2, 64))
        assert kernel.shape == (64, 8)
        assert kernel.dtype == jnp.float32
        for got, want in [
            (kernel[...], w),
            (kernel[3], w[3]),
            (x @ kernel, x @ w),
            (kernel.T @ x.T, w.T @ x.T),
            (jnp.dot(x, kernel), x @ w),
            (kernel * 2.0, w * 2.0),
            (kernel.astype(jnp.bfloat16), w.astype(jnp.bfloat16)),
        ]:
            np.testing.assert_allclose(got, want, rtol=1e-5)  # sums of 64 in any order
        with pytest.warns(DeprecationWarning, match=r"\.value"):
            np.testing.assert_array_equal(kernel.value, w)

    def test_states_hold_the_qtensor(self):
        layer = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0))
        pure = nnx.to_pure_dict(nnx.state(layer))
        assert isinstance(pure["kernel"], qjax.QTensor)
        assert nnx.state(layer, nnx.Param).keys() == {"bias"}

    def test_pure_dict_round_trip(self):
        layer = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(1)))
        nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(layer)))
        np.testing.assert_array_equal(nnx.merge(graphdef, state).kernel[...], layer.kernel[...])

    def test_refuses_item_assignment(self):
        layer = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match="cannot be assigned to by index"):
            layer.kernel[...] = jnp.ones((64, 8))

    def test_update_and_clone(self):
        layer = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0))
        other = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(1))
        nnx.update(layer, nnx.state(other))
        np.testing.assert_array_equal(layer.kernel.q.packed, other.kernel.q.packed)
        np.testing.assert_array_equal(nnx.clone(layer).kernel[...], other.kernel[...])


class TestRefusals:
    def test_own_product(self):
        with pytest.raises(ValueError, match="QuantLinear has its own product and takes no dot_g"):
            QuantLinear(64, 8, dot_general=jax.lax.dot_general, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="takes no einsum_op"):
            QuantEinsum("bk,kn->bn", (64, 8), einsum_op=jnp.einsum, rngs=nnx.Rngs(0))

    def test_equation_without_a_sum(self):
        with pytest.raises(ValueError, match="sums over no axis of the kernel"):
            QuantEinsum("bk,kn->bkn", (64, 8), rngs=nnx.Rngs(0))

    def test_wrong_class(self):
        with pytest.raises(TypeError, match=r"needs an nnx\.Linear, got Embed"):
            QuantLinear.from_float(nnx.Embed(4, 64, rngs=nnx.Rngs(0)))

    def test_not_finite_names_the_weight(self):
        layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        layer.kernel[...] = jnp.full((64, 8), jnp.nan)
        with pytest.raises(ValueError, match="decoder/out/kernel holds NaN or inf"):
            QuantLinear.from_float(layer, name="decoder/out/kernel")

    def test_transposed_stack(self):
        layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        layer.kernel = nnx.Param(jnp.ones((64, 3, 8)))
        with pytest.raises(ValueError, match=r"shape \(64, 3, 8\) is not \[64, 8\] behind stacked"):
            QuantLinear.from_float(layer)

    def test_general_with_wrong_axes(self):
        layer = QuantLinearGeneral((4, 16), 8, axis=(-2, -1), config=F32, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"must be in_features=\(4, 16\)"):
            layer(jnp.ones((2, 16, 4)))
