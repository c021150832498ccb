"""A GGUF file of llama.cpp, read as if it were the model folder of Hugging Face it was made from.

Its metadata become a config.json, its tensors get the names and the order of that folder. Names are
those of the `gguf` package; what llama.cpp's converter changes is undone in `gguf_tensors`.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from qjax.core.qtensor import QTensor
from qjax.hf.extras import require
from qjax.hf.families import family
from qjax.hf.gguf_config import config_json, model_type
from qjax.hf.gguf_header import check_header
from qjax.hf.gguf_tensors import FACTORS, Parts, restore, tensor_parts


class GGUFFile:
    """Reads one tensor at a time from the memory-mapped file.

    Attributes:
        config: what the model looks like.
        data: the config.json.
        dtype: "float32": whatever the file stores, tensors are decoded to it.
        family: the family of the architecture.
        tensors: names of the weights, as Hugging Face spells them.
        bnb, packed: nothing: a GGUF file has no weights of bitsandbytes.
    """

    dtype = "float32"
    bnb = None
    packed: Mapping[str, frozenset[str]] = MappingProxyType({})

    def __init__(self, path: Path):
        self.path = path
        metadata = Metadata(path)
        self._stored = {tensor.name: tensor for tensor in metadata.reader.tensors}
        kind = model_type(metadata)
        shapes = {name: [int(n) for n in t.shape[::-1]] for name, t in self._stored.items()}
        factors = {n: self._decode(n) for n in FACTORS if n in self._stored}
        try:
            self.data = config_json(kind, metadata, shapes, factors)
            self.family = family(self.data)
            self._parts = self._find_parts(kind)
            self.config = self.family.config(self.data, self._parts)
        except KeyError as error:
            raise ValueError(f"{path}: no {error}") from None
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{path}: {error}") from None
        used = {part for parts in self._parts.values() for part in parts.names}
        # What is not used is shown under its own name, so that it is not passed over.
        self.tensors = frozenset(self._parts) | (self._stored.keys() - used - set(FACTORS))

    def _find_parts(self, kind: str) -> dict[str, Parts]:
        layers = next(self.data[k] for k in ("num_hidden_layers", "n_layer") if k in self.data)
        if not 0 < layers <= len(self._stored):
            raise ValueError(f"block_count={layers} must be from 1 to the number of tensors")
        experts = self.data.get("num_local_experts", 1)
        if experts > max(max(t.shape, default=1) for t in self._stored.values()):
            raise ValueError(f"expert_count={experts} is more than any tensor has")
        return tensor_parts(kind, self.family, layers, experts, self._stored)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32 in the order of Hugging Face's file."""
        parts = self._parts[name]
        return restore(self.data, name, [self._decode(part, parts.expert) for part in parts.names])

    def packed_like(self, name: str) -> QTensor:
        """Never called: there is nothing in `packed`."""
        raise KeyError(name)

    read_packed = packed_like

    def _decode(self, name: str, expert: int | None = None) -> np.ndarray:
        tensor = self._stored[name]
        data = tensor.data if expert is None else tensor.data[expert]
        try:
            with np.errstate(all="ignore"):  # of scales that are not finite
                return require("gguf.quants", "gguf").dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise NotImplementedError(
                f"{self.path}: tensor {name!r} is {tensor.tensor_type.name}, "
                "which the gguf package cannot decode"
            ) from None


class Metadata:
    """The key-value pairs at the head of a GGUF file, as Python values."""

    def __init__(self, path: Path):
        gguf = require("gguf", "gguf")
        try:
            check_header(path)
            self.reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise ValueError(f"{path} is not a whole GGUF file: {error}") from None
        self.path = path

    def get(self, key: str, *default: Any) -> Any:
        """Return a value; a missing key without a default is an error that names it."""
        field = self.reader.get_field(key)
        if field is not None:
            return field.contents()
        if not default:
            raise ValueError(f"{self.path} has no metadata key {key!r}")
        return default[0]
