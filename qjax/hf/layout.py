"""Which tensors of a checkpoint each array of a model is, and in what order of axes."""

from collections.abc import Iterator
from typing import NamedTuple

from flax import nnx

from qjax.hf.families import Family
from qjax.nn.nnx_adapter import SavedParam
from qjax.nn.nnx_param import QuantParam

# What a layer calls its arrays -> what files call them.
_SUFFIX = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class Stored(NamedTuple):
    """Where an array of the model is.

    Attributes:
        names: the tensors, in the order of the stacked axes.
        stack: leading axes that the tensors fill (layers, experts); () for a single tensor.
        transposed: each is [out, in], for our [in, out].
        stacks_experts: the last stacked axis is that of experts.
        block_axis: of a matrix as it is stored: blocks of 4-bit weights run along it. It is the
            last, as in bitsandbytes, which turns GPT-2's [in, out] matrices first.
    """

    names: tuple[str, ...]
    stack: tuple[int, ...]
    transposed: bool
    stacks_experts: bool = False
    block_axis: int = 1


def arrays(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Module, str]]:
    """Yield (path of the layer, layer, name of the array) for all weights of the model."""
    for path, layer in nnx.iter_modules(model):
        for leaf, value in vars(layer).items():
            of_base = isinstance(value, nnx.Param | QuantParam | SavedParam)
            if of_base and (isinstance(value, SavedParam) or not isinstance(value, nnx.LoRAParam)):
                yield path, layer, leaf


def stored(family: Family, config, path: tuple, layer: nnx.Module, leaf: str) -> Stored:
    """Return where the array `leaf` of the layer at `path` is.

    Raises:
        KeyError: the family has no name for it.
    """
    template, indices, stack = layer_axis(path, config)
    conv1d = family.conv1d and template[0] == "layers" and leaf == "kernel"
    own = "/".join([*template, leaf])
    if own in family.names:
        name, suffix, transposed = family.names[own], "", False
    else:
        name, suffix = family.names["/".join(template)], f".{_SUFFIX[leaf]}"
        transposed = leaf == "kernel" and not conv1d
    experts = range(1)
    if "{e}" in name:
        experts, transposed = range(config.experts.count), True
        stack = (*stack, config.experts.count)
    names = tuple(name.format(i, e=e) + suffix for i in indices for e in experts)
    return Stored(names, stack, transposed, "{e}" in name, 0 if conv1d else 1)


def layer_axis(path: tuple, config) -> tuple[tuple[str, ...], range, tuple[int, ...]]:
    """Return the path with "{}" for the layer's index, its indices, and the stacked axis."""
    for i, part in enumerate(path):
        if isinstance(part, int):
            return (*path[:i], "{}", *path[i + 1 :]), range(part, part + 1), ()
        if part == "layers" and not (i + 1 < len(path) and isinstance(path[i + 1], int)):
            count = config.num_hidden_layers
            return (*path[: i + 1], "{}", *path[i + 1 :]), range(count), (count,)
    return path, range(1), ()
