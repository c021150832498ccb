"""Which weights are quantized, decided by path and role; and which layers get adapters.

Embeddings, norms, routers and the output head stay as they are by default: they are small or
sensitive, and a quantized head costs more memory in training than it saves. Whoever asks for one
by an `include` pattern gets it.
"""

import re
import warnings
from collections.abc import Iterable, Mapping

from qjax.core.config import QuantConfig
from qjax.nn.lora import LoraConfig

_HEAD = re.compile(
    r"(^|/)(lm_head|output_head|head|logits(_dense)?|unembed(ding)?|classifier)(/|$)"
)
_NORM = re.compile(r"(^|/)[a-z0-9_]*(norm|ln)(_?[a-z0-9]+)?(/|$)", re.IGNORECASE)
_ROUTER = re.compile(r"(^|/)(\w*router\w*)(/|$)", re.IGNORECASE)
_GATE = re.compile(r"(^|/)gate(/|$)")
_MANY_EXPERTS = 256  # a "gate" with no more outputs than this routes; a larger one is a GLU's


def skip_reason(
    path: str, cfg: QuantConfig, *, role: str = "dense", out_size: float | None = None
) -> str | None:
    """Return why the weight at `path` is left in floating point, or None to quantize it.

    Args:
        path: "/"-joined, such as "layers/0/mlp/up_proj/kernel".
        cfg: its include and exclude decide first.
        role: "dense", or "embedding" for a lookup table.
        out_size: product of the weight's output axes, which tells a router from a gated MLP;
            infinite for one of `glu_gates`.
    """
    if matches(path, cfg.exclude):
        return f"matches exclude={cfg.exclude}"
    if cfg.include is not None:
        return None if matches(path, cfg.include) else f"not in include={cfg.include}"
    if role == "embedding":
        return "embeddings are kept by default"
    if _HEAD.search(path):
        return "the output head is kept by default"
    if _ROUTER.search(path) or (_GATE.search(path) and (out_size or 0) <= _MANY_EXPERTS):
        return "routers are kept by default"
    if _NORM.search(path):
        return "norms are kept by default"
    return None


def glu_gates(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Return the paths of layers named "gate" that route nothing: one beside them has their shape.

    Args:
        shapes: of all weights, by path.
    """
    split = {path: path.split("/") for path in shapes}

    def is_beside(other: str, path: str) -> bool:
        at = split[path].index("gate")
        rest = [names[:at] + names[at + 1 :] for names in (split[other], split[path])]
        return other != path and shapes[other] == shapes[path] and rest[0] == rest[1]

    gates = [path for path in shapes if _GATE.search(path)]
    return {path for path in gates if any(is_beside(other, path) for other in shapes)}


def matches(path: str, patterns: str | Iterable[str] | None) -> bool:
    """Return whether any of the patterns is found in the path."""
    return any(re.search(pattern, path) for pattern in patterns or ())


def check_patterns(cfg: QuantConfig | LoraConfig, paths: Iterable[str], what: str) -> None:
    """Raise ValueError for an include pattern that matches none of the paths; warn of the others.

    Args:
        cfg: whose `include`, `exclude` and `overrides` are checked.
        paths: of all candidates.
        what: the candidates' name in the message, such as "dense layer".
    """
    paths = list(paths)
    for pattern in cfg.include or ():
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"include={pattern!r} matches no {what}; there are: {listed(paths) or 'none'}"
            )
    # Not an error: one config may serve models of which some lack what it leaves alone.
    others = [(f"exclude={pattern!r}", pattern) for pattern in cfg.exclude or ()]
    others += [(f"overrides[{pattern!r}]", pattern) for pattern, _ in cfg.overrides]
    for name, pattern in others:
        if not any(re.search(pattern, path) for path in paths):
            warnings.warn(
                f"{name} matches no {what} and changes nothing; there are: {listed(paths)}",
                stacklevel=3,
            )


def listed(paths: list[str]) -> str:
    """Return paths for a message, the first of many."""
    return ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
