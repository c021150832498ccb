"""A model folder of Hugging Face: config.json and safetensors, one file or shards with an index."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qjax.core.qtensor import QTensor
from qjax.hf.bitsandbytes import packed_weights, qtensor_like, read_qtensor
from qjax.hf.bnb_config import BnbConfig, read_bnb_config
from qjax.hf.bnb_int8 import int8_like, int8_weights, read_int8
from qjax.hf.families import Family, family
from qjax.hf.group_config import METHODS, GroupConfig, read_group_config
from qjax.hf.integer_groups import grouped_like, grouped_weights, read_grouped
from qjax.hf.mxfp4 import decode_mxfp4, mxfp4_weights

_DTYPES = ("float32", "bfloat16", "float16", "float64")
# Keys of config.json that say how many of something there are, each with tensors of its own.
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "num_local_experts")
_INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """Reads one tensor at a time; nothing else of the files is in memory.

    Attributes:
        config: what the model looks like.
        family: the family that config.json names.
        dtype: name of the dtype that config.json declares.
        data: the whole config.json.
        bnb: its `quantization_config`, if that is bitsandbytes'; or None.
        groups: the same, if it is GPTQ's or AWQ's; or None.
        tensors: names of the weights, as the family spells them.
        packed: those that are in 4 or 8 bits -> the tensors of each.
    """

    def __init__(self, folder: Path):
        data = read_json(folder / "config.json")
        self.data = data
        self.path = folder
        self.bnb, self.groups = self._read_quantization()
        self.family: Family = family(data)
        files = _tensor_files(folder)
        self._stored = {_today(name, self.family, files): name for name in files}
        self._files = {name: files[old] for name, old in self._stored.items()}
        try:
            four_bit = packed_weights(self._stored)
            self._mxfp4 = mxfp4_weights(self._stored)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        self._int8 = int8_weights(self._stored)
        self._grouped = grouped_weights(self._stored) if self.groups else {}
        if self.groups and not self._grouped:
            raise ValueError(
                f"{folder} has no .qweight: nothing of it is in {self.groups.method.upper()}"
            )
        self.packed = {**four_bit, **self._int8, **self._grouped}
        parts = {part for held in (*self.packed.values(), *self._mxfp4.values()) for part in held}
        weights = self.packed.keys() & (self._stored.keys() | self._grouped.keys())
        weights |= self._mxfp4.keys()
        self.tensors = frozenset(self._stored.keys() - parts | weights)
        self.config = self._read_config()
        dtype = data.get("dtype") or data.get("torch_dtype") or "float32"
        if dtype not in _DTYPES:
            raise ValueError(f"{folder / 'config.json'}: dtype={dtype!r} must be one of {_DTYPES}")
        self.dtype: str = dtype

    def _read_quantization(self) -> tuple[BnbConfig | None, GroupConfig | None]:
        data = self.data.get("quantization_config")
        if not data:
            return None, None
        where = f"{self.path / 'config.json'}: quantization_config"
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be a JSON object")
        method = data.get("quant_method")
        if method in METHODS:
            return None, read_group_config(data, where)
        # The tensors themselves show what is in MXFP4.
        return None if method == "mxfp4" else read_bnb_config(data, where), None

    def _read_config(self):
        file = self.path / "config.json"
        for key in _COUNTS:
            count = self.data.get(key)
            if isinstance(count, int) and count > len(self.tensors):
                raise ValueError(f"{file} says {key}={count}: more than there are tensors")
        try:
            return self.family.config(self.data, self.tensors)
        except KeyError as error:
            raise ValueError(f"{file}: no key {error}") from None
        except NotImplementedError:
            raise
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{file}: {error}") from None

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in torch's layout, [out, in] for a linear layer, in its stored dtype.

        One in MXFP4 is decoded to bfloat16 [experts, in, out], which is how gpt-oss has it in
        float.
        """
        if name not in self._mxfp4:
            return self._read(name)
        return self._explain(decode_mxfp4, name, *map(self._read, self._mxfp4[name]))

    def packed_like(self, name: str) -> QTensor:
        """Return a weight that is stored in 4 or 8 bits as a QTensor [in, out], abstract."""
        if name in self._int8:
            threshold = self.bnb.quant.int8_threshold if self.bnb else None
            return self._explain(int8_like, self._shape(name), name, self.dtype, threshold)
        if name in self._grouped:
            shape = self._shape(name.removesuffix("weight") + "qweight")
            return self._explain(grouped_like, shape, name, self.groups, self.dtype)
        return self._explain(qtensor_like, self._read, name, self.packed[name])

    def read_packed(self, name: str) -> QTensor:
        """Return a weight that is stored in 4 or 8 bits as it is, as a QTensor [in, out]."""
        parts = self.packed[name]
        if name in self._int8:
            return self._explain(read_int8, self._read, name, parts, self.packed_like(name))
        if name in self._grouped:
            like = self.packed_like(name)
            return self._explain(read_grouped, self._read, name, parts, self.groups, like)
        return self._explain(read_qtensor, self._read, name, parts)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(name, lambda file, stored: file.get_slice(stored).get_shape()))

    def _explain(self, read, *args):
        try:
            return read(*args)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _read(self, name: str) -> np.ndarray:
        return self._open(name, lambda file, stored: file.get_tensor(stored))

    def _open(self, name: str, get: Callable[[Any, str], Any]) -> Any:
        path = self._files[name]
        try:
            with safe_open(path, framework="numpy") as file:
                return get(file, self._stored[name])
        except SafetensorError as error:
            raise ValueError(f"{path}: tensor {name!r} cannot be read: {error}") from None


def read_json(file: Path) -> Mapping[str, Any]:
    """Read a JSON object; a missing or malformed file is a ValueError that names it."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}, not a JSON object")
    return data


def _today(name: str, family: Family, files: Mapping[str, Path]) -> str:
    """Return the family's name of a tensor of an old file, or of a model saved without its head."""
    for old, new in family.renamed.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    headless = not any(other.startswith(family.prefix) for other in files)
    return family.prefix + name if headless else name


def _tensor_files(folder: Path) -> Mapping[str, Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(_names_in(single), single)
    if not (folder / _INDEX).is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        reason = f" ({pickled[0]} is a pickle: loading it could run any code)" if pickled else ""
        raise ValueError(f"{folder} has neither model.safetensors nor {_INDEX}{reason}")
    shards = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{folder / _INDEX} has no weight_map")
    for shard in set(shards.values()):
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(f"{folder / _INDEX}: {shard!r} is not a file name in the folder")
    held = {shard: _names_in(folder / shard) for shard in sorted(set(shards.values()))}
    for name, shard in shards.items():
        if name not in held[shard]:
            raise ValueError(f"{folder / _INDEX} puts {name!r} in {shard}, which does not hold it")
    return {name: folder / shard for name, shard in shards.items()}


def _names_in(file: Path) -> frozenset[str]:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}")
    try:
        with safe_open(file, framework="numpy") as f:
            return frozenset(f.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
