"""bitsandbytes' 4-bit weights in a checkpoint: the tensors that make up one, read and written.

A weight [out, in] is `<name>` (packed codes, uint8 [ceil(n / 2), 1]), `<name>.absmax`,
`<name>.quant_map` (the codebook) and `<name>.quant_state.bitsandbytes__nf4` (JSON, as bytes); with
double quantization also `<name>.nested_absmax` and `<name>.nested_quant_map`. The bytes are a
`QTensor`'s own, reshaped. Source: bitsandbytes 0.50, functional.py, QuantState.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scales import SECOND_LEVEL_BLOCK
from qjax.core.codebook import codebook
from qjax.core.double_quant import DoubleQuant, dynamic_table
from qjax.core.qtensor import QTensor, array_shapes, layout_for

_STATE = ".quant_state.bitsandbytes__"
_FORMATS = ("nf4", "fp4")
_DTYPES = ("float32", "bfloat16", "float16")
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}

Read = Callable[[str], np.ndarray]  # a tensor by its name


def packed_weights(tensors: Collection[str]) -> dict[str, frozenset[str]]:
    """Return the 4-bit weights among the tensors, each with the tensors that belong to it.

    Raises:
        ValueError: a weight without its quant_state, or with two.
    """
    found: dict[str, str] = {}
    for tensor in tensors:
        name, mark, _ = tensor.partition(_STATE)
        if mark:
            if name in found:
                raise ValueError(f"{name!r} has two quant states, {found[name]!r} and {tensor!r}")
            found[name] = tensor
    parts = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    weights = {}
    for name, state in found.items():
        held = frozenset(name + part for part in parts if name + part in tensors)
        weights[name] = held | {state}
    for tensor in tensors:
        owner = tensor.removesuffix(".absmax")
        if owner != tensor and owner not in found:
            raise ValueError(f"{tensor!r} is of a 4-bit weight without a quant_state")
    return weights


def qtensor_like(read: Read, name: str, parts: Collection[str]) -> QTensor:
    """Return the weight `name` as a QTensor [in, out] of abstract arrays; reads the quant_state.

    Args:
        read: reads a tensor.
        name: such as "model.layers.0.mlp.up_proj.weight", [out, in] in the file.
        parts: its tensors, as `packed_weights` gives them.

    Raises:
        ValueError: the quant_state is not one.
    """
    state_name, state = _read_state(read, parts)
    out, fan_in = state["shape"]
    block = state["blocksize"]
    empty: Any = None
    q = QTensor(
        packed=empty,
        scales=empty,
        slice_shape=(fan_in, out),
        dtype=jnp.dtype(state["dtype"]),
        format=state_name.partition(_STATE)[2],
        block_size=block,
        contract_axes=(0,),
        layout=layout_for(fan_in, block),
    )
    abstract: Any = jax.ShapeDtypeStruct
    packed, scales = array_shapes(q)
    first = abstract(scales, np.float32)
    if "nested_offset" in state:
        groups = -(-math.prod(scales) // SECOND_LEVEL_BLOCK)
        first = DoubleQuant(
            codes=abstract(scales, np.uint8),
            absmax=abstract((groups,), np.float32),
            offset=abstract((), np.float32),
        )
    return dataclasses.replace(q, packed=abstract(packed, np.uint8), scales=first)


def read_qtensor(read: Read, name: str, parts: Collection[str]) -> QTensor:
    """Read the weight `name`; the arguments are those of `qtensor_like`.

    Raises:
        ValueError: a part is missing, or does not fit the quant_state.
    """
    like = qtensor_like(read, name, parts)
    state = _read_state(read, parts)[1]

    def part(suffix, like):
        if name + suffix not in parts:
            raise ValueError(f"{name!r} has no {name + suffix!r}")
        value = read(name + suffix)
        if suffix == "":
            value = value.view(np.uint8)  # bnb_4bit_quant_storage: any dtype may hold the bytes
        if value.dtype != like.dtype or value.size != math.prod(like.shape):
            raise ValueError(
                f"{name + suffix!r} is {value.dtype.name}{list(value.shape)}; shape "
                f"{state['shape']} in blocks of {state['blocksize']} needs "
                f"{math.prod(like.shape)} {like.dtype.name}"
            )
        return jnp.asarray(np.ascontiguousarray(value).reshape(like.shape))

    def table(suffix, expected):
        found = part(suffix, jax.ShapeDtypeStruct(expected.shape, np.float32))
        # Zero has a sign in some of bitsandbytes' FP4 tables: compared as numbers.
        if not np.array_equal(found, expected):
            raise ValueError(f"{name + suffix!r} is not the table of its format")

    table(".quant_map", codebook(like.format))
    scales: Any = like.scales
    if isinstance(scales, DoubleQuant):
        table(".nested_quant_map", dynamic_table())
        scales = DoubleQuant(
            codes=part(".absmax", scales.codes),
            absmax=part(".nested_absmax", scales.absmax),
            offset=jnp.float32(state["nested_offset"]),
        )
    else:
        scales = part(".absmax", scales)
    return dataclasses.replace(like, packed=part("", like.packed), scales=scales)


def write_qtensor(name: str, q: QTensor) -> dict[str, np.ndarray]:
    """Return the tensors of a weight [in, out], as bitsandbytes would save it as [out, in].

    Raises:
        ValueError: not a plain matrix, or quantized along its other axis: no layout of theirs.
    """
    if q.ndim != 2 or q.batch_shape or q.contract_axes != (0,):
        raise ValueError(f"{name}: bitsandbytes has no layout for {q!r}")
    state: dict[str, Any] = {
        "quant_type": q.format,
        "blocksize": q.block_size,
        "dtype": jnp.dtype(q.dtype).name,
        "shape": list(q.shape[::-1]),
    }
    tensors = {name: np.asarray(q.packed).reshape(-1, 1), f"{name}.quant_map": codebook(q.format)}
    if isinstance(q.scales, DoubleQuant):
        state["nested_blocksize"] = SECOND_LEVEL_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(q.scales.offset)
        tensors[f"{name}.absmax"] = np.asarray(q.scales.codes).reshape(-1)
        tensors[f"{name}.nested_absmax"] = np.asarray(q.scales.absmax)
        tensors[f"{name}.nested_quant_map"] = dynamic_table()
    else:
        tensors[f"{name}.absmax"] = np.asarray(q.scales).reshape(-1)
    text = json.dumps(state).encode()
    return {**tensors, f"{name}{_STATE}{q.format}": np.frombuffer(text, np.uint8)}


def _read_state(read: Read, parts: Collection[str]) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the contents of the quant_state."""
    name = next(part for part in parts if _STATE in part)
    state = _parse_state(name, bytes(np.ascontiguousarray(read(name))))
    format = name.partition(_STATE)[2]
    if state["quant_type"] != format or format not in _FORMATS:
        raise ValueError(
            f"{name!r}: quant_type={state['quant_type']!r} must be the name's, one of {_FORMATS}"
        )
    return name, state


def _parse_state(name: str, data: bytes) -> Mapping[str, Any]:
    try:
        state = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{name!r} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{name!r} holds a {type(state).__name__}, not a JSON object")
    nested = _NESTED_KEYS & set(state)
    expected = _KEYS | (_NESTED_KEYS if nested else set())
    if set(state) != expected:
        raise ValueError(f"{name!r} has keys {sorted(state)}, must be {sorted(expected)}")
    shape, block = state["shape"], state["blocksize"]
    if not (isinstance(shape, list) and len(shape) == 2 and all(_is_size(n) for n in shape)):
        raise ValueError(f"{name!r}: shape={shape!r} must be two positive ints")
    if not _is_size(block) or block & (block - 1) or not 32 <= block <= 4096:
        raise ValueError(f"{name!r}: blocksize={block!r} must be a power of two from 32 to 4096")
    if state["dtype"] not in _DTYPES:
        raise ValueError(f"{name!r}: dtype={state['dtype']!r} must be one of {_DTYPES}")
    if nested:
        offset, second = state["nested_offset"], state["nested_blocksize"]
        if not isinstance(offset, int | float) or not math.isfinite(offset):
            raise ValueError(f"{name!r}: nested_offset={offset!r} must be a finite number")
        if second != SECOND_LEVEL_BLOCK or state["nested_dtype"] != "float32":
            raise ValueError(
                f"{name!r}: nested_blocksize={second!r} and nested_dtype="
                f"{state['nested_dtype']!r} must be {SECOND_LEVEL_BLOCK} and 'float32'"
            )
    return state


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n > 0
