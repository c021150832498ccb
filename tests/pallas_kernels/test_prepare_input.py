"""prepare_input against float64 numpy: XLA's, and the Triton kernel's jnp and lowering."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prepare_input
from pallas_kernels.prepare_input import triton
from tests.pallas_kernels.problems import lower

LAYERS = 3
KINDS = ["plain", "rms_norm", "silu_gate"]
OPTIONS: dict[str, Any] = {"epsilon": 1e-5, "offset": 0.5, "factor": 2.0}


def problem(kind, m, k, ranks, *, dtype: Any = np.float32, stacked=True, seed=0):
    """x, a and scale of size 1."""
    rng = np.random.default_rng(seed)
    lead = (LAYERS,) if stacked else ()
    shapes = [(m, k * (2 if kind == "silu_gate" else 1)), (*lead, ranks, k), (*lead, k)]
    x, a, scale = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return x, a if ranks else None, scale if kind == "rms_norm" else None


def expected(x, a, scale, kind):
    """The input, and its product with A, in float64."""
    y, a, scale = (None if s is None else np.asarray(s, np.float64) for s in (x, a, scale))
    if kind == "rms_norm":
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * (0.5 + scale)
    if kind == "silu_gate":
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    return y, None if a is None else 2.0 * y @ a.T


def check(found, want, rtol):
    for one, other in zip(found, want, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            error = np.linalg.norm(np.asarray(one, np.float64) - other)
            assert error <= rtol * np.linalg.norm(other)


# Columns that fill the lanes and that do not; a program with one row of A, and with several.
@pytest.mark.parametrize("m, k, ranks", [(1, 96, 5), (3, 200, 0), (20, 64, 48)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_with_float64(kind, m, k, ranks, monkeypatch):
    monkeypatch.setitem(triton.PROGRAMS, kind, 64)
    x, a, scale = problem(kind, m, k, ranks)
    how = OPTIONS | {"kind": kind, "layer": 2}
    want = expected(x, None if a is None else a[2], None if scale is None else scale[2], kind)
    check(prepare_input(x, a, scale, **how, implementation="xla"), want, 1e-6)
    if kind != "plain" or a is not None:
        # A few roundings of float32 in each sum.
        check(triton.prepare_input(x, a, scale, **how, interpret=True), want, 1e-6)


def test_without_a_stack():
    x, a, scale = problem("rms_norm", 2, 32, 4, stacked=False)
    found = triton.prepare_input(x, a, scale, **OPTIONS, kind="rms_norm", interpret=True)
    check(found, expected(x, a, scale, "rms_norm"), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_lowers_for_cuda(kind):
    x, a, scale = problem(kind, 2, 96, 8, dtype=jnp.bfloat16)
    prepare = functools.partial(triton.prepare_input, **OPTIONS, kind=kind)
    call = lambda x, a, scale, layer: prepare(x, a, scale, layer=layer)  # noqa: E731
    assert f"prepare_input_{kind}" in lower(call, x, a, scale, jnp.int32(1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "layer_norm"}, "kind is 'layer_norm', must be one of"),
        ({"kind": "silu_gate", "x": (2, 7)}, r"x has shape \(2, 7\), must be \[M, 2 K\]"),
        ({"a": (3, 9)}, r"a must be float32\[R, 8\] and is float32\[3,9\]"),
        ({"layer": 0}, r"a must be float32\[L, R, 8\] and is float32\[3,8\]"),
        ({"scale": (8,)}, "scale is of kind 'rms_norm', and of no other; kind is 'plain'"),
        ({"kind": "rms_norm", "scale": (7,)}, r"scale has shape \(7,\), must be \[8\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"x": (2, 8), "a": (3, 8)} | change
    arguments: Any = {k: jnp.ones(v) if isinstance(v, tuple) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        prepare_input(**arguments)


def test_other_calls_are_left_to_xla():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    how = OPTIONS | {"kind": "plain"}
    why = triton.unsupported(shape((33, 64)), None, None, **how)
    assert why == "x has 33 rows; the kernel takes at most 32"
    why = triton.unsupported(shape((1, 65536)), None, None, **how)
    assert why == "K is 65536; the kernel takes at most 32768"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    "kind, m, k, ranks",
    [
        ("plain", 1, 4096, 16),
        ("plain", 32, 8192, 16),
        ("rms_norm", 1, 4096, 48),
        ("rms_norm", 7, 2880, 0),
        ("rms_norm", 32, 8192, 48),
        ("silu_gate", 1, 11008, 16),
        ("silu_gate", 32, 28672, 6),
    ],
)
def test_the_kernel_agrees_with_float64_on_a_gpu(kind, m, k, ranks):
    x, a, scale = problem(kind, m, k, ranks, dtype=jnp.bfloat16)
    how = OPTIONS | {"kind": kind, "implementation": "triton"}
    call = jax.jit(lambda x, a, scale, layer: prepare_input(x, a, scale, layer=layer, **how))
    found = call(x, a, scale, jnp.int32(2))
    want = expected(x, None if a is None else a[2], None if scale is None else scale[2], kind)
    check(found, want, 2**-8)  # bfloat16 rounds the results to 2^-9
