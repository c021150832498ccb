"""QTensors and boxes put together from named leaves, for a checkpoint loaded without `like`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.checkpoint.tree import Marks, nest
from qjax.core.qtensor import QTensor
from qjax.core.scales import CLASSES
from qjax.nn.linen_box import QuantBox

_SCALES = {
    frozenset(f"scales/{field.name}" for field in dataclasses.fields(cls)): cls for cls in CLASSES
}


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
    rest = frozenset(parts) - {"packed"}
    if "packed" not in parts or (rest != {"scales"} and rest not in _SCALES):
        raise ValueError(
            f"{name}: a QTensor is packed and scales, or the parts of scales; found {sorted(parts)}"
        )
    if rest == {"scales"}:
        scales = parts["scales"]
    else:
        scales = _SCALES[rest](**{part.removeprefix("scales/"): parts[part] for part in rest})
    q = dataclasses.replace(q, packed=parts["packed"], scales=scales)
    q.check(name)
    return q


def _box(box: QuantBox, name: str, scaling: float, parts: dict[str, Any]) -> QuantBox:
    if set(parts) not in ({"q"}, {"q", "lora_a", "lora_b"}) or not isinstance(parts["q"], QTensor):
        raise ValueError(
            f"{name}: a QuantBox is a QTensor q with or without lora_a and lora_b, "
            f"found {sorted(parts)}"
        )
    return dataclasses.replace(box, **parts, scaling=scaling)
