"""Any checkpoint that `qjax inspect` knows, as a model that runs, with its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

import qjax
from qjax.checkpoint.loading import describe
from qjax.core.config import QuantConfig
from qjax.core.qtensor import QTensor
from qjax.hf.gguf import Metadata
from qjax.hf.hub import locate
from qjax.hf.layout import arrays
from qjax.hf.pretrained import open_checkpoint
from qjax.hf.skeleton import skeleton
from qjax.hf.streaming import Checkpoint
from qjax.models import CausalLM, Seq2SeqLM
from qjax.nn.lora import ADAPTER_LEAVES
from qjax.nn.nnx_param import QuantParam
from qjax.swap.leaves import iter_leaves
from qjax.swap.nnx_find import find_layers


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that was loaded to be measured.

    Attributes:
        name: the path as it was given, and the format that it was quantized to.
        model: with float layers in `dtype`, computing in it.
        tokenizer: None where the checkpoint has none.
        params: parameters.
        nbytes: as the checkpoint stores them, or as they were quantized; scales included.
    """

    name: str
    model: Any
    tokenizer: Any
    params: int
    nbytes: int

    @property
    def bits_per_param(self) -> float:
        """Bits of a parameter, embeddings and norms included."""
        return 8 * self.nbytes / self.params


def load_model(
    path: str, *, dtype: Any, config: QuantConfig | None = None, base: str | None = None
) -> Loaded:
    """Load a model folder, a .gguf file, a model of the hub, or a folder that `qjax.save` wrote.

    Args:
        path: where it is.
        dtype: of the computation, and of float weights.
        config: quantizes a float model as it is read.
        base: for a folder of `qjax.save`, which holds arrays alone: the model that it was made of,
            for what it looks like and for its tokenizer.

    Raises:
        ValueError: not a checkpoint, or no `base` for one of `qjax.save`; a config for a model that
            is in 4 or 8 bits.
        NotImplementedError: an encoder-decoder model; a checkpoint of `qjax.save` with adapters.
    """
    if is_saved(path):
        return _load_saved(path, config, dtype, base)
    source = open_checkpoint(path)
    _check_kind(path, source)
    if config is not None and source.packed:
        raise ValueError(f"{path} is quantized already: it cannot be quantized to {config.format}")
    scan = _can_scan(source, config, dtype)
    model = qjax.from_pretrained(path, config=config, dtype=dtype, scan_layers=scan)
    if config is None and Path(path).suffix == ".gguf":
        tensors = Metadata(locate(path)).reader.tensors
        params = sum(int(tensor.n_elements) for tensor in tensors)
        nbytes = sum(int(tensor.n_bytes) for tensor in tensors)
    else:
        totals = qjax.report(skeleton(source, config)[0]).totals  # in the dtype of the checkpoint
        params, nbytes = totals.params, totals.nbytes
    name = path if config is None else f"{path} in {config.format}"
    return Loaded(name, model, _tokenizer(locate(path)), params, nbytes)


def is_saved(path: str) -> bool:
    """Whether `qjax.save` wrote it."""
    return Path(path, "_CHECKPOINT_METADATA").exists()


def _check_kind(path: str, source: Checkpoint) -> None:
    if source.family.model is Seq2SeqLM:
        raise NotImplementedError(f"{path} is an encoder-decoder model, which is not evaluated")


def _can_scan(source: Checkpoint, config: QuantConfig | None, dtype: Any) -> bool:
    """Whether the layers can be stacked, which compiles faster: all must be alike."""
    if source.family.model is not CausalLM:
        return False
    if config is not None and (config.include or config.exclude or config.overrides):
        return False
    try:
        skeleton(source, config, dtype, scan_layers=True)
    except ValueError:  # 4-bit weights of different formats; or a fault that loading will show
        return False
    return True


def _tokenizer(path: Path) -> Any:
    if path.is_dir():
        found = (path / "tokenizer.json").is_file()
    else:
        found = Metadata(path).get("tokenizer.ggml.model", None) is not None
    if not found:
        return None
    return qjax.load_tokenizer(path)


def _load_saved(path: str, config: QuantConfig | None, dtype: Any, base: str | None) -> Loaded:
    if config is not None:
        raise ValueError(f"{path} is a checkpoint of qjax.save: it cannot be quantized here")
    if base is None:
        raise ValueError(
            f"{path} is a checkpoint of qjax.save, which does not say what its model looks like: "
            "name the model that it was made of as well"
        )
    source = open_checkpoint(base)
    _check_kind(base, source)
    model = _as_saved(path, source, base, dtype)
    totals = qjax.report(model).totals
    model = qjax.load(path, like=model)
    return Loaded(path, model, _tokenizer(locate(base)), totals.params, totals.nbytes)


def _as_saved(path: str, source: Checkpoint, base: str, dtype: Any) -> nnx.Module:
    """Return the model of a checkpoint of `qjax.save`, with abstract arrays."""
    held = {name: leaf for name, leaf, _ in iter_leaves(describe(path))}
    if adapters := [name for name in held if name.endswith(ADAPTER_LEAVES)]:
        raise NotImplementedError(
            f"{path} holds adapters, first {adapters[0]!r}: qjax.merge_lora them and save again"
        )
    stacked = not any(name.startswith("layers/0/") for name in held)
    shape = dataclasses.replace(source.config, scan_layers=stacked)
    model = nnx.eval_shape(lambda: source.family.model(shape, dtype=dtype, rngs=nnx.Rngs(0)))
    classes = {id(found.layer): found.cls for found in find_layers(model)}
    for parts, layer, leaf in list(arrays(model)):
        name = "/".join(map(str, (*parts, leaf)))
        if name not in held:
            raise ValueError(f"{path} has no {name!r}: it does not hold a model like {base}")
        if isinstance(held[name], QTensor):
            cls = classes[id(layer)]
            cls.convert(layer, QuantConfig(compute_dtype=dtype), weight=QuantParam(held[name]))
        else:
            getattr(layer, leaf).set_raw_value(held[name])
    return model
