"""GPTQConfig and AwqConfig, the `quantization_config` of such checkpoints: what is read of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qjax.core.formats import format_of

METHODS = ("gptq", "awq")
FORMAT = "int4_asym"


@dataclass(frozen=True)
class GroupConfig:
    """What a `quantization_config` says of such weights.

    Attributes:
        method: "gptq" or "awq".
        group_size: inputs that share a step and a zero point.
        offset: whether zero points are stored less one, as GPTQ's first version has them.
        act_order: whether inputs may have been sorted, so that a weight must say their groups.
    """

    method: str
    group_size: int
    offset: bool
    act_order: bool = False


def read_group_config(data: Mapping[str, Any], where: str = "quantization_config") -> GroupConfig:
    """Read the dict of GPTQConfig or AwqConfig; what does not say how to decode is not looked at.

    Raises:
        NotImplementedError: other bits, another layout, or bits that differ by module.
        ValueError: a group size that is none.
    """
    method = data["quant_method"]
    bits = data.get("bits", data.get("w_bit"))
    if bits != 4:
        raise NotImplementedError(f"{where}: bits={bits!r} of {method!r} is not read; only 4")
    layouts = ("gptq", "gptq_v2") if method == "gptq" else ("gemm",)
    layout = next(
        (data[k] for k in ("checkpoint_format", "format", "version") if data.get(k)), None
    )
    layout = str(layout or layouts[0]).lower()
    if layout not in layouts or data.get("is_marlin_format"):
        found = layout if layout not in layouts else "marlin"
        raise NotImplementedError(f"{where}: format={found!r} is not read; only {layouts}")
    if data.get("pack_dtype", "int32") != "int32":
        raise NotImplementedError(
            f"{where}: pack_dtype={data['pack_dtype']!r}; only 'int32' is read"
        )
    if changed := [key for key in data.get("dynamic") or () if not key.startswith("-")]:
        raise NotImplementedError(
            f"{where}: dynamic={changed} gives some modules another format; only one is read"
        )
    size, sizes = data.get("group_size", data.get("q_group_size")), format_of(FORMAT).block_sizes
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"{where}: group_size={size!r} must be an int")
    if size not in sizes:
        raise NotImplementedError(f"{where}: group_size={size} is not read; only {sizes}")
    return GroupConfig(method, size, layout == "gptq", bool(data.get("desc_act")))
