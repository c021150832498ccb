"""The float weights of a checkpoint one at a time, for inits of adapters that read them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qjax.hf.layout import arrays, stored
from qjax.hf.pretrained import open_checkpoint
from qjax.hf.streaming import read_float
from qjax.models.base import Pretrained


def float_weights(path_or_id, model: Pretrained) -> Callable[[str], jax.Array]:
    """Return a function that reads one float weight of a checkpoint, for `add_lora(source=...)`.

    Args:
        path_or_id: what the model was loaded from, in floating point: as in `from_pretrained`.
        model: says under which paths the weights are, and how they are stacked.

    Returns:
        A function from a path such as "layers/0/mlp/up_proj/kernel" to a float32 array.

    Raises:
        ValueError: not a checkpoint; and the function, for a path that the model has not, or a
            weight that the checkpoint has not in floating point.

    Example:
        >>> source = qjax.float_weights("model.gguf", model)  # doctest: +SKIP
        >>> cfg = qjax.LoraConfig(init="loftq")  # doctest: +SKIP
        >>> qjax.add_lora(model, cfg, rngs=nnx.Rngs(0), source=source)  # doctest: +SKIP
    """
    source = open_checkpoint(path_or_id)
    places = {}
    for path, layer, leaf in arrays(model):
        where = stored(source.family, model.config, path, layer, leaf)
        shape = tuple(getattr(layer, leaf).shape)
        places["/".join(map(str, (*path, leaf)))] = (where, shape)

    def read(path: str) -> jax.Array:
        if path not in places:
            raise ValueError(f"{path_or_id}: the model has no weight {path!r}")
        where, shape = places[path]
        if missing := [name for name in where.names if name not in source.tensors]:
            raise ValueError(f"{path_or_id} lacks {missing[0]!r}")
        if packed := [name for name in where.names if name in source.packed]:
            raise ValueError(f"{path_or_id} has {packed[0]!r} in 4 bits alone")
        return read_float(source, where, jax.ShapeDtypeStruct(shape, jnp.float32))

    return read
