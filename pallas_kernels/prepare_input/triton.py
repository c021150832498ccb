"""prepare_input on Pallas-Triton: one kernel for a norm or a gate and the products with A.

A program has one row of x whole in its registers, and multiplies it by some rows of A. The programs
of a row make y again each for itself, which takes less than waiting for another kernel; the first
of them writes it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton_call import triton_call
from pallas_kernels.triton_scales import layer_index

MAX_ROWS = 32  # from here on a product with A is one that fills the GPU
MAX_COLUMNS = 32768  # of 16 warps, 64 a thread
# An H100 has 132 multiprocessors. More programs for each make y more often, which takes the longer
# of the two for a gate.
PROGRAMS = {"plain": 528, "rms_norm": 528, "silu_gate": 132}
FEW_PROGRAMS, ELEMENTS = 132, (256, 1024)  # of a row for a warp, where programs are few and many
MAX_SHARE, AHEAD = 16, 4  # rows of A of a program, and those of them that are loaded at a time


def prepare_input(x, a, scale, *, kind, epsilon, offset, factor, layer=None, interpret=False):
    """See `pallas_kernels.prepare_input`. `interpret` runs the kernel's jnp on any device."""
    m, k = len(x), x.shape[1] // (2 if kind == "silu_gate" else 1)
    ranks, block = 0 if a is None else a.shape[-2], pl.next_power_of_2(k)
    share = 1  # of the rows of A, for a program
    while m * pl.cdiv(ranks, share) > PROGRAMS[kind] and share < MAX_SHARE:
        share *= 2
    inputs, outputs = {"x": x}, {}
    if scale is not None:
        inputs["scale"] = scale.reshape(-1, k)
    if kind != "plain":
        outputs["y"] = jax.ShapeDtypeStruct((m, k), x.dtype)
    if a is not None:
        inputs["a"] = a.reshape(-1, ranks, k)
        outputs["hidden"] = jax.ShapeDtypeStruct((m, ranks), x.dtype)
    parts = max(1, pl.cdiv(ranks, share))
    static = {"kind": kind, "epsilon": epsilon, "offset": offset, "factor": factor, "k": k}
    static |= {"parts": parts, "share": share, "names": (*inputs, *outputs)}
    results = triton_call(
        functools.partial(_kernel, **static),
        grid=m * parts,
        out_shape=list(outputs.values()),
        interpret=interpret,
        name=f"prepare_input_{kind}",
        warps=min(16, max(4, block // ELEMENTS[m * parts > FEW_PROGRAMS])),
    )(layer_index(layer), *inputs.values())
    found = dict(zip(outputs, results))
    return found.get("y", x), found.get("hidden")


def unsupported(x, a, scale, *, kind, epsilon, offset, factor, layer=None) -> str | None:
    """Why these arguments cannot run, or None."""
    if len(x) > MAX_ROWS:
        return f"x has {len(x)} rows; the kernel takes at most {MAX_ROWS}"
    columns = x.shape[1] // (2 if kind == "silu_gate" else 1)
    if columns > MAX_COLUMNS:
        return f"K is {columns}; the kernel takes at most {MAX_COLUMNS}"
    for name, array in (("x", x), ("a", a), ("scale", scale)):
        if array is None:
            continue
        if array.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"{name} is {array.dtype}; the kernel reads bfloat16, float16 and float32"
    return None


def _kernel(layer_ref, *refs, names, kind, k, parts, share, epsilon, offset, factor):
    ref = dict(zip(names, refs))
    layer, row, part = layer_ref[0], pl.program_id(0) // parts, pl.program_id(0) % parts
    lane = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(k),), 0)
    ranks = ref["hidden"].shape[1] if "hidden" in ref else 0
    mine = [part * share + i for i in range(share if ranks else 0)]
    chunks = [mine[i : i + AHEAD] for i in range(0, len(mine), AHEAD)]

    def load(name, *place, start=0, exists=True):
        return plt.load(ref[name].at[*place, start + lane], mask=(lane < k) & exists, other=0.0)

    def load_lines(chunk=()):
        return [load("a", layer, rank, exists=rank < ranks) for rank in chunk]

    # Loads before the first sum: none would start until its end.
    x, second = load("x", row), None
    if kind == "rms_norm":
        second = load("scale", layer)
    elif kind == "silu_gate":
        second = load("x", row, start=k)
    lines = load_lines(*chunks[:1])

    value, norm = x.astype(jnp.float32), jnp.float32(1)
    if kind == "rms_norm":
        norm = jax.lax.rsqrt(jnp.sum(value * value) / k + epsilon)
        value = value * (second.astype(jnp.float32) + offset)
    elif kind == "silu_gate":
        value = value / (1 + jnp.exp(-value)) * second.astype(jnp.float32)
    if "y" in ref:
        inside = (lane < k) & (part == 0)
        plt.store(ref["y"].at[row, lane], (value * norm).astype(x.dtype), mask=inside)
    for chunk, following in itertools.zip_longest(chunks, chunks[1:], fillvalue=()):
        for rank, line in zip(chunk, lines):
            # The norm is a factor of the sum, which need not wait for it.
            hidden = jnp.sum(value * line.astype(jnp.float32)) * (norm * factor)
            plt.store(ref["hidden"].at[row, rank], hidden.astype(x.dtype), mask=rank < ranks)
        lines = load_lines(following)
