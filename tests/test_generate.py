"""Generation against transformers' greedy tokens and numpy's account of each sampling option."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from pallas_kernels import dispatch
from qjax.models import CausalLM
from qjax.sampling import sample
from tests.models.golden import LLAMAS, TINY, golden_model, reference

IDS = np.asarray([[5, 17, 3, 90], [8, 2, 44, 61]], np.int32)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("family", LLAMAS)
def test_greedy_equals_transformers(family, scan_layers):
    model, ref = golden_model(family, scan_layers), reference(family)
    out = model.generate(ref["input_ids"], max_new_tokens=12)
    np.testing.assert_array_equal(out, ref["greedy"])
    assert out.dtype == jnp.int32
    out = model.generate(ref["input_ids_left"], ref["attention_mask_left"], max_new_tokens=12)
    np.testing.assert_array_equal(out, ref["greedy_left"])


def test_padding_on_either_side_changes_no_row():
    model, ref = golden_model("llama"), reference("llama")
    row = ref["input_ids"][:1, :20]
    pads = np.zeros((1, 4), np.int32)
    ids = np.concatenate([np.c_[pads, row], np.c_[row, pads], ref["input_ids"][:1]])
    mask = np.ones_like(ids)
    mask[0, :4] = mask[1, 20:] = 0
    out = model.generate(ids, mask, max_new_tokens=6)
    alone = model.generate(row, max_new_tokens=6)
    np.testing.assert_array_equal(out[:, :24], ids)
    np.testing.assert_array_equal(out[:2, 24:], np.repeat(alone[:, 20:], 2, axis=0))


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    model = golden_model("llama")
    free = np.asarray(model.generate(IDS, max_new_tokens=12))[:, 4:]
    stop = next(t for t in free[0] if t not in free[1])
    end = list(free[0]).index(stop)
    out = np.asarray(model.generate(IDS, max_new_tokens=12, stop_tokens=(stop, 127)))[:, 4:]
    np.testing.assert_array_equal(out[0, : end + 1], free[0, : end + 1])
    assert (out[0, end + 1 :] == stop).all()
    np.testing.assert_array_equal(out[1], free[1])


def test_rows_that_end_at_once_are_filled():
    model = golden_model("llama")
    free = np.asarray(model.generate(IDS, max_new_tokens=1))[:, 4]
    out = model.generate(IDS, max_new_tokens=9, stop_tokens=tuple(int(t) for t in free))
    np.testing.assert_array_equal(out[:, 4], free)
    assert (np.asarray(out)[:, 5:] == free[0]).all()  # the first stop token


def test_more_new_tokens_only_add():
    model = golden_model("llama")
    long = np.asarray(model.generate(IDS, max_new_tokens=40))
    assert long.shape == (2, 44)
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=1), long[:, :5])
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=0), IDS)


def test_sampling_follows_its_key():
    model = golden_model("llama")
    options = {"max_new_tokens": 12, "temperature": 1.0}
    one = model.generate(IDS, key=jax.random.key(1), **options)
    np.testing.assert_array_equal(one, model.generate(IDS, key=jax.random.key(1), **options))
    assert (
        np.asarray(one) != np.asarray(model.generate(IDS, key=jax.random.key(2), **options))
    ).any()


def test_generate_samples_only_what_top_k_allows():
    model = golden_model("llama")
    options = {"temperature": 3.0, "key": jax.random.key(0), "max_new_tokens": 12}
    greedy = model.generate(IDS, max_new_tokens=12)
    np.testing.assert_array_equal(model.generate(IDS, top_k=1, **options), greedy)
    np.testing.assert_array_equal(model.generate(IDS, top_p=1e-6, **options), greedy)
    assert (np.asarray(model.generate(IDS, top_k=5, top_p=0.9, **options)) != greedy).any()


def expected(logits, temperature, top_k, top_p):
    """The distribution that the options describe, in float64 numpy."""
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if top_k is not None:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p is not None:
        keep = np.searchsorted(np.cumsum(p[order]), top_p) + 1  # the first to reach top_p is kept
        p[order[keep:]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, None, None), (0.5, None, None), (1.0, 3, None), (1.5, None, 0.7), (2.0, 6, 0.6)],
)
def test_sample_draws_from_the_distribution_that_the_options_describe(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=10).astype(np.float32) * 2
    draws = 20_000
    tokens = sample(
        jnp.broadcast_to(logits, (draws, 10)), jax.random.key(0), temperature, top_k, top_p
    )
    counts = np.bincount(np.asarray(tokens), minlength=10)
    want = expected(logits, temperature, top_k, top_p) * draws
    assert (counts[want == 0] == 0).all()
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - want) <= 5 * np.sqrt(want)).all()


def test_values_within_the_same_buckets_compile_nothing_new(monkeypatch):
    model, traces = golden_model("llama"), []
    logits = CausalLM.logits

    def counted(self, hidden):
        traces.append(hidden.shape)  # runs when the program is traced, not when it is run
        return logits(self, hidden)

    monkeypatch.setattr(CausalLM, "logits", counted)
    key = jax.random.key(0)
    ids = np.repeat(IDS, 3, axis=0)  # a batch size that no other test uses
    sampled = {"temperature": 1.0, "key": key, "top_p": 0.9}
    model.generate(ids, max_new_tokens=5)
    model.generate(ids, max_new_tokens=5, **sampled)
    first = len(traces)
    assert first == 3  # one prefill, a greedy and a sampling loop
    model.generate(ids[:, :3], max_new_tokens=9, stop_tokens=(1, 2, 3))
    model.generate(ids, np.ones_like(ids), max_new_tokens=2)
    model.generate(ids, max_new_tokens=4, temperature=0.3, top_p=0.5, key=jax.random.key(9))
    assert len(traces) == first


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be an int, 0 or more"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be an int"),
        ({"temperature": -0.1}, "temperature=-0.1 must be finite, 0 or more"),
        ({"temperature": 1.0}, "temperature=1.0 samples: pass key="),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be an int, 1 or more"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"top_k": 5}, "top_k=5 .* no effect at temperature=0"),
        ({"stop_tokens": (-1,)}, r"stop_tokens=\[-1\] must be token ids"),
        ({"max_new_tokens": 61}, "are 65 tokens, max_position_embeddings=64"),
        ({"attention_mask": np.asarray([[1] * 4, [0] * 4])}, "attention_mask is 0 on all of row 1"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        golden_model("llama").generate(IDS, **{"max_new_tokens": 4, **options})


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"ids hold 128, must be from 0 to 127 \(vocab_size=128\)"):
        golden_model("llama").generate(np.asarray([[1, 128]]), max_new_tokens=2)


@pytest.mark.parametrize("every", [1, 5, 64])
def test_a_stream_is_what_generate_appends_in_parts(every):
    model = golden_model("llama")
    whole = np.asarray(model.generate(IDS, max_new_tokens=12))[:, 4:]
    parts = list(model.stream(IDS, max_new_tokens=12, every=every))
    assert [p.shape[1] for p in parts[:-1]] == [every] * (len(parts) - 1)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_a_stream_ends_with_the_part_in_which_the_last_row_ends():
    model = golden_model("llama")
    free = np.asarray(model.generate(IDS[:1], max_new_tokens=12))[0, 4:]
    end = list(free).index(free[6])
    options = {"max_new_tokens": 12, "stop_tokens": (int(free[6]),), "every": 2}
    parts = np.concatenate(list(model.stream(IDS[:1], **options)), axis=1)[0]
    np.testing.assert_array_equal(parts[: end + 1], free[: end + 1])
    assert len(parts) == 2 * (end // 2 + 1)
    assert list(model.stream(IDS, max_new_tokens=0)) == []


def test_a_prompt_of_a_whole_bucket_needs_no_mask():
    model = golden_model("llama")
    ids = np.asarray(reference("llama")["input_ids"])
    ids = np.concatenate([ids, ids], axis=1)[:, :32]
    masked = model.generate(ids, np.ones_like(ids), max_new_tokens=6)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=6), masked)


@pytest.mark.parametrize(
    "scan_layers, lora",
    [
        (True, qjax.LoraConfig(4, include="_proj$|embed")),
        pytest.param(False, qjax.LoraConfig(4, include="_proj$"), marks=pytest.mark.slow),
        pytest.param(True, qjax.LoraConfig(4, include="_proj$", dora=True), marks=pytest.mark.slow),
    ],
    ids=["scan", "loop", "dora"],
)
def test_adapters_by_columns_change_no_token(scan_layers, lora, monkeypatch):
    config = dataclasses.replace(TINY, scan_layers=scan_layers)
    model = CausalLM(config, rngs=nnx.Rngs(0))
    qjax.add_lora(model, lora, rngs=nnx.Rngs(1))
    plain = model.generate(IDS[:1] % 32, max_new_tokens=12)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        leaf.set_value(jax.random.normal(jax.random.key(len(path)), leaf.shape))
    want = model.generate(IDS[:1] % 32, max_new_tokens=12)
    assert (np.asarray(want) != np.asarray(plain)).any()
    gpu = dispatch.Target("gpu", "NVIDIA H100", (9, 0))
    monkeypatch.setattr("qjax.generate.target", lambda: gpu)
    np.testing.assert_array_equal(model.generate(IDS[:1] % 32, max_new_tokens=12), want)


def test_a_stream_refuses_parts_of_nothing():
    with pytest.raises(ValueError, match="every=0 must be an int, 1 or more"):
        next(golden_model("llama").stream(IDS, every=0))
