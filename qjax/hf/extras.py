"""Optional packages, imported when first needed."""

import importlib
from types import ModuleType


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
