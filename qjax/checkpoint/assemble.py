"""QTensors and boxes put together from named leaves, for a checkpoint loaded without `like`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.checkpoint.tree import Marks, nest
from qjax.core.double_quant import DoubleQuant
from qjax.core.qtensor import QTensor
from qjax.nn.linen_box import QuantBox
from qjax.nn.lora import ADAPTER_LEAVES

_DOUBLE = tuple(field.name for field in dataclasses.fields(DoubleQuant))
_SCALES = (["packed", "scales"], ["packed", *(f"scales/{part}" for part in sorted(_DOUBLE))])


def assemble(marks: Marks, leaves: Mapping[str, Any]) -> Any:
    """Return nested dicts, with a QTensor or a `QuantBox` at each marked path.

    Args:
        marks: QTensors and boxes for their static fields alone.
        leaves: name -> array, or what stands for one.

    Raises:
        ValueError: a marked path has not the leaves it needs, or has others.
    """
    nodes = dict(leaves)
    for name, q in marks.qtensors.items():
        nodes[name] = _qtensor(q, name, _take(nodes, name))
    for name, box in marks.boxes.items():
        nodes[name] = _box(box, name, marks.scalings.get(name, 1.0), _take(nodes, name))
    return nodes[""] if "" in nodes else nest(nodes)


def _take(nodes: dict[str, Any], name: str) -> dict[str, Any]:
    """Remove all that is inside `name`, and return it with names from there."""
    prefix = f"{name}/" if name else ""
    inside = [n for n in nodes if n.startswith(prefix)]
    return {n.removeprefix(prefix): nodes.pop(n) for n in inside}


def _qtensor(q: QTensor, name: str, parts: dict[str, Any]) -> QTensor:
    if sorted(parts) not in _SCALES:
        raise ValueError(
            f"{name}: a QTensor is {_SCALES[0]} or {_SCALES[1]}, found {sorted(parts)}"
        )
    scales = parts.get("scales")
    if scales is None:
        scales = DoubleQuant(**{part: parts[f"scales/{part}"] for part in _DOUBLE})
    q = dataclasses.replace(q, packed=parts["packed"], scales=scales)
    q.check(name)
    return q


def _box(box: QuantBox, name: str, scaling: float, parts: dict[str, Any]) -> QuantBox:
    whole = set(parts) in ({"q"}, {"q", "lora_a", "lora_b"}, {"q", *ADAPTER_LEAVES})
    if not whole or not isinstance(parts["q"], QTensor):
        raise ValueError(
            f"{name}: a QuantBox is a QTensor q with or without lora_a and lora_b, and these with "
            f"or without lora_magnitude, found {sorted(parts)}"
        )
    return dataclasses.replace(box, **parts, scaling=scaling)
