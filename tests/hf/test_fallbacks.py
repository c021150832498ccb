"""No family decodes a weight where a kernel for its layout could run."""

import re

import pytest

import qjax.hf
from qjax.core.config import QuantConfig
from qjax.swap.report import report
from tests.hf.test_quantized import inputs
from tests.models.golden import FAMILIES, write_bnb

# Weights whose contracted size is no multiple of the block: bitsandbytes' blocks straddle their
# rows ("flat"), so each is decoded whole. "*" is the layer.
DECODED = {
    "opt_postnorm": {"project_in/kernel"},  # K = 32
    "qwen2": {"layers/*/mlp/down_proj/kernel"},  # K = 160
    "mixtral": {"layers/*/mlp/experts/down_proj/kernel"},  # K = 48
    "gpt_oss": {"layers/*/mlp/experts/gate_up_proj/kernel"},  # stored along 2 x 48 outputs
}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_weights_on_the_list_are_decoded(family, tmp_path):
    folder = write_bnb(family, tmp_path)
    model = qjax.hf.from_pretrained(folder, config=QuantConfig(compute_dtype="float32"))
    ids, extra = inputs(family)
    rows = [row for row in report(model, ids, **extra).rows if row.is_quantized]
    assert rows and all(row.uses for row in rows)
    decoded = {row.path for row in rows if any(use.startswith("decode") for use in row.uses)}
    assert decoded == {row.path for row in rows if row.layout == "flat"}
    assert {re.sub(r"layers/\d+", "layers/*", p) for p in decoded} == DECODED.get(family, set())
