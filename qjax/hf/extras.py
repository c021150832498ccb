"""Small helpers of this package: optional imports, and files written whole or not at all."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say in one line what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # installed, but one of its own imports is missing: do not hide that
        raise ModuleNotFoundError(
            f"{module} is not installed: pip install 'qjax-quant[{extra}]'", name=module
        ) from None


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` write a temporary file, and only then put it in the place of `file`."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
