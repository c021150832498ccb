"""from_pretrained with a config gives the 4-bit models that bitsandbytes' weights give."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nn.nnx_param import QuantParam
from tests.models.golden_llama import FAMILIES, FOLDER, TOLERANCE, reference


def load(family, *, scan_layers=False, **fields):
    config = qjax.QuantConfig(compute_dtype=jnp.float32, **fields)
    return qjax.from_pretrained(FOLDER / family / "hf", config, scan_layers=scan_layers)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_equal_transformers_on_decoded_weights(family, scan_layers):
    ref = reference(family)
    model = load(family, scan_layers=scan_layers, double_quant=False)
    logits = nnx.jit(lambda model, ids: model(ids))(model, ref["input_ids"][:1])
    np.testing.assert_allclose(logits, ref["logits_nf4_nodq"], atol=TOLERANCE)
    model = load(family, scan_layers=scan_layers)
    out = model.generate(ref["input_ids"], max_new_tokens=12)
    np.testing.assert_array_equal(out, ref["greedy_nf4"])


def test_patterns_choose_what_is_quantized():
    fields = {"exclude": "mlp", "overrides": {"k_proj": {"block_size": 32}}}
    model = load("llama", scan_layers=True, **fields)
    assert model.layers.self_attn.k_proj.kernel.q.block_size == 32
    assert model.layers.self_attn.q_proj.kernel.q.block_size == 64
    assert model.layers.self_attn.q_proj.kernel.q.shape == (2, 64, 64)
    for layer in (model.layers.mlp.up_proj, model.lm_head):
        assert isinstance(layer.kernel, nnx.Param)
    with pytest.raises(ValueError, match="include='nothing' matches no"):
        load("llama", include="nothing")


def test_a_quantized_embedding_serves_as_tied_head():
    model = load("llama_tied", include="embed_tokens|q_proj")
    quantized = [leaf for _, leaf in nnx.iter_graph(model) if isinstance(leaf, QuantParam)]
    assert len(quantized) == 3
    decoded = qjax.from_pretrained(FOLDER / "llama_tied" / "hf")
    decoded.embed_tokens.embedding.set_value(model.embed_tokens.embedding.q.dequantize())
    for ours, theirs in zip(model.layers, decoded.layers, strict=True):
        theirs.self_attn.q_proj.kernel.set_value(ours.self_attn.q_proj.kernel.q.dequantize())
    ids = reference("llama_tied")["input_ids"]
    run = nnx.jit(lambda model, ids: model(ids))
    np.testing.assert_allclose(run(model, ids), run(decoded, ids), atol=TOLERANCE)
