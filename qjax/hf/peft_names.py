"""Where PEFT's names are in a model: dense layers, fused experts, and arrays that are replaced."""

import json
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from qjax.hf.families import Family, family
from qjax.hf.layout import Stored, arrays, layer_axis, stored
from qjax.models.base import Pretrained
from qjax.models.experts import Experts
from qjax.nn.nnx_adapter import SavedParam
from qjax.swap.nnx_find import Found, find_layers

PREFIX = "base_model.model."  # of every tensor of an adapter

Index = tuple[int, ...]


class Dense(NamedTuple):
    """A dense layer; one of several where layers, or experts, are stacked."""

    found: Found
    index: Index  # in the stacked axes of the layer
    is_expert: bool = False


class Fused(NamedTuple):
    """A parameter of experts as transformers 5 holds it: one array for all, or for two of ours.

    Attributes:
        name: "model.layers.0.mlp.experts.gate_up_proj".
        parts: our layers; the parameter's outputs are theirs in this order.
        index: of the layer, where layers are stacked.
    """

    name: str
    parts: tuple[Found, ...]
    index: Index


class Array(NamedTuple):
    """One tensor of the checkpoint in an array of the model."""

    layer: Any
    leaf: str
    index: Index
    where: Stored


class Tied(NamedTuple):
    """The names of the two tensors that are one array."""

    table: str
    head: str


class Names(NamedTuple):
    """What PEFT can name in a model.

    Attributes:
        dense: by the module's name.
        experts: by the name of the module of experts, in the order that PEFT wraps them in.
        arrays: by the tensor's name.
    """

    dense: dict[str, Dense]
    experts: dict[str, list[Fused]]
    arrays: dict[str, Array]


def peft_names(model: Pretrained) -> Names:
    """Find them.

    Raises:
        ValueError: the model was not loaded from a folder.
    """
    if model.config_json is None:
        raise ValueError(
            "the model was not loaded from a folder: its modules have no names in PEFT"
        )
    known = known_family(model)
    found = {id(f.layer): f for f in find_layers(model)}
    dense, every = {}, {}
    for path, layer, leaf in arrays(model):
        where = stored(known, model.config, path, layer, leaf)
        for i, name in enumerate(where.names):
            index = tuple(int(n) for n in np.unravel_index(i, where.stack)) if where.stack else ()
            every[name] = Array(layer, leaf, index, where)
            is_dense = isinstance(layer, nnx.Linear) or where.stacks_experts
            if leaf == "kernel" and is_dense and name.endswith(".weight"):
                module = name.removesuffix(".weight")
                dense[module] = Dense(found[id(layer)], index, where.stacks_experts)
    return Names(dense, _experts(model, found), every)


def known_family(model: Pretrained) -> Family:
    """Return the family of the model's config.json."""
    return family(json.loads(model.config_json or "{}"))


def tied_tensors(model: Pretrained) -> Tied | None:
    """Return the embeddings and the output head that are one array, if they are."""
    names = known_family(model).names
    if not model.config.tie_word_embeddings:
        return None
    return Tied(f"{names['embed_tokens']}.weight", f"{names.get('lm_head', 'lm_head')}.weight")


def _experts(model: Pretrained, found: dict[int, Found]) -> dict[str, list[Fused]]:
    groups = {}
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, Experts):
            continue
        up = ("gate_up_proj",) if module.config.clamped else ("gate_proj", "up_proj")
        template, layers, stack = layer_axis(path, model.config)
        for layer in layers:
            name = "model." + ".".join(map(str, template)).format(layer)
            groups[name] = [
                Fused(
                    f"{name}.{ours[0] if len(ours) == 1 else 'gate_up_proj'}",
                    tuple(found[id(getattr(module, part))] for part in ours),
                    (layer,) if stack else (),
                )
                for ours in (up, ("down_proj",))
            ]
    return groups


def saved_arrays(names: Names) -> dict[str, Array]:
    """Return the arrays that the active adapter has put in the place of the base's."""
    return {
        name: array
        for name, array in names.arrays.items()
        if isinstance(getattr(array.layer, array.leaf), SavedParam)
    }
