"""Linen's QuantDense, QuantDenseGeneral, QuantEinsum and QuantEmbed against Flax's own layers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

import qjax
from qjax.linen import QuantDense, QuantDenseGeneral, QuantEinsum, QuantEmbed

# Plain scales: their decode compiles in a fraction of the time, and the layers do not look at them.
CFG = qjax.QuantConfig(block_size=32, double_quant=False, compute_dtype=jnp.float32)
LORA = qjax.LoraConfig(rank=4, alpha=8)
# Both sides multiply the same decoded weight in float32: K up to 128 terms of size 1, results of
# size sqrt(K), so K * eps relative to the largest.
TOLERANCE = 128 * np.finfo(np.float32).eps

LAYERS = {
    "dense": (nn.Dense, QuantDense, {"features": 8}, (2, 3, 64)),
    "no bias": (nn.Dense, QuantDense, {"features": 8, "use_bias": False}, (64,)),
    "heads": (nn.DenseGeneral, QuantDenseGeneral, {"features": (2, 16)}, (2, 3, 64)),
    "merge heads": (
        nn.DenseGeneral,
        QuantDenseGeneral,
        {"features": 8, "axis": (-2, -1)},
        (2, 3, 4, 16),
    ),
    "batch dims": (
        nn.DenseGeneral,
        QuantDenseGeneral,
        {"features": (2, 4), "axis": (-1, 1), "batch_dims": (0,)},
        (3, 8, 5, 16),
    ),
    "flat": (nn.Dense, QuantDense, {"features": 6}, (2, 33)),
    "einsum": (
        nn.Einsum,
        QuantEinsum,
        {"shape": (64, 2, 16), "einsum_str": "...d,dnh->...nh"},
        (2, 3, 64),
    ),
    "experts": (
        nn.Einsum,
        QuantEinsum,
        {"shape": (3, 64, 8), "einsum_str": "ecd,edf->ecf", "use_bias": False},
        (3, 5, 64),
    ),
    "contract last": (
        nn.Einsum,
        QuantEinsum,
        {"shape": (8, 4, 16), "einsum_str": "btnh,dnh->btd", "bias_init": nn.initializers.ones},
        (2, 3, 4, 16),
    ),
}


def float_params(params):
    """The parameters with kernels decoded and adapters added, in numpy."""

    def decode(leaf):
        if not isinstance(leaf, qjax.linen.QuantBox):
            return leaf
        w = np.asarray(leaf.q.dequantize(), np.float64)
        if leaf.lora_a is not None:
            contract = leaf.q.contract_axes
            update = qjax.ops.lora.lora_weight(*leaf.adapter, contract, len(leaf.q.batch_shape))
            w = w + leaf.scaling * np.asarray(update)
        return jnp.asarray(w.astype(np.float32))

    is_box = lambda leaf: isinstance(leaf, qjax.linen.QuantBox)  # noqa: E731
    return jax.tree.map(decode, params, is_leaf=is_box)


def with_random_b(params, rng):
    def fill(box):
        if not isinstance(box, qjax.linen.QuantBox):
            return box
        b = jnp.asarray(rng.normal(size=box.lora_b.shape).astype(np.float32))
        return dataclasses.replace(box, lora_b=b)

    return jax.tree.map(fill, params, is_leaf=lambda leaf: isinstance(leaf, qjax.linen.QuantBox))


def assert_close(actual, expected):
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE * scale, rtol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_the_float_layer(name, rng, key):
    flax_class, quant_class, fields, shape = LAYERS[name]
    x = jnp.asarray(rng.normal(size=shape).astype(np.float32))
    layer = quant_class(**fields, config=CFG, lora=LORA)
    variables = with_random_b(layer.init(key, x), rng)
    expected = flax_class(**fields).apply(float_params(variables), x)
    y = layer.apply(variables, x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert_close(y, expected)
    # The float layer reads the same tree, by itself and with the fused ops routed in.
    assert_close(flax_class(**fields).apply(variables, x), expected)
    assert_close(qjax.apply(flax_class(**fields), variables, x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_init_is_that_of_the_float_layer_quantized(name, rng, key):
    flax_class, quant_class, fields, shape = LAYERS[name]
    x = jnp.asarray(rng.normal(size=shape).astype(np.float32))
    ours = quant_class(**fields, config=CFG).init(key, x)["params"]
    module = flax_class(**fields)
    params = module.init(key, x)["params"]
    theirs = qjax.quantize_params(params, CFG, module=module, example_args=(x,))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    lora = quant_class(**fields, config=CFG, lora=LORA).init(key, x)["params"]
    added = qjax.add_lora_params(theirs, LORA, key)
    assert jax.tree.structure(lora) == jax.tree.structure(added)
    assert jax.tree.map(jnp.shape, lora) == jax.tree.map(jnp.shape, added)


def test_einsum_takes_its_equation_at_the_call(rng, key):
    layer = QuantEinsum(shape=(2, 64, 8), config=CFG, use_bias=False)
    x = jnp.asarray(rng.normal(size=(3, 64)).astype(np.float32))
    variables = layer.init(key, x, "bd,ndh->bnh")
    y = layer.apply(variables, x, "bd,ndh->bnh")
    expected = jnp.einsum("bd,ndh->bnh", x, variables["params"]["kernel"].q.dequantize())
    assert_close(y, expected)
    with pytest.raises(ValueError, match="sum over an axis of the kernel"):
        layer.init(key, x, "bd,ndh->bdnh")


def test_an_equation_over_other_axes_decodes_and_says_so(rng, key):
    layer = QuantEinsum(shape=(64, 8), config=CFG, use_bias=False, name="other_axes")
    variables = layer.init(key, jnp.ones((3, 64)), "bd,dh->bh")
    x = jnp.asarray(rng.normal(size=(3, 8)).astype(np.float32))
    with pytest.warns(UserWarning, match=r"kernel is decoded .*does not sum over its axes \(0,\)"):
        y = layer.apply(variables, x, "bh,dh->bd")
    assert_close(y, x @ variables["params"]["kernel"].q.dequantize().T)


def test_embed(rng, key):
    layer = QuantEmbed(num_embeddings=10, features=64, config=CFG, lora=LORA)
    ids = jnp.array([[1, 9], [0, 1]])
    variables = with_random_b(layer.init(key, ids), rng)
    flax_layer, decoded = nn.Embed(num_embeddings=10, features=64), float_params(variables)
    x = jnp.asarray(rng.normal(size=(3, 64)).astype(np.float32))
    for module, run in [
        (layer, module_apply),
        (flax_layer, module_apply),
        (flax_layer, qjax.apply),
    ]:
        assert_close(run(module, variables, ids), flax_layer.apply(decoded, ids))
        y = run(module, variables, x, method="attend")
        assert_close(y, flax_layer.apply(decoded, x, method="attend"))
    same = qjax.quantize_params(
        flax_layer.init(key, ids)["params"], dataclasses.replace(CFG, include="embedding")
    )
    assert jax.tree.structure(same) == jax.tree.structure(
        QuantEmbed(num_embeddings=10, features=64, config=CFG).init(key, ids)["params"]
    )
    with pytest.raises(ValueError, match="must be integers, got float32"):
        layer.apply(variables, x)


def module_apply(module, *args, **kwargs):
    return module.apply(*args, **kwargs)


def test_one_row_is_broadcast_as_in_flax(key):
    layer = QuantEmbed(num_embeddings=1, features=64, config=CFG)
    variables = layer.init(key, jnp.array([0]))
    expected = nn.Embed(num_embeddings=1, features=64).apply(variables, jnp.array([7, 0]))
    np.testing.assert_array_equal(layer.apply(variables, jnp.array([7, 0])), expected)


def test_a_float_kernel_runs_as_in_flax(rng, key):
    x = jnp.asarray(rng.normal(size=(3, 64)).astype(np.float32))
    variables = nn.Dense(8).init(key, x)
    np.testing.assert_array_equal(
        QuantDense(8, config=CFG).apply(variables, x), nn.Dense(8).apply(variables, x)
    )


@pytest.mark.parametrize("dtype, compute", [(None, "bfloat16"), ("float16", "float16")])
def test_compute_and_result_dtypes(dtype, compute, rng, key, monkeypatch):
    """Without a dtype the product runs in the config's; the result has the dtype Flax gives."""
    seen = []
    original = qjax.nn.linen_routes.matmul
    monkeypatch.setattr(
        qjax.nn.linen_routes, "matmul", lambda x, q: seen.append(x.dtype) or original(x, q)
    )
    layer = QuantDense(8, dtype=dtype and jnp.dtype(dtype))
    x = jnp.ones((2, 64), jnp.float32)
    y = layer.apply(layer.init(key, x), x)
    assert y.dtype == (dtype or "float32") and set(seen) == {jnp.dtype(compute)}


def test_adapter_dropout_follows_the_rng(rng, key):
    lora = qjax.LoraConfig(rank=4, dropout=0.5)
    layer = QuantDense(8, config=CFG, lora=lora, use_bias=False)
    x = jnp.ones((2, 64))
    variables = with_random_b(layer.init(key, x), rng)
    kernel = variables["params"]["kernel"]
    plain = layer.apply(variables, x)
    assert_close(plain, nn.Dense(8, use_bias=False).apply(float_params(variables), x))
    rngs = {"dropout": jax.random.key(1)}
    dropped = layer.apply(variables, x, rngs=rngs)
    assert not np.allclose(dropped, plain)
    off = layer.clone(deterministic=True)
    np.testing.assert_array_equal(off.apply(variables, x, rngs=rngs), plain)
    with pytest.raises(errors.InvalidRngError, match="dropout"):
        layer.clone(deterministic=False).apply(variables, x)
    # The adapter's input is dropped and scaled up, the base's is not: the mean over many keys is
    # the plain result. 512 draws: 4 standard errors of the mean.
    keys = jax.random.split(jax.random.key(2), 512)
    ys = jax.vmap(lambda k: layer.apply(variables, x[:1], rngs={"dropout": k}))(keys)
    error = np.std(ys, axis=0) / np.sqrt(len(keys))
    assert np.all(np.abs(np.mean(ys, axis=0) - plain[:1]) < 4 * error + 1e-4)
    assert kernel.dropout == 0.5


def test_overrides_apply_to_the_layers_path(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            cfg = qjax.QuantConfig(overrides={"down": {"format": "fp4", "block_size": 64}})
            x = QuantDense(64, config=cfg, name="up")(x)
            return QuantDense(64, config=cfg, name="down")(x)

    params = Model().init(key, jnp.ones((1, 128)))["params"]
    assert (params["up"]["kernel"].q.format, params["down"]["kernel"].q.format) == ("nf4", "fp4")


def test_init_under_scan_stacks_the_packed_kernels(key):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return QuantDense(64, config=CFG, lora=LORA, name="up")(x), None

    scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    x = jnp.ones((2, 64))
    params = scanned().init(key, x, None)["params"]
    box = params["up"]["kernel"]
    assert box.q.shape == (3, 64, 64) and box.lora_a.shape == (3, 64, 4)
    y, _ = scanned().apply({"params": params}, x, None)
    expected = x
    for layer in range(3):
        w = box.q.dequantize()[layer]
        expected = expected @ w + params["up"]["bias"][layer][None]
    assert_close(y, expected)
    wrong = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
    with pytest.raises(ValueError, match="was stacked along axis 0, and is scanned along 1"):
        wrong().apply({"params": params}, x, None)


def test_partitioned_init(key):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    box = QuantDense(8, config=CFG, kernel_init=init).init(key, jnp.ones((1, 64)))["params"][
        "kernel"
    ]
    assert box.names == ("embed", "mlp")


def test_shapes_are_checked(key):
    variables = QuantDense(8, config=CFG).init(key, jnp.ones((1, 64)))
    with pytest.raises(errors.ScopeParamShapeError, match=r"shape \(64, 9\), but .* \(64, 8\)"):
        QuantDense(9, config=CFG).apply(variables, jnp.ones((1, 64)))
    with pytest.raises(errors.ScopeParamShapeError, match=r"shape \(32, 8\), but .* \(64, 8\)"):
        QuantDense(8, config=CFG).apply(variables, jnp.ones((1, 32)))
    with pytest.raises(errors.ScopeParamNotFoundError):
        QuantDense(8, config=CFG).apply({"params": {"bias": jnp.zeros(8)}}, jnp.ones((1, 64)))
