"""The models on a GPU (flash attention, kernels, generation) against float32 on the host's CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax.models import CausalLM, ModelConfig
from qjax.models.attention import attend
from qjax.models.context import Context

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

CONFIG = ModelConfig(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    scan_layers=True,
    remat=True,
    remat_saves=("attention",),
)


def cpu():
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def on_cpu(tree):
    return jax.device_put(tree, jax.local_devices(backend="cpu")[0])


def relative(y, want) -> float:
    y, want = (np.asarray(a, np.float64) for a in (y, want))
    return float(np.linalg.norm(y - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def model():
    model = CausalLM(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    qjax.fuse_projections(model)
    qjax.quantize_model(model, qjax.QuantConfig(compute_dtype=jnp.bfloat16))
    qjax.add_lora(model, qjax.LoraConfig(rank=16), rngs=nnx.Rngs(1))
    adapters = nnx.state(model, nnx.LoRAParam)
    fresh = [
        0.02 * jax.random.normal(jax.random.key(7), a.shape) for a in jax.tree.leaves(adapters)
    ]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(adapters), fresh))
    return model


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(3), (2, 256), 0, CONFIG.vocab_size)


def exact(model, ids, call):
    """`call` of the merged weights in float32, on the CPU."""
    graphdef, state = nnx.split(model)
    with cpu():
        merged = qjax.merge_lora(nnx.merge(graphdef, on_cpu(state)), dtype=jnp.float32)
        graphdef, state = nnx.split(merged)
        state = jax.tree.map(
            lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, state
        )
        merged = nnx.merge(graphdef, state)
        for _, module in nnx.iter_modules(merged):
            if getattr(module, "dtype", None) == jnp.bfloat16:
                module.dtype = jnp.dtype(jnp.float32)
        return np.asarray(call(merged, on_cpu(ids)))


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "segments"])
def test_logits_agree_with_float32(model, ids, packed):
    segments = jnp.asarray([[1] * 100 + [2] * 156] * 2) if packed else None
    logits = nnx.jit(lambda m, i: m(i, segment_ids=segments))(model, ids)

    def call(merged, i):
        return merged(i, segment_ids=None if segments is None else on_cpu(segments))

    # bfloat16 through two blocks: rounding of 2^-9 at some twenty places a block.
    assert relative(logits, exact(model, ids, call)) < 2e-2


def test_tokens_one_by_one_give_the_logits_of_the_whole(model, ids):
    whole = nnx.jit(lambda m, i: m(i))(model, ids[:, :40])

    @nnx.jit
    def step(model, token, cache):
        hidden, cache = model.hidden(token, cache=cache)
        return model.logits(hidden), cache

    cache, found = model.init_cache(2, 64), []
    for t in range(40):
        logits, cache = step(model, ids[:, t : t + 1], cache)
        found.append(logits[:, 0])
    # As above, twice: both are in bfloat16.
    assert relative(jnp.stack(found, axis=1), whole) < 3e-2


def test_adapter_gradients_agree_with_plain_attention(model, ids, monkeypatch):
    def gradient():
        graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
        loss = lambda adapters: nnx.merge(graphdef, adapters, rest).loss(ids)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(adapters)

    fused, grads = gradient()
    monkeypatch.setattr("qjax.models.attention._runs_cudnn", lambda q, k: False)
    plain, want = gradient()
    assert abs(float(fused - plain)) < 1e-2  # of about 7, from logits in bfloat16
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert relative(one, other) < 5e-2  # both in bfloat16


@pytest.mark.parametrize(
    "rows, kv_format, margin",
    # The other path of bfloat16 may prefer another token only where the two are that close; keys
    # and values in 8 bits are rounded as coarsely again.
    [(1, None, 0.1), (20, None, 0.1), (2, "int8", 0.2)],
)
def test_generation_on_the_device_is_greedy(model, ids, rows, kv_format, margin):
    prompt = jnp.tile(ids, (10, 1))[:rows, :20]
    out = np.asarray(model.generate(prompt, max_new_tokens=12, kv_format=kv_format))
    logits = np.asarray(nnx.jit(lambda m, i: m(i))(model, jnp.asarray(out)))
    taken = np.take_along_axis(logits[:, 19:-1], out[:, 20:, None], axis=-1)[..., 0]
    assert (logits[:, 19:-1].max(-1) - taken < margin).all()


def test_an_optimizer_state_waits_in_the_memory_of_the_host():
    params = {"w": jnp.ones((64, 256))}
    tx = optax.adam(0.1)
    offloaded = qjax.offload_state(tx)
    states = [t.init(params) for t in (tx, offloaded)]
    steps = [jax.jit(t.update) for t in (tx, offloaded)]
    for seed in range(3):
        gradient = {"w": jax.random.normal(jax.random.key(seed), (64, 256))}
        updates = []
        for i, step in enumerate(steps):
            update, states[i] = step(gradient, states[i], params)
            updates.append(update["w"])
        np.testing.assert_array_equal(*updates)
    assert states[1][0].mu["w"].sharding.memory_kind == "pinned_host"
    assert updates[1].sharding.memory_kind == "device"


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_attention_is_attention(kv_heads):
    shapes = [(2, 128, 8, 64), (2, 128, kv_heads, 64), (2, 128, kv_heads, 64)]
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes))
    mask = jnp.tri(128, dtype=jnp.bool_)[None, None]
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    want = jax.nn.dot_product_attention(*wide, mask=mask)
    for context in (Context(), Context(mask=mask)):
        assert relative(jax.jit(attend)(q, k, v, context), want) < 1e-2  # bfloat16


def test_one_query_is_attention():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, 1, 8, 64), jnp.bfloat16)
    k, v = (jax.random.normal(key, (3, 96, 2, 64), jnp.bfloat16) for key in keys[1:])
    mask = jax.random.bernoulli(jax.random.key(5), 0.7, (3, 1, 1, 96))
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    want = jax.nn.dot_product_attention(*wide, mask=mask)
    assert relative(jax.jit(attend)(q, k, v, Context(mask=mask)), want) < 1e-2  # bfloat16
