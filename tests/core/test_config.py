"""QuantConfig: validation, hashing, overrides."""

import jax.numpy as jnp
import pytest

from qjax import QuantConfig


def test_it_is_a_value():
    one = QuantConfig(overrides={"down": {"block_size": 128}}, exclude="head")
    two = QuantConfig(overrides=[("down", {"block_size": 128})], exclude=["head"])
    assert one == two
    assert hash(one) == hash(two)
    assert QuantConfig(compute_dtype="bfloat16") == QuantConfig(compute_dtype=jnp.bfloat16)


def test_the_first_matching_override_wins():
    cfg = QuantConfig(
        overrides=[("layers/0/", {"format": "fp4"}), ("mlp", {"block_size": 128})], exclude="x"
    )
    assert cfg.at("layers/0/mlp/kernel").format == "fp4"
    assert cfg.at("layers/0/mlp/kernel").block_size == 64
    assert cfg.at("layers/1/mlp/kernel").block_size == 128
    assert cfg.at("layers/1/attn/kernel") == QuantConfig(exclude="x")


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"format": "nf5"}, ValueError, r"format must be one of \[.*'nf4'.*\], got 'nf5'"),
        ({"block_size": 48}, ValueError, "block_size must be one of .*32.*4096.*got 48"),
        ({"block_size": True}, ValueError, "block_size must be one of"),
        ({"format": "mxfp4", "block_size": 64}, ValueError, r"must be one of \(32,\) for 'mxfp4'"),
        ({"format": "int8", "block_size": 64}, ValueError, "block_size must be None for 'int8'"),
        (
            {"format": "int8", "double_quant": True},
            ValueError,
            "double_quant must be False for 'int8'",
        ),
        ({"int8_threshold": 6.0}, ValueError, "int8_threshold needs format='int8', got .*nf4"),
        ({"format": "int8", "int8_threshold": 0}, ValueError, "must be a positive number, got 0"),
        ({"double_quant": 1}, TypeError, "double_quant must be True or False, got 1"),
        ({"compute_dtype": jnp.int8}, ValueError, "compute_dtype must be a floating dtype"),
        ({"include": "("}, ValueError, r"include: '\(' is no regular expression"),
        ({"exclude": [3]}, TypeError, "exclude must hold strings, got 3"),
        ({"overrides": {"a": {"blok": 1}}}, ValueError, r"overrides\['a'\] has unknown fields"),
        ({"overrides": {"a": {"block_size": 5}}}, ValueError, r"overrides\['a'\]: block_size"),
        ({"overrides": {"[": {}}}, ValueError, "overrides: .* is no regular expression"),
        ({"blocksize": 64}, TypeError, "unexpected keyword argument 'blocksize'"),
    ],
)
def test_misuse(kwargs, error, message):
    with pytest.raises(error, match=message):
        QuantConfig(**kwargs)
