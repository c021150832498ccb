"""Which implementation of an op runs: the fastest that can, or the one that is named.

An op has several backends, each in a module that is imported when it is first considered. A
backend module holds a function with the op's name and `unsupported`, which takes the same
arguments and returns why they cannot run, or None. It may have `slower`, alike: why a later backend
is the better choice for them, which counts only while none is named. Shapes and dtypes alone are
looked at, so the choice is made while tracing, and `jax.ShapeDtypeStruct`s will do to ask about it.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "triton")
HOPPER = (9, 0)
_HOPPER_KINDS = ("H100", "H200", "H800", "H20", "GH200")


class Backend(NamedTuple):
    """One way to run an op: the implementation that it belongs to, where it is, what it does."""

    implementation: str
    module: str
    summary: str


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
    """The backend chosen, and why each faster one was not."""

    backend: Backend
    target: Target
    rejected: tuple[tuple[Backend, str], ...]

    @property
    def implementation(self) -> str:
        """The implementation that the backend belongs to."""
        return self.backend.implementation

    def __str__(self) -> str:
        lines = [f"{self.implementation}: {self.backend.summary}, on {self.target.kind}"]
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


def _unsupported(backend: Backend, automatic: bool, args: tuple, options: dict) -> str | None:
    module = importlib.import_module(backend.module)
    why = module.unsupported(*args, **options)
    if why is None and automatic and hasattr(module, "slower"):
        return module.slower(*args, **options)
    return why


def resolve(op: str, implementation: str | None, *args: Any, **options: Any) -> Resolution:
    """Choose the backend of `op` ("matmul", "dequantize" or "quantize") for these arguments.

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
    rejected = []
    for backend in _BACKENDS[op]:
        if implementation is not None and backend.implementation != implementation:
            continue
        why = _unsupported_device(backend.implementation, where)
        why = why or _unsupported(backend, implementation is None, args, options)
        if why is None:
            return Resolution(backend, where, tuple(rejected))
        rejected.append((backend, why))
    reasons = "; ".join(f"{b.summary}: {why}" for b, why in rejected) or "it has no such backend"
    raise NotImplementedError(f"{op} cannot run with implementation={implementation!r}: {reasons}")


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
    chosen = _bind(op, choice.backend, args, options)
    if implementation is not None:
        return chosen()
    fallback = _BACKENDS[op][-1]
    if choice.backend != fallback:
        return jax.lax.platform_dependent(cuda=chosen, default=_bind(op, fallback, args, options))
    if choice.target.is_cuda and choice.rejected:
        _warn_once(f"{op} runs without a kernel. {choice}")
    return chosen()


def _bind(op: str, backend: Backend, args: tuple, options: dict[str, Any]) -> Callable[[], Any]:
    return functools.partial(getattr(importlib.import_module(backend.module), op), *args, **options)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
