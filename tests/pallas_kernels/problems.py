"""Weights, their float64 values, and lowering for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scales import DoubleQuantScales

# An abstract device is enough to lower for: `lower` needs no GPU.
H100 = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
)
# QLoRA's NF4 to 4 digits: the kernels take any 16 values.
_BELOW = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
_ABOVE = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1]
NF4 = np.float32(_BELOW + _ABOVE)


def weight(n, k, block, *, double=False, layers=None, seed=0):
    """(packed, scales) of a random weight, or of a stack of them."""
    rng = np.random.default_rng(seed)
    lead = () if layers is None else (layers,)
    packed = jnp.asarray(rng.integers(0, 256, (*lead, n, k // 2), np.uint8))
    if not double:
        scales = rng.uniform(0.5, 1, (*lead, n, k // block)).astype(np.float32)
        return packed, jnp.asarray(scales)
    groups = -(-n * k // block // 256)
    scales = DoubleQuantScales(
        codes=jnp.asarray(rng.integers(0, 256, (*lead, n, k // block), np.uint8)),
        absmax=jnp.asarray(rng.uniform(0.1, 0.3, (*lead, groups)).astype(np.float32)),
        offset=jnp.asarray(rng.uniform(0.5, 0.6, lead).astype(np.float32)),
        table=jnp.asarray(np.linspace(-1, 1, 256, dtype=np.float32)),
    )
    return packed, scales


def decoded(packed, scales, block, layer=None, codebook=NF4):
    """The weight [N, K] in float64, by numpy alone."""
    packed = np.asarray(packed if layer is None else packed[layer])
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(packed.shape[0], -1)
    if isinstance(scales, DoubleQuantScales):
        parts = [scales.codes, scales.absmax, scales.offset]
        eight, absmax, offset = (np.asarray(a if layer is None else a[layer]) for a in parts)
        spread = np.repeat(absmax, 256)[: eight.size].reshape(eight.shape)
        scale = (np.asarray(scales.table)[eight] * spread + offset).astype(np.float64)
    else:
        scale = np.asarray(scales if layer is None else scales[layer]).astype(np.float64)
    return codebook.astype(np.float64)[codes] * np.repeat(scale, block, axis=1)


def lower(function, *arguments, **options) -> str:
    """The module of `function(*arguments, **options)` as an H100 would get it; shapes will do."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(functools.partial(function, **options)).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
