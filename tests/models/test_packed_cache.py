"""Keys and values in 8 and 4 bits against numpy, and what a model says with them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.models import CausalLM, ModelConfig
from qjax.models.cache import init_cache, read, write
from tests.models.golden import golden_model, reference
from tests.pallas_kernels.problems import H100

BITS = {"int8": 8, "int4": 4}
SLOTS = 200
CHUNKS = (70, 1, 1, 55, 1, 63, 9)  # all of them, over the edges of groups of 64 tokens


def half_a_step(x, axis, bits):
    """The bound of the error in float64, for offsets and steps that are rounded to float16.

    Half a step, and what float16 (11 bits) moves the ends of the range by.
    """
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    return (high - low) / (2 * (2**bits - 1)) + (np.abs(low) + high - low) * 2.0**-10 + 1e-6


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
@pytest.mark.parametrize("kv_format", list(BITS))
def test_written_in_pieces_against_numpy(kv_format, stacked, rng):
    """Keys by channel in groups of 64 tokens, values by token: each within half a step."""
    bits, width = BITS[kv_format], 128
    # Channels of keys far from zero, as models have them.
    k = rng.standard_normal((2, SLOTS, 3, width)) + 20 * rng.standard_normal((1, 1, 3, width))
    v = rng.standard_normal((2, SLOTS, 3, width)) * 10.0 ** rng.integers(-3, 3, (2, SLOTS, 3, 1))
    k, v = k.astype(np.float32), v.astype(np.float32)
    cache = init_cache(2, 2, SLOTS, 3, width, np.float32, stacked, kv_format)
    first = cache.k if stacked else cache.k[0]
    jitted = jax.jit(write, static_argnums=() if stacked else 1)
    start = 0
    for count in CHUNKS:
        part = slice(start, start + count)
        if start == 0:  # the length is known where the prompt is read
            cache = write(cache, 1, k[:, part], v[:, part])
        else:
            cache = jitted(cache, 1, k[:, part], v[:, part])
        start += count
        cache = cache._replace(length=jnp.int32(start))
    assert start == SLOTS
    found_k, found_v = read(cache, 1)
    for i in range(0, SLOTS, 64):
        group = k[:, i : i + 64]
        error = np.abs(np.asarray(found_k)[:, i : i + 64].astype(np.float64) - group)
        assert (error <= half_a_step(group, 1, bits)).all(), i
    blocks = v.reshape(2, SLOTS, 3, 2, 64)
    error = np.abs(np.asarray(found_v).reshape(blocks.shape).astype(np.float64) - blocks)
    assert (error <= half_a_step(blocks, -1, bits)).all()
    other = cache.k if stacked else cache.k[0]
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        layer = (0,) if stacked else ()
        np.testing.assert_array_equal(a[layer], b[layer])  # the other layer is not touched


@pytest.mark.parametrize("kv_format, bits", [("int8", 8.5), ("int4", 4.5)])
def test_bytes(kv_format, bits):
    """Two float16 for each 64 codes, and one group of keys as it was."""
    cache = init_cache(3, 2, 256, 4, 64, jnp.bfloat16, False, kv_format)
    numbers = 3 * 2 * 256 * 4 * 64
    recent = 3 * 2 * 64 * 4 * 64 * 2
    valid_and_length = 2 * 256 + 4
    assert cache.nbytes == 2 * numbers * bits / 8 + recent + valid_and_length


def tiny(**fields):
    config = ModelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        **fields,
    )
    return CausalLM(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "fields",
    [pytest.param({}, marks=pytest.mark.slow), {"scan_layers": True}],
    ids=["loop", "scan"],
)
def test_decoding_reads_what_was_written(fields):
    """Token by token, over the edge of a group, near what the float cache gives."""
    model = tiny(**fields)
    ids = np.random.default_rng(0).integers(0, 64, (2, 100))
    mask = np.ones_like(ids)
    mask[0, :7] = mask[1, 55:60] = 0
    graphdef, state = nnx.split(model)
    outs = {}
    for kv_format in (None, *BITS):

        @jax.jit
        def run(state, ids, mask):
            model = nnx.merge(graphdef, state)
            cache = model.init_cache(2, 100, kv_format)  # noqa: B023
            _, cache = model.hidden(ids[:, :60], mask[:, :60], cache=cache)

            def step(cache, token):
                hidden, cache = model.hidden(token[:, None], cache=cache)
                return cache, model.logits(hidden[:, 0])

            return jax.lax.scan(step, cache._replace(length=jnp.int32(60)), ids[:, 60:].T)[1]

        outs[kv_format] = np.asarray(run(state, ids, mask))
    size = np.abs(outs[None]).max()
    errors = {f: np.abs(outs[f] - outs[None]).max() / size for f in BITS}
    # Small errors are in proportion to the step, 1/255 and 1/15 of the range; a wrong slot or mask
    # would give some of the size of the logits.
    assert 0 < errors["int8"] < 0.05 and 17 / 4 < errors["int4"] / errors["int8"] < 17 * 4


@pytest.mark.parametrize("family", ["mistral", "opt", "bloom"])
def test_families(family):
    """Sliding windows, ALiBi and learned positions: 8 bits keep the greedy tokens of the golden."""
    ref = reference(family)
    out = golden_model(family).generate(ref["input_ids"], max_new_tokens=12, kv_format="int8")
    np.testing.assert_array_equal(out, ref["greedy"])


def test_streams_and_seq2seq():
    ref = reference("t5")
    out = golden_model("t5").generate(ref["input_ids"], max_new_tokens=12, kv_format="int8")
    np.testing.assert_array_equal(out, ref["greedy"])
    ref = reference("llama")
    stream = golden_model("llama").stream(ref["input_ids"], max_new_tokens=12, kv_format="int8")
    np.testing.assert_array_equal(np.concatenate(list(stream), axis=1), ref["greedy"][:, 24:])


def test_no_decoded_cache_is_written_out():
    """Attention reads the codes, and the cache changes in place."""
    model = tiny()
    graphdef, state = nnx.split(model)
    cache = model.init_cache(1, 2048, "int8")._replace(length=jnp.int32(5))

    def step(state, cache):
        hidden, cache = nnx.merge(graphdef, state).hidden(jnp.ones((1, 1), jnp.int32), cache=cache)
        return hidden, cache

    memory = jax.jit(step, donate_argnums=1).lower(state, cache).compile().memory_analysis()
    keys_of_a_layer = 4 * 2 * 2048 * 32  # in float32
    assert memory.temp_size_in_bytes < keys_of_a_layer
    assert memory.alias_size_in_bytes == cache.nbytes


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("kv_format", list(BITS))
def test_kernels_read_and_write_the_codes_on_a_gpu(kv_format, scan):
    """A step is lowered for a GPU: no number of a layer's cache is there in floating point."""
    slots = 4096
    model = tiny(scan_layers=scan)
    graphdef, state = nnx.split(model)
    cache = model.init_cache(1, slots, kv_format)._replace(length=jnp.int32(5))

    def step(state, cache):
        hidden, cache = nnx.merge(graphdef, state).hidden(jnp.ones((1, 1), jnp.int32), cache=cache)
        return hidden, cache

    auto = jax.sharding.AxisType.Auto
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(auto,), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(step).trace(state, cache).lower(lowering_platforms=("cuda",)).as_text()
    assert "append_packed_triton" in text and "decode_attention_triton" in text
    floats = re.findall(r"tensor<([0-9x]+)xb?f(?:16|32)>", text)
    sizes = [math.prod(map(int, shape.split("x"))) for shape in floats]
    # The largest are the steps and offsets of all layers, one for each 32 or 64 numbers.
    assert max(sizes) < slots * 2 * 32  # heads, head_dim


def test_evaluation_with_a_cache():
    """The model reads its keys and values from the cache, the reference its own."""
    model = tiny()
    ids = np.random.default_rng(2).integers(0, 64, (1, 130))
    found = {
        f: qjax.evaluate(model, [ids], reference=model, kv_format=f) for f in (None, "int8", "int4")
    }
    assert found[None].kl == 0 and 0 < found["int8"].kl < found["int4"].kl / 10
    assert found["int8"].reference_perplexity == found[None].perplexity


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: tiny().generate(np.ones((1, 4), np.int32), kv_format="int3"),
            ValueError,
            r"kv_format='int3' must be None or one of \['int8', 'int4'\]",
        ),
        (
            lambda: init_cache(1, 1, 8, 1, 7, jnp.float32, False, "int4"),
            ValueError,
            "head_dim=7 is odd",
        ),
        (
            lambda: qjax.evaluate(lambda ids: ids, [np.ones((1, 4), np.int32)], kv_format="int8"),
            TypeError,
            "kv_format='int8' needs a model of qjax.models",
        ),
    ],
)
def test_misuse(call, error, message):
    with pytest.raises(error, match=message):
        call()
