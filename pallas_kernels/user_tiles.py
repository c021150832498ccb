"""What `qjax tune` measured on this machine, for dispatch to read: a JSON file of the user's.

The file is `matmul.json` in the folder that the environment variable QJAX_CACHE names, else in
`qjax` under XDG_CACHE_HOME or `~/.cache`. It is read once a process, while tracing. A file that is
broken, or was measured with other kernels than these, is left aside with a warning.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import warnings
from typing import Any

from pallas_kernels.matmul.config import DecodeTiles, MidTiles
from pallas_kernels.matmul.config_large import LargeTiles

FORMAT = 1
TILES = {cls.__name__: cls for cls in (DecodeTiles, MidTiles, LargeTiles)}
BACKENDS = ("mosaic_gpu", "mosaic_large", "triton", "decoded", "xla")

Tiles = DecodeTiles | MidTiles | LargeTiles


@dataclasses.dataclass(frozen=True)
class Key:
    """A matmul as far as its tiles depend on it; x has `m` rows."""

    m: int
    n: int
    k: int
    block_size: int
    dtype: str
    double: bool = False
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """The fastest backend of a matmul, with its tiles if it has any, and its time."""

    backend: str
    tiles: Tiles | None
    us: float


def path() -> pathlib.Path:
    """Where the file is, or would be."""
    if folder := os.environ.get("QJAX_CACHE"):
        return pathlib.Path(folder) / "matmul.json"
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "qjax" / "matmul.json"


def lookup(kind: str, key: Key) -> Choice | None:
    """The choice measured for the least number of rows from `key.m` to twice that, or None."""
    measured = _read(path()).get(kind, {})
    rows = sorted(other.m for other in measured if dataclasses.replace(key, m=other.m) == other)
    best = next((m for m in rows if key.m <= m < 2 * key.m), None)
    return None if best is None else measured[dataclasses.replace(key, m=best)]


def add(kind: str, choices: dict[Key, Choice]) -> pathlib.Path:
    """Add the choices of a device kind to the file, in place of those of the same keys."""
    where = path()
    devices = dict(_read(where))
    devices[kind] = devices.get(kind, {}) | choices
    entries = {
        name: [{"key": dataclasses.asdict(k), "choice": _as_json(c)} for k, c in found.items()]
        for name, found in devices.items()
    }
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = where.with_suffix(f".{os.getpid()}.partial")
    text = json.dumps({"format": FORMAT, "kernels": fingerprint(), "devices": entries}, indent=1)
    partial.write_text(text + "\n")
    partial.replace(where)
    forget()
    return where


def forget() -> None:
    """Read the file again at the next lookup; programs already traced keep their tiles."""
    _read.cache_clear()


@functools.cache
def fingerprint() -> str:
    """A digest of the kernels' sources: times of other kernels say nothing about these."""
    here = pathlib.Path(__file__).parent
    parts = "mosaic*.py", "matmul/*.py", "dequantize/*.py"
    sources = sorted(file for part in parts for file in here.glob(part))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]


def _as_json(choice: Choice) -> dict[str, Any]:
    tiles = choice.tiles
    fields = None
    if tiles is not None:
        fields = {"type": type(tiles).__name__} | dataclasses.asdict(tiles)
    return {"backend": choice.backend, "tiles": fields, "us": choice.us}


@functools.cache
def _read(where: pathlib.Path) -> dict[str, dict[Key, Choice]]:
    """The choices by device kind; none if there is no file, or none that can be used."""
    try:
        report = json.loads(where.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _leave_aside(where, f"it cannot be read ({error})")
    try:
        if report["format"] != FORMAT:
            return _leave_aside(where, f"its format is {report['format']!r}, not {FORMAT}")
        if report["kernels"] != fingerprint():
            return _leave_aside(where, "it was measured with other kernels; run `qjax tune` again")
        return {
            kind: {_build(Key, entry["key"]): _choice(**entry["choice"]) for entry in entries}
            for kind, entries in report["devices"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return _leave_aside(where, f"{type(error).__name__}: {error}")


def _leave_aside(where: pathlib.Path, why: str) -> dict:
    warnings.warn(f"the tiles in {where} are not used: {why}", stacklevel=2)
    return {}


def _choice(backend: str, tiles: dict | None, us: float) -> Choice:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, and must be one of {BACKENDS}")
    return Choice(backend, None if tiles is None else _build(TILES[tiles["type"]], tiles), us)


def _build(cls: type, fields: dict[str, Any]) -> Any:
    """An instance of a dataclass, its fields checked: their names, their types, sizes from 0."""
    fields = {name: value for name, value in fields.items() if name != "type"}
    for field in dataclasses.fields(cls):
        value = fields.get(field.name, field.default)
        if type(value) is not field.type or (field.type is int and value < 0):
            raise ValueError(f"{cls.__name__}.{field.name} is {value!r}")
    return cls(**fields)
