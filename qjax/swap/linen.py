"""A Linen parameter tree to 4 bits and back: quantize, add adapters, merge, decode."""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from qjax.core.blockwise import quantize_like
from qjax.core.config import QuantConfig, check_config, patterns
from qjax.nn.linen_box import QuantBox, box_kernel, is_quant_box, with_adapter
from qjax.nn.lora import LoraConfig
from qjax.swap.linen_plan import leaves_by_path, path_string, plan_params
from qjax.swap.merge_error import MergeError, merge_error
from qjax.swap.policy import check_patterns, matches

DEFAULT = QuantConfig()
# Float parameters, or what gives the array of a kernel's path.
Source = Mapping[str, Any] | Callable[[str], Any]


def quantize_params(
    params: Any,
    cfg: QuantConfig = DEFAULT,
    *,
    module: nn.Module | None = None,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    contract_axes: Mapping[str, tuple[int, ...]] | None = None,
    batch_ndim: int | Mapping[str, int] | None = None,
    check_finite: bool = True,
) -> Any:
    """Quantize the kernels of a Linen parameter tree to 4 bits; the tree keeps its structure.

    A kernel does not say which of its axes its layer sums over, or which are stacked layers. With
    `module` and example arguments one call is traced, without computing it, and both are known.
    Without, names and shapes tell (see `qjax/swap/linen_guess.py`): plain dense layers, Flax's
    attention, layers with a bias and most scanned models are read right; a kernel that could be
    read in two ways is left as it is, with a warning. A wrong reading would cost speed, never the
    result.

    Parameters that other modules make by `self.param` are weights too if two of their sizes are 32
    or more. With the trace, a module that is called with an equation and is that einsum (gemma's),
    and what `qjax.register` knows, run on the packed weight in `qjax.apply`; any other parameter is
    decoded where it is read, which a warning and `qjax.report` say. With the trace, layers may be
    stacked along any axis; without it along axis 0.

    Args:
        params: the "params" of a model, or all its variables; dict or FrozenDict, of arrays or
            `jax.ShapeDtypeStruct`s. `nn.Partitioned` kernels become 4-bit leaves with their names.
            Leaves in 4 bits already are left alone.
        cfg: which kernels and how. By default embeddings, norms, routers and the output head stay.
        module: the model, for the trace.
        example_args: arguments of a call, arrays or `jax.ShapeDtypeStruct`s.
        example_kwargs: its keyword arguments, such as `method`, `rngs` or `train=False`.
        contract_axes: pattern of paths -> axes of one slice that are summed over. Goes first, and
            makes any floating leaf a kernel.
        batch_ndim: pattern of paths -> number of stacked axes in front, or one number for all.
        check_finite: refuse NaN and inf where they can be seen.

    Returns:
        The tree, with a `QuantBox` where a kernel was. `module.apply` takes it; `qjax.apply` takes
        it faster.

    Raises:
        ValueError: no weight in the tree; an `include` or other pattern that matches none, or
            only kernels that cannot be read; NaN or inf.
        TypeError: a kernel is not floating, or cfg no QuantConfig.

    Example:
        >>> params = nn.Dense(8).init(jax.random.key(0), jnp.ones((1, 64)))["params"]
        >>> quantize_params(params)["kernel"].q.shape
        (64, 8)
    """
    check_config(cfg, QuantConfig)
    if _is_variables(params):
        variables = params
    elif isinstance(params, Mapping):
        variables = {"params": params}
    else:
        raise TypeError(f"params must be a dict or FrozenDict, got {type(params).__name__}")
    plan = plan_params(
        variables,
        cfg,
        module=module,
        example_args=example_args,
        example_kwargs=example_kwargs,
        contract_axes=contract_axes,
        batch_ndim=batch_ndim,
    )

    def quantize_leaf(path: str, leaf: Any) -> Any:
        use = plan[path]
        if isinstance(use, str):
            return leaf
        box = functools.partial(
            box_kernel,
            cfg=cfg.at(path),
            contract_axes=use.contract_axes,
            batch_ndim=use.batch_ndim,
            name=path,
            check_finite=check_finite,
            stack_axes=use.stack_axes,
        )
        return box(leaf)

    return _map_params(quantize_leaf, params)


def add_lora_params(
    qparams: Any, cfg: LoraConfig, key: jax.Array, *, source: Source | None = None
) -> Any:
    """Give 4-bit kernels adapters, inside the same leaves; stacked kernels get stacked adapters.

    Args:
        qparams: from `quantize_params`: "params" or all variables.
        cfg: its patterns are searched in the paths of layers, such as "layers/attn/query".
        key: for the initial values; each layer folds in its path.
        source: for `init="pissa"` and `init="loftq"`, which make up for what quantization lost:
            the float parameters, or a function from the path of a kernel to its array.

    Returns:
        The tree with `.../kernel/lora_a` and `.../kernel/lora_b` in it.

    Raises:
        ValueError: no kernel is in 4 bits, an include pattern matches none of them, or one has an
            adapter already; a source where none is needed, none where one is, or one that does not
            fit.
        NotImplementedError: DoRA for an embedding; `modules_to_save`.

    Example:
        >>> params = nn.Dense(8).init(jax.random.key(0), jnp.ones((1, 64)))["params"]
        >>> params = add_lora_params(quantize_params(params), qjax.LoraConfig(4), jax.random.key(1))
        >>> params["kernel"].lora_a.shape, params["kernel"].lora_b.shape
        ((64, 4), (4, 8))
    """
    check_config(cfg, LoraConfig)
    if cfg.modules_to_save:
        raise NotImplementedError(
            "modules_to_save for a Linen tree, where names alone tell what is trained: partition "
            "leaves float arrays frozen; train those by an optax mask of your own"
        )
    read = _reader(cfg, source)
    tree = qparams["params"] if _is_variables(qparams) else qparams
    layers = [_layer(path) for path, leaf in leaves_by_path(tree).items() if is_quant_box(leaf)]
    if not layers:
        raise ValueError(
            "no kernel is in 4 bits, so none can take an adapter: quantize_params first"
        )
    check_patterns(cfg, layers, "4-bit layer")

    def add(path: str, leaf: Any) -> Any:
        layer = _layer(path)
        include, exclude = patterns("include", cfg.include), patterns("exclude", cfg.exclude)
        wanted = include is None or matches(layer, include)
        if not is_quant_box(leaf) or not wanted or matches(layer, exclude):
            return leaf
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return with_adapter(leaf, cfg.at(layer), own, path, read and read(path))

    return _map_params(add, qparams)


def _reader(cfg: LoraConfig, source: Source | None) -> Callable[[str], Any] | None:
    """Return what gives the float kernel at a path, None where none is needed."""
    cfg.check_source(source)
    return None if source is None else _read_from(source)


def _read_from(source: Source) -> Callable[[str], Any]:
    """Return what gives the float kernel at a path."""
    if not isinstance(source, Mapping):
        return source
    held = leaves_by_path(source["params"] if _is_variables(source) else source)

    def read(path: str) -> Any:
        if path not in held or is_quant_box(held[path]):
            raise ValueError(f"source has no float kernel {path}")
        return held[path]

    return read


def merge_lora_params(params: Any, dtype: Any = jnp.bfloat16, source: Source | None = None) -> Any:
    """Return the tree with float kernels in `dtype`: decoded weight plus adapter, rounded once.

    Args:
        params: the 4-bit tree.
        dtype: of the merged kernels.
        source: the float parameters, or a function from the path of a kernel to its array, to add
            the adapters to in the place of the decoded weights.
    """
    read = None if source is None else _read_from(source)

    def merge(path: str, leaf: Any) -> Any:
        if not is_quant_box(leaf):
            return leaf
        return leaf.boxed(leaf.merged(dtype, read and read(path), path))

    return _map_params(merge, params)


def requantize_params(params: Any) -> tuple[Any, dict[str, MergeError]]:
    """Return the tree with adapters merged into 4-bit kernels, and what that cost by path.

    Raises:
        ValueError: no kernel has an adapter.
    """
    errors = {}

    def merge(path: str, leaf: Any) -> Any:
        if not is_quant_box(leaf) or leaf.adapter is None:
            return leaf
        merged = leaf.merged(jnp.float32)
        q = quantize_like(merged, leaf.q, path)
        errors[path] = merge_error(leaf.q, merged, q)
        return QuantBox(q, names=leaf.names, compute_dtype=leaf.compute_dtype)

    params = _map_params(merge, params)
    if not errors:
        raise ValueError("no kernel has an adapter to merge")
    return params, errors


def dequantize_params(params: Any) -> Any:
    """Return the tree with decoded kernels in their own dtypes.

    Raises:
        ValueError: a kernel has an adapter, which `merge_lora_params` keeps and this would lose.
    """

    def decode(path: str, leaf: Any) -> Any:
        if is_quant_box(leaf) and leaf.lora_a is not None:
            raise ValueError(f"{path} has an adapter: use merge_lora, which keeps what it learned")
        return _float_leaf(leaf, leaf.q.dtype) if is_quant_box(leaf) else leaf

    return _map_params(decode, params)


def _float_leaf(leaf: Any, dtype: Any) -> Any:
    if not is_quant_box(leaf):
        return leaf
    return leaf.boxed(leaf.merged(dtype))


def _is_variables(tree: Any) -> bool:
    return isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping)


def _map_params(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Map over arrays and boxes of a parameter tree, or of the "params" among variables."""
    skip = 1 if _is_variables(tree) else 0

    def visit(path, leaf):
        if skip and path_string(path[:1]) != "params":
            return leaf
        return fn(path_string(path[skip:]), leaf)

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=meta.is_axis_metadata)


def _layer(path: str) -> str:
    """Return what a LoraConfig's patterns are searched in: a raw parameter has its own name."""
    layer, _, name = path.rpartition("/")
    return layer if name in ("kernel", "embedding") else path
