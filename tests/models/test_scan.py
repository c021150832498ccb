"""Stacked 4-bit layers, whose weights are indexed in the stack, against a list of layers."""

import jax
import numpy as np
import pytest
from flax import nnx

import qjax
from tests.models.golden import FOLDER, TOLERANCE, reference

forward = nnx.jit(lambda model, ids: model(ids))


@pytest.mark.parametrize("devices", [1, 8], ids=["in place", "taken"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_scan_over_4_bit_layers_is_the_loop_over_them(family, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: devices)
    config = qjax.QuantConfig(compute_dtype=np.float32)
    loop, scan = (
        qjax.from_pretrained(FOLDER / family / "hf", config=config, scan_layers=stacked)
        for stacked in (False, True)
    )
    ids = reference(family)["input_ids"]
    # The same 4-bit weights; float32 sums that the compiler may order differently.
    np.testing.assert_allclose(forward(scan, ids), forward(loop, ids), atol=TOLERANCE)
