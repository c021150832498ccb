"""Measure the backends and tiles of a matmul on this device (`qjax tune`): never inside jit."""

import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.matmul.problem import Problem
from pallas_kernels.scales import SECOND_LEVEL_BLOCK, DoubleQuantScales
from pallas_kernels.user_tiles import Choice, Key, Tiles

REPEATS = 5
WEIGHTS_BYTES = 140_000_000  # in turn, so that no cache holds them (the L2 of an H100: 50 MB)
TOLERANCE = 2.0**-6  # of the 2-norm, against XLA: roundings to bfloat16 add up to 2^-8

Timer = Callable[[Callable, list, list], float]  # (compiled, xs, weights) -> us of one product


def device_time(compiled: Callable, xs: list, weights: list) -> float:
    """Microseconds of one product: the sum of its device kernels, median of the repetitions."""
    from jax.experimental.mosaic.gpu import profiler  # only where there is a GPU

    measured = profiler.Cupti(finalize=False).measure(compiled, iterations=REPEATS)
    milliseconds: Any = measured(xs, weights)[1]  # a list: of each repetition
    if milliseconds is None:
        raise RuntimeError("CUPTI reported no kernels: is another profiler running?")
    return statistics.median(milliseconds) * 1e3 / len(xs)


def candidates(key: Key, limit: int) -> Iterator[tuple[str, Tiles | None]]:
    """(backend, tiles) that can run, at most `limit` tiles of each backend."""
    x, weight = _shapes(key)
    args = x, *weight, jax.ShapeDtypeStruct((16,), jnp.float32)
    how = {"block_size": key.block_size, "transpose": key.transpose}
    for backend in dispatch.runnable("matmul", *args, **how):
        yield from ((backend, tiles) for tiles in _tiles(backend, key, limit))


def _tiles(backend: str, key: Key, limit: int) -> Iterable[Tiles | None]:
    if backend == "mosaic_large":
        from pallas_kernels.matmul import mosaic_large

        return mosaic_large.candidates(key.m, key.n, key.k, key.transpose)[:limit]
    if backend == "mosaic_gpu":
        from pallas_kernels.matmul import mosaic_gpu

        problem = Problem(key.m, key.n, key.k, key.block_size, key.dtype)
        if key.double:
            pitch = key.k // key.block_size
            groups = -(-key.n * pitch // SECOND_LEVEL_BLOCK)
            problem = dataclasses.replace(problem, double=True, pitch=pitch, groups=groups)
        return mosaic_gpu.candidates(problem)[:limit]
    return [None]


def measure(
    keys: list[Key], *, limit: int = 6, timer: Timer = device_time
) -> Iterator[tuple[Key, list[Choice]]]:
    """For each key what can run there, the fastest first; everything compiles first, in threads.

    Raises:
        RuntimeError: a candidate's result differs from XLA's by more than rounding.
    """
    work = [(key, *candidate) for key in keys for candidate in candidates(key, limit)]
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 2)) as pool:
        compiled = list(pool.map(lambda item: _compile(*item), work))
    for key in keys:
        arrays = _arrays(key)
        want = _compile(key, "xla", None)(*arrays)[0]
        found = []
        for (other, backend, tiles), function in zip(work, compiled, strict=True):
            if other != key:
                continue
            _check(key, backend, tiles, function(*arrays)[0], want)
            found.append(Choice(backend, tiles, round(timer(function, *arrays), 2)))
        yield key, sorted(found, key=lambda choice: choice.us)


def _check(key, backend, tiles, got, want) -> None:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    if not error <= TOLERANCE:
        raise RuntimeError(f"{backend} with {tiles} is wrong for {key}: relative error {error:.2g}")


def _compile(key: Key, backend: str, tiles: Tiles | None) -> Callable:
    """A function of lists of x and of weights, compiled; it calls one kernel for each."""
    product = dispatch.bound(
        "matmul", backend, config=tiles, block_size=key.block_size, transpose=key.transpose
    )
    codebook = jnp.linspace(-1, 1, 16, dtype=jnp.float32)
    one = jax.jit(lambda x, packed, scales: product(x, packed, scales, codebook))

    def many(xs, weights):
        return [one(x, *weight) for x, weight in zip(xs, weights, strict=True)]

    x, weight = _shapes(key)
    count = _copies(key)
    return jax.jit(many).lower([x] * count, [weight] * count).compile()


def _copies(key: Key) -> int:
    return min(8, max(2, -(-2 * WEIGHTS_BYTES // (key.n * key.k))))


def _shapes(key: Key) -> tuple[jax.ShapeDtypeStruct, tuple]:
    """Shapes of x and of (packed, scales)."""
    packed, scales = jax.eval_shape(lambda: _weight(key, jax.random.key(0)))
    x = jax.ShapeDtypeStruct((key.m, key.n if key.transpose else key.k), key.dtype)
    return x, (packed, scales)


def _weight(key: Key, random: jax.Array):
    bits, second = jax.random.split(random)
    packed = jax.random.bits(bits, (key.n, key.k // 2), jnp.uint8)
    blocks = (key.n, key.k // key.block_size)
    if not key.double:
        return packed, jax.random.uniform(second, blocks, jnp.float32, 0.02, 0.1)
    codes = jax.random.bits(second, blocks, jnp.uint8)
    absmax = jnp.full((-(-codes.size // SECOND_LEVEL_BLOCK),), 0.02, jnp.float32)
    table = jnp.linspace(-1, 1, 256, dtype=jnp.float32)
    return packed, DoubleQuantScales(codes, absmax, jnp.float32(0.06), table)


def _arrays(key: Key) -> tuple[list, list]:
    """Random xs and weights."""
    make = jax.jit(functools.partial(_weight, key))
    shape = _shapes(key)[0]
    normal = jax.jit(lambda random: jax.random.normal(random, shape.shape, shape.dtype))
    keys = jax.random.split(jax.random.key(0), _copies(key))
    return [normal(random) for random in keys], [make(random) for random in keys]
