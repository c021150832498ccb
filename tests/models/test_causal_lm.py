"""The language model against logits, losses and gradients of transformers and of float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qjax.models import CausalLM
from tests.models.golden import TINY, TOLERANCE, golden_model, reference

forward = nnx.jit(lambda model, *args: model(*args))


def test_no_mask_is_a_mask_of_ones():
    model, ref = golden_model("llama"), reference("llama")
    logits = forward(model, ref["input_ids"])
    np.testing.assert_allclose(logits, ref["logits"], atol=TOLERANCE)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_tokens_fed_one_by_one_through_the_cache_give_the_same_logits(scan_layers):
    model, ref = golden_model("llama", scan_layers), reference("llama")

    @nnx.jit
    def step(model, ids, mask, cache):
        hidden, cache = model.hidden(ids, mask, cache=cache)
        return model.logits(hidden), cache

    ids, mask = ref["input_ids_left"], ref["attention_mask_left"]
    cache = model.init_cache(2, slots=32)  # more than needed: empty slots must not be seen
    for t in range(ids.shape[1]):
        logits, cache = step(model, ids[:, t : t + 1], mask[:, t : t + 1], cache)
        real = mask[:, t] == 1
        np.testing.assert_allclose(
            logits[real, 0], ref["logits_left"][real, t], atol=TOLERANCE, err_msg=str(t)
        )
    assert int(cache.length) == ids.shape[1]


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_loss_equals_transformers_and_remat_keeps_the_gradient(scan_layers):
    model, ref = golden_model("llama", scan_layers), reference("llama")

    def loss(model, ids):
        logits = model(ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    graphdef, state = nnx.split(model)
    frugal = dataclasses.replace(model.config, remat=True)

    def run(state, remat):
        model = nnx.merge(graphdef, state)
        if remat:
            model.config = frugal
        return loss(model, ref["input_ids"])

    value, grads = jax.jit(jax.value_and_grad(run), static_argnums=1)(state, True)
    # A mean over 46 float32 losses of about 5, each from logits within TOLERANCE.
    np.testing.assert_allclose(value, ref["loss"], atol=2 * TOLERANCE)
    kept = jax.jit(jax.grad(run), static_argnums=1)(state, False)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(kept), strict=True):
        # The same float32 sums, fused differently: some rounding steps of the largest term.
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_loop_and_scan_have_the_paths_of_the_hub():
    loop = nnx.to_flat_state(nnx.state(golden_model("llama")))
    scan = nnx.to_flat_state(nnx.state(golden_model("llama", True)))
    loop = {"/".join(map(str, path)): leaf.shape for path, leaf in loop}
    scan = {"/".join(map(str, path)): leaf.shape for path, leaf in scan}
    assert loop["layers/1/self_attn/k_proj/kernel"] == (64, 32)
    assert scan["layers/self_attn/k_proj/kernel"] == (2, 64, 32)
    assert loop["lm_head/kernel"] == scan["lm_head/kernel"] == (64, 128)
    assert {
        path.replace("layers/0/", "layers/") for path in loop if "layers/1/" not in path
    } == set(scan)


def test_a_new_model_computes_in_bfloat16_and_gives_float32_logits():
    model = CausalLM(TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert model.layers[0].mlp.up_proj.kernel.dtype == jnp.bfloat16
    hidden, _ = model.hidden(jnp.ones((1, 3), jnp.int32))
    assert hidden.dtype == jnp.bfloat16
    assert model(jnp.ones((1, 3), jnp.int32)).dtype == jnp.float32


def test_dropout_inside_scanned_layers_draws_new_masks_at_every_call():
    model = CausalLM(dataclasses.replace(TINY, scan_layers=True), rngs=nnx.Rngs(0))

    class Dropped(nnx.Module):
        def __init__(self, base, rngs):
            self.base, self.dropout = base, nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.base(x))

    @nnx.split_rngs(splits=TINY.num_hidden_layers)
    @nnx.vmap
    def wrap(base, rngs):
        return Dropped(base, rngs)

    model.layers.mlp.up_proj = wrap(model.layers.mlp.up_proj, nnx.Rngs(1))
    ids = jnp.ones((1, 3), jnp.int32)
    first, second = forward(model, ids), forward(model, ids)
    assert np.abs(first - second).max() > 0
    model.eval()
    np.testing.assert_array_equal(forward(model, ids), forward(model, ids))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads=3 must be div"),
        ({"hidden_size": 0}, "hidden_size=0 must be a positive int"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def test_an_unknown_activation_names_the_known_ones():
    config = dataclasses.replace(TINY, hidden_act="tanh")
    with pytest.raises(ValueError, match=r"hidden_act='tanh' must be one of \['silu'"):
        CausalLM(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "ids, mask, error, message",
    [
        (np.ones((2, 3), np.float32), None, TypeError, "ids must be integers, .* not float32"),
        ("a text", None, TypeError, "ids must be integers, the tokens of a text, not <U6"),
        ([[1], [2, 3]], None, ValueError, "ids has rows of unequal length: pad"),
        (
            np.ones(3, np.int32),
            None,
            ValueError,
            r"ids has shape \(3,\), must be \[batch, tokens\]",
        ),
        (np.ones((2, 0), np.int32), None, ValueError, "neither 0"),
        (
            np.ones((2, 3), np.int32),
            np.ones((2, 4), np.int32),
            ValueError,
            r"attention_mask has shape \(2, 4\), must be that of ids: \(2, 3\)",
        ),
    ],
)
def test_misuse_is_named(ids, mask, error, message):
    model = golden_model("llama")
    with pytest.raises(error, match=message):
        model(ids, mask)


def test_tokens_may_be_lists():
    model, ids = golden_model("llama"), [[1, 5, 7]]
    array = np.asarray(ids, np.int32)
    np.testing.assert_array_equal(model(ids), model(array))
    one, other = (model.generate(x, max_new_tokens=2) for x in (ids, array))
    np.testing.assert_array_equal(one, other)


def test_more_tokens_than_the_cache_has_slots_are_refused():
    model = golden_model("llama")
    with pytest.raises(ValueError, match="ids have 5 tokens, and the cache has 4 slots, 0 of them"):
        model.hidden(np.ones((1, 5), np.int32), cache=model.init_cache(1, 4))
    _, cache = model.hidden(np.ones((1, 3), np.int32), cache=model.init_cache(1, 4))
    _, cache = model.hidden(np.ones((1, 1), np.int32), cache=cache)
    with pytest.raises(ValueError, match="ids have 1 tokens, and the cache has 4 slots, 4 of"):
        model.hidden(np.ones((1, 1), np.int32), cache=cache)
