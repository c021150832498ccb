"""What every model of another library has to do in 4 bits, NNX."""

import os
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import qjax
import qjax.nnx

CFG = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)


def check_nnx(name, model, call, train_steps=20, cfg=CFG, atol=2e-4):
    """Quantize, compare with decoded weights, add adapters, train, save, load, count bytes."""
    floats = nnx.clone(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = qjax.quantize_model(model, cfg)
    told = [str(w.message) for w in caught if "decode their whole" in str(w.message)]
    report = qjax.report(model)
    large = [
        r
        for r in report.rows
        if not r.is_quantized and len(r.shape) > 1 and np.prod(r.shape) > 4096
    ]
    print(
        f"== {name}: {sum(r.is_quantized for r in report.rows)} in 4 bits; float and large:",
        [(r.path, r.shape, r.note) for r in large],
        told,
    )
    assert report.totals.nbytes == sum(
        a.nbytes for a in jax.tree.leaves(nnx.state(model)) if hasattr(a, "nbytes")
    )
    got, want = nnx.jit(call)(model), nnx.jit(call)(qjax.dequantize_model(model))
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, atol=atol * max(scale, 1), rtol=1e-3)
    assert float(jnp.abs(want - nnx.jit(call)(floats)).max()) > 0

    model = qjax.add_lora(model, qjax.LoraConfig(rank=4, alpha=8), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(nnx.jit(call)(model), got, atol=atol * max(scale, 1), rtol=1e-3)
    adapters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    adapted = sum(path[-1].endswith("lora_a") for path, _ in adapters)
    assert adapted == sum(r.is_quantized for r in report.rows)
    frozen = jax.tree.leaves(nnx.state(model, qjax.nnx.QuantParam))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            logits = call(model).astype(jnp.float32)
            return -jax.nn.log_softmax(logits)[..., 7].mean()

        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(train_steps)]
    assert losses[-1] < losses[0], losses
    for before, after in zip(frozen, jax.tree.leaves(nnx.state(model, qjax.nnx.QuantParam))):
        np.testing.assert_array_equal(before, after)
    after = nnx.jit(call)(model)
    merged = nnx.jit(call)(qjax.merge_lora(model, jnp.float32))
    np.testing.assert_allclose(merged, after, atol=20 * atol * max(scale, 1), rtol=1e-2)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model")
        qjax.save(path, model)
        again = qjax.load(path, like=nnx.eval_shape(lambda: nnx.clone(model)))
        np.testing.assert_array_equal(nnx.jit(call)(again), after)
    print(f"   losses {losses[0]:.4f} -> {losses[-1]:.4f}; adapters {adapted}")
    return model


def check_linen(name, module, ids, train_steps=20, cfg=CFG, atol=2e-4):
    """Quantize, compare with decoded weights, add adapters, train, save, load, count bytes."""
    params = module.init(jax.random.key(0), ids)["params"]
    logits = jax.jit(lambda p: module.apply({"params": p}, ids).logits)
    fused = jax.jit(lambda p: qjax.apply(module, {"params": p}, ids).logits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = qjax.quantize_params(params, cfg, module=module, example_args=(ids,))
        report = qjax.report(quantized, module, ids)
    told = [
        str(w.message) for w in caught if "4-bit" in str(w.message) or "guess" in str(w.message)
    ]
    large = [
        (r.path, r.shape, r.note)
        for r in report.rows
        if not r.is_quantized and len(r.shape) > 1 and np.prod(r.shape) > 4096
    ]
    count = sum(r.is_quantized for r in report.rows)
    print(f"== {name}: {count} in 4 bits; float and large: {large}", told)
    print("   ", sorted({r.uses for r in report.rows if r.is_quantized}))
    assert report.totals.nbytes == sum(a.nbytes for a in jax.tree.leaves(quantized))
    decoded = qjax.dequantize_model(quantized)
    got, want = fused(quantized), logits(decoded)
    scale = max(float(jnp.abs(want).max()), 1)
    np.testing.assert_allclose(got, want, atol=atol * scale, rtol=1e-3)
    np.testing.assert_allclose(logits(quantized), want, atol=atol * scale, rtol=1e-3)

    adapted = qjax.add_lora_params(quantized, qjax.LoraConfig(rank=4, alpha=8), jax.random.key(1))
    trainable, frozen = qjax.partition(adapted)
    tx = optax.adamw(1e-2)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        def loss_fn(trainable):
            logits = fused(qjax.combine(trainable, frozen)).astype(jnp.float32)
            return -jax.nn.log_softmax(logits)[..., 7].mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    losses = []
    for _ in range(train_steps):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0], losses
    adapted = qjax.combine(trainable, frozen)
    after = fused(adapted)
    merged = logits(qjax.merge_lora(adapted, jnp.float32))
    np.testing.assert_allclose(merged, after, atol=20 * atol * scale, rtol=1e-2)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model")
        qjax.save(path, adapted)
        np.testing.assert_array_equal(fused(qjax.load(path, like=adapted)), after)
        np.testing.assert_array_equal(fused(qjax.load(path)), after)
    print(f"   losses {losses[0]:.4f} -> {losses[-1]:.4f}")
