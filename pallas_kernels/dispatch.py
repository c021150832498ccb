"""Which implementation of an op runs: the fastest that can, or the one that is named.

An op has several backends, each in a module that is imported when it is first considered. A
backend module holds a function with the op's name and `unsupported`, which takes the same
arguments and returns why they cannot run, or None. It may have `slower`, alike: why a later backend
is the better choice for them, which counts only while none is named. Shapes and dtypes alone are
looked at, so the choice is made while tracing, and `jax.ShapeDtypeStruct`s will do to ask about it.
What `qjax tune` measured on this machine goes before that order.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import user_tiles
from pallas_kernels.scales import DoubleQuantScales

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "triton")
HOPPER = (9, 0)
_HOPPER_KINDS = ("H100", "H200", "H800", "H20", "GH200")


class Backend(NamedTuple):
    """One way to run an op: the implementation that it belongs to, where it is, what it does."""

    implementation: str
    module: str
    summary: str

    @property
    def name(self) -> str:
        """The last part of the module's name, unique among an op's backends."""
        return self.module.rsplit(".", 1)[1]


_FUSED = Backend("mosaic_gpu", "pallas_kernels.matmul.mosaic_gpu", "Hopper kernels for few rows")
_LARGE = Backend("mosaic_gpu", "pallas_kernels.matmul.mosaic_large", "Hopper kernel for many rows")
_TRITON = Backend("triton", "pallas_kernels.matmul.triton", "Triton kernel for few rows")
_DECODED = Backend("triton", "pallas_kernels.matmul.decoded", "Triton decode kernel, then XLA dot")
_XLA = Backend("xla", "pallas_kernels.matmul.xla", "XLA decode, then dot")

# Fastest first. The last backend of each op runs everywhere.
_BACKENDS: dict[str, tuple[Backend, ...]] = {
    "matmul": (_FUSED, _LARGE, _TRITON, _DECODED, _XLA),
    "dequantize": (
        Backend("triton", "pallas_kernels.dequantize.triton", "Triton kernel"),
        Backend("xla", "pallas_kernels.dequantize.xla", "XLA table lookup"),
    ),
    "quantize": (
        Backend("triton", "pallas_kernels.quantize.triton", "Triton kernel"),
        Backend("xla", "pallas_kernels.quantize.xla", "XLA"),
    ),
    "adapted_matmul": (
        Backend("mosaic_gpu", "pallas_kernels.adapted_matmul.mosaic_gpu", "Hopper kernels"),
        Backend("xla", "pallas_kernels.adapted_matmul.xla", "matmul, and sums by XLA"),
    ),
    "prepare_input": (
        Backend("triton", "pallas_kernels.prepare_input.triton", "Triton kernel"),
        Backend("xla", "pallas_kernels.prepare_input.xla", "XLA"),
    ),
    "append_attention": (
        Backend("triton", "pallas_kernels.append_attention.triton", "Triton kernel"),
        Backend("xla", "pallas_kernels.append_attention.xla", "XLA reductions"),
    ),
    "append_packed": (
        Backend("triton", "pallas_kernels.append_packed.triton", "Triton kernel"),
        Backend("xla", "pallas_kernels.append_packed.xla", "XLA"),
    ),
    "decode_attention": (
        Backend("triton", "pallas_kernels.decode_attention.triton", "Triton kernel"),
        Backend("xla", "pallas_kernels.decode_attention.xla", "XLA reductions"),
    ),
}


class Target(NamedTuple):
    """The device that a trace is for."""

    platform: str  # "cpu", "gpu" or "tpu", as `jax.Device.platform` says
    kind: str
    capability: tuple[int, int] | None  # CUDA compute capability; None on other devices

    @property
    def is_cuda(self) -> bool:
        """Whether it is an NVIDIA GPU."""
        return self.capability is not None


class Resolution(NamedTuple):
    """The backend chosen, why each faster one was not, and the choice if it was measured here."""

    backend: Backend
    target: Target
    rejected: tuple[tuple[Backend, str], ...]
    measured: user_tiles.Choice | None = None

    @property
    def implementation(self) -> str:
        """The implementation that the backend belongs to."""
        return self.backend.implementation

    def __str__(self) -> str:
        lines = [f"{self.implementation}: {self.backend.summary}, on {self.target.kind}"]
        if self.measured:
            tiles = f" with {self.measured.tiles}" if self.measured.tiles else ""
            lines.append(f"the fastest measured by `qjax tune`{tiles}: {self.measured.us} us")
        lines += [f"not {b.implementation} ({b.summary}): {why}" for b, why in self.rejected]
        return "\n".join(lines)


def target() -> Target:
    """Return the device traced for: the abstract mesh's, else the default, else device 0."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        platform = abstract.platform or "cpu"
        hopper = any(kind in abstract.device_kind for kind in _HOPPER_KINDS)
        capability = (HOPPER if hopper else (8, 0)) if platform in ("gpu", "cuda") else None
        return Target("gpu" if capability else platform, abstract.device_kind, capability)
    default = jax.config.jax_default_device
    device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return Target(device.platform, device.device_kind, _capability(device))


def _capability(device) -> tuple[int, int] | None:
    text = str(getattr(device, "compute_capability", ""))
    major, _, minor = text.partition(".")
    if device.platform != "gpu" or not (major.isdigit() and minor.isdigit()):
        return None  # ROCm names its architectures "gfx942" and the like
    return int(major), int(minor)


def _unsupported_device(implementation: str, where: Target) -> str | None:
    if implementation == "mosaic_gpu" and where.capability != HOPPER:
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), and this is {where.kind}"
    if implementation == "triton" and not where.is_cuda:
        return f"it needs an NVIDIA GPU, and this is {where.kind}"
    return None


def _unsupported(backend: Backend, where: Target, args: tuple, options: dict) -> str | None:
    """Why the backend cannot run these arguments, or None."""
    why = _unsupported_device(backend.implementation, where)
    return why or importlib.import_module(backend.module).unsupported(*args, **options)


def _slower(backend: Backend, args: tuple, options: dict) -> str | None:
    """Why a later backend is the better choice, or None."""
    module = importlib.import_module(backend.module)
    return module.slower(*args, **options) if hasattr(module, "slower") else None


def _measured(op: str, where: Target, args: tuple, options: dict) -> user_tiles.Choice | None:
    """What `qjax tune` found for a matmul on this device, or None."""
    if op not in ("matmul", "adapted_matmul") or not where.is_cuda:
        return None
    x, packed, scales, *_ = args
    n, half = packed.shape[-2:]
    key = user_tiles.Key(
        m=x.shape[0],
        n=n,
        k=2 * half,
        block_size=options["block_size"],
        dtype=jnp.dtype(x.dtype).name,
        double=isinstance(scales, DoubleQuantScales),
        transpose=options.get("transpose", False),
    )
    return user_tiles.lookup(where.kind, key)


def resolve(op: str, implementation: str | None, *args: Any, **options: Any) -> Resolution:
    """Choose the backend of `op` (a name such as "matmul") for these arguments.

    Args:
        op: the op's name.
        implementation: None for the fastest that can run, or one of `IMPLEMENTATIONS`.
        *args, **options: what the op would be called with; only shapes and dtypes are read.

    Raises:
        ValueError: the implementation or the op has an unknown name.
        NotImplementedError: the named implementation cannot run, with the reasons.
    """
    if op not in _BACKENDS:
        raise ValueError(f"op is {op!r}, and the ops are {sorted(_BACKENDS)}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r}; it must be None or one of {known}")
    where = target()
    backends = [b for b in _BACKENDS[op] if implementation in (None, b.implementation)]
    if measured := _measured(op, where, args, options):
        for backend in backends:
            if backend.name == measured.backend and not _unsupported(backend, where, args, options):
                return Resolution(backend, where, (), measured)
    rejected = []
    for backend in backends:
        why = _unsupported(backend, where, args, options)
        if why is None and implementation is None:
            why = _slower(backend, args, options)
        if why is None:
            return Resolution(backend, where, tuple(rejected))
        rejected.append((backend, why))
    reasons = "; ".join(f"{b.summary}: {why}" for b, why in rejected) or "it has no such backend"
    raise NotImplementedError(f"{op} cannot run with implementation={implementation!r}: {reasons}")


def runnable(op: str, *args: Any, **options: Any) -> list[str]:
    """The names of the backends that can run these arguments here, fast or not."""
    where = target()
    return [b.name for b in _BACKENDS[op] if _unsupported(b, where, args, options) is None]


def bound(op: str, name: str, **options: Any) -> Callable:
    """The function of the backend with this name; `config` is passed on unless it is None."""
    [backend] = [b for b in _BACKENDS[op] if b.name == name]
    options = {option: v for option, v in options.items() if option != "config" or v is not None}
    return functools.partial(getattr(importlib.import_module(backend.module), op), **options)


def explain(op: str, *args: Any, implementation: str | None = None, **options: Any) -> str:
    """Say which implementation of `op` would run for these arguments, and why no faster one.

    Example:
        >>> packed = jax.ShapeDtypeStruct((4096, 2048), "uint8")
        >>> scales = jax.ShapeDtypeStruct((4096, 64), "float32")
        >>> codebook = jax.ShapeDtypeStruct((16,), "float32")
        >>> print(explain("dequantize", packed, scales, codebook, block_size=64, dtype="bfloat16"))
        xla: XLA table lookup, on cpu
        not triton (Triton kernel): it needs an NVIDIA GPU, and this is cpu
    """
    return str(resolve(op, implementation, *args, **options))


def run(op: str, implementation: str | None, *args: Any, **options: Any) -> Any:
    """Run `op` with the backend that `resolve` chooses.

    A kernel that was chosen automatically is lowered for CUDA alone: the same trace compiles for
    another platform (an array committed to the CPU of a GPU host, say) with XLA.
    """
    choice = resolve(op, implementation, *args, **options)
    config = choice.measured and choice.measured.tiles
    chosen = functools.partial(bound(op, choice.backend.name, config=config, **options), *args)
    if implementation is not None:
        return chosen()
    fallback = _BACKENDS[op][-1]
    if choice.backend != fallback:
        default = functools.partial(bound(op, fallback.name, **options), *args)
        return jax.lax.platform_dependent(cuda=chosen, default=default)
    if choice.target.is_cuda and choice.rejected:
        _warn_once(f"{op} runs without a kernel. {choice}")
    return chosen()


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
