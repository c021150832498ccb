"""The JAX side of the matmul benchmark: qjax, XLA's dequantize + dot, and JAX's bf16 dot."""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matmul_cells import BLOCK, Cell, copies

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.scales import DoubleQuantScales
from pallas_kernels.tune import device_time

CHECKED = 32  # combinations of rows that are compared
IMPLEMENTATIONS = {"qjax": None, "qjax triton": "triton", "XLA dequantize + dot": "xla"}
CODEBOOK = np.linspace(-1, 1, 16, dtype=np.float32)
_NOISE = np.random.default_rng(0).standard_normal(2**22 - 3, np.float32).astype(jnp.bfloat16)


class Weight(NamedTuple):
    """Distinct random weights [N, K], and the host's float32 copy of the last one."""

    arrays: list  # of (packed, scales), or bf16 arrays
    decoded: Future


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal bf16 values; every row starts elsewhere in one long sequence."""
    return np.resize(np.roll(_NOISE, 7919 * seed), shape)


def quantized_weight(n: int, k: int, double: bool, seed: int):
    """A random 4-bit weight on the host, and its float32 scales."""
    rng = np.random.default_rng(seed)
    packed = np.frombuffer(rng.bytes(n * k // 2), np.uint8).reshape(n, k // 2)
    blocks = (n, k // BLOCK)
    if not double:
        scales = rng.uniform(0.02, 0.1, blocks).astype(np.float32)
        return packed, scales, scales
    codes = rng.integers(0, 256, blocks, np.uint8)
    absmax = rng.uniform(0.01, 0.04, -(-codes.size // 256)).astype(np.float32)
    table = np.linspace(-1, 1, 256, dtype=np.float32)
    scales = DoubleQuantScales(codes, absmax, np.float32(0.06), table)
    spread = np.repeat(absmax, 256)[: codes.size].reshape(blocks)
    return packed, scales, table[codes] * spread + np.float32(0.06)


def decode(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weight in float32, by numpy alone."""
    pairs = np.stack([np.repeat(CODEBOOK, 16), np.tile(CODEBOOK, 16)], -1)
    blocks = pairs[packed].reshape(*scales.shape, BLOCK)
    blocks *= scales[..., None]
    return blocks.reshape(scales.shape[0], -1)


def relative_error(y: np.ndarray, x: np.ndarray, w: Future, transpose: bool) -> float:
    """||R y - R x W|| / ||R x W||, R the identity or random signs: every element takes part."""
    y, x = y.astype(np.float32), x.astype(np.float32)
    if len(x) > CHECKED:
        signs = np.random.default_rng(1).choice(np.float32([-1, 1]), (CHECKED, len(x)))
        y, x = signs @ y, signs @ x
    want = x @ (w.result() if transpose else w.result().T)
    return float(np.linalg.norm(y - want) / np.linalg.norm(want))


def product(cell: Cell) -> Callable:
    """The function of x and one weight that the cell measures."""
    if cell.library == "jax bf16":
        contract = (((1,), (0 if cell.transpose else 1,)), ((), ()))
        return lambda x, w: jax.lax.dot_general(x, w, contract)
    return lambda x, w: pallas_kernels.matmul(
        x,
        *w,
        jnp.asarray(CODEBOOK),
        block_size=BLOCK,
        transpose=cell.transpose,
        implementation=IMPLEMENTATIONS[cell.library],
    )


def abstract_arguments(cell: Cell) -> tuple:
    """Shapes of x and of one weight."""
    shape = jax.ShapeDtypeStruct
    x = shape((cell.m, cell.n if cell.transpose else cell.k), jnp.bfloat16)
    if cell.library == "jax bf16":
        return x, shape((cell.n, cell.k), jnp.bfloat16)
    blocks = (cell.n, cell.k // BLOCK)
    scales = shape(blocks, jnp.float32)
    if cell.double:
        groups = -(-blocks[0] * blocks[1] // 256)
        scales = DoubleQuantScales(
            shape(blocks, jnp.uint8),
            shape((groups,), jnp.float32),
            shape((), jnp.float32),
            shape((256,), jnp.float32),
        )
    return x, (shape((cell.n, cell.k // 2), jnp.uint8), scales)


def nbytes(cell: Cell) -> int:
    """Bytes of a weight."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract_arguments(cell)[1]))


def compile_cell(cell: Cell) -> Callable:
    """One function of lists of x and of weights: each product is a kernel call of its own."""
    x, w = abstract_arguments(cell)
    one = jax.jit(product(cell))  # lowered once

    def many(xs, ws):
        return [one(x, w) for x, w in zip(xs, ws, strict=True)]

    count = copies(nbytes(cell))
    return jax.jit(many).lower([x] * count, [w] * count).compile()


def wall_time(compiled: Callable, xs: list, ws: list) -> float:
    """The stand-in for `device_time` where there is no GPU: to try the script."""
    start = time.perf_counter()
    jax.block_until_ready(compiled(xs, ws))
    return (time.perf_counter() - start) * 1e6 / len(ws)


class Bench:
    """Compiles in threads, measures in order, checks in threads."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.compilers = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 4))
        self.checkers = ThreadPoolExecutor(4)
        self.time = device_time if dispatch.target().is_cuda else wall_time
        self.compiled: dict[Cell, Future] = {}

    @functools.lru_cache(maxsize=3)  # noqa: B019 - one Bench a process
    def weights(self, n: int, k: int, kind: str) -> Weight:
        """The weights of a shape; `kind` is plain, double or bf16."""
        if kind == "bf16":
            host = [noise((n, k), i) for i in range(copies(2 * n * k))]
            decoded = self.checkers.submit(host[-1].astype, np.float32)
            return Weight(jax.device_put(host), decoded)
        count = copies(n * k // 2 + n * k // BLOCK * (1 if kind == "double" else 4))
        host = list(
            self.checkers.map(lambda i: quantized_weight(n, k, kind == "double", i), range(count))
        )
        packed, _, scales = host[-1]
        decoded = self.checkers.submit(decode, packed, scales)
        return Weight(jax.device_put([w[:2] for w in host]), decoded)

    def what_runs(self, cell: Cell) -> str | None:
        """The module of the backend that dispatch takes, or "dot"; None where there is none."""
        if cell.library == "jax bf16":
            return "dot"
        x, w = abstract_arguments(cell)
        options = {"block_size": BLOCK, "transpose": cell.transpose, "layer": None}
        named = IMPLEMENTATIONS[cell.library]
        try:
            choice = dispatch.resolve("matmul", named, x, *w, CODEBOOK, **options)
        except NotImplementedError as error:
            print(f"{cell}: {error}", file=sys.stderr)
            return None
        return choice.backend.module.rsplit(".", 1)[1]

    def compile(self, cells: Sequence[Cell]) -> None:
        """Start to compile the cells, where that was not done before."""
        for cell in cells:
            if cell in self.compiled:
                continue
            self.compiled[cell] = self.compilers.submit(compile_cell, cell)

    def wait(self) -> None:
        """Until nothing compiles, or time is over."""
        wait(self.compiled.values(), timeout=max(0, self.deadline - time.time()))

    def run(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, float, Future]]:
        """(cell, microseconds, error) of the cells, as far as time allows."""
        for cell in cells:
            if time.time() > self.deadline:
                for future in self.compiled.values():
                    future.cancel()
                return
            try:
                yield cell, *self.measure(cell, self.compiled.pop(cell).result())
            except Exception as error:  # one cell's failure must not lose the others
                print(f"{cell}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)

    def measure(self, cell: Cell, compiled: Callable) -> tuple[float, Future]:
        kind = "bf16" if cell.library == "jax bf16" else "double" if cell.double else "plain"
        weight = self.weights(cell.n, cell.k, kind)
        contracted = cell.n if cell.transpose else cell.k
        # Of few rows each product has its own x, so that nothing done to x is shared.
        count = len(weight.arrays) if cell.m <= 128 else 1
        host = [noise((cell.m, contracted), i) for i in range(count)]
        xs = jax.device_put(host) * (len(weight.arrays) // count)
        us = self.time(compiled, xs, weight.arrays)
        y = np.asarray(compiled(xs, weight.arrays)[-1])
        check = (relative_error, y, host[-1], weight.decoded, cell.transpose)
        return us, self.checkers.submit(*check)
