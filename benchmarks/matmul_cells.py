"""The cells of the matmul benchmark, the most wanted first: library, shape, rows, direction."""

import dataclasses
from collections.abc import Iterator

BLOCK = 64
REFERENCE = "torch bf16"
JAX = ("qjax", "qjax triton", "XLA dequantize + dot", "jax bf16")
TORCH = (REFERENCE, "bitsandbytes", "tinygemm int4", "GemLite int4")
LIBRARIES = JAX + TORCH

MAIN = ((4096, 14336), (14336, 4096), (4096, 4096))  # K x N
LLAMA3 = ((4096, 1024), (8192, 28672), (28672, 8192), (8192, 8192), (8192, 1024))  # 8B, 70B
ROWS = tuple(2**i for i in range(14))
BACKWARD_ROWS = tuple(2**i for i in range(8, 14))

# K x N of the linear layers of Llama-2 (7B, 13B, 70B), Llama-3 (8B, 70B), Mistral 7B, Qwen3 (0.6B,
# 4B, 8B, 32B) and gpt-oss 20B, each with rows of x that decoding or a small batch has.
MODEL_CELLS = tuple(
    (*map(int, shape.split("x")), m)
    for m, shapes in {
        1: "4096x11008 11008x4096 5120x13824 13824x5120 5120x5120 4096x1024 1024x3072 3072x1024"
        " 2560x9728 9728x2560 5120x25600 25600x5120 2880x5120 4096x6144",
        4: "11008x4096 13824x5120 2880x4096 4096x2880 8192x1024 2560x4096",
        8: "5120x13824 4096x12288 12288x4096 2560x1024 2048x1024",
        16: "4096x11008 13824x5120 2880x4096 1024x2048 8192x10240",
        32: "11008x4096 5120x5120 9728x2560 4096x2880 28672x8192",
        64: "11008x4096 13824x5120 2880x5120 25600x5120 4096x1024",
    }.items()
    for shape in shapes.split()
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement: y = x W.T with W [N, K] and x [M, K], or with `transpose` y = x W."""

    library: str
    k: int
    n: int
    m: int
    transpose: bool = False
    double: bool = False  # the scales are double-quantized

    @property
    def reference(self) -> "Cell":
        """The cell that this one is compared with."""
        return Cell(REFERENCE, self.k, self.n, self.m, self.transpose)


def wanted() -> list[Cell]:
    """All cells of the table, each library's most wanted ones first."""
    return list(dict.fromkeys(_wanted()))


def _wanted() -> Iterator[Cell]:
    for shape in MAIN:
        for m in ROWS:
            yield Cell(REFERENCE, *shape, m)
            yield Cell("qjax", *shape, m)
        for m in (1, 16, 64):
            yield Cell("qjax", *shape, m, double=True)
    for shape in MAIN:
        for m in BACKWARD_ROWS:
            yield Cell(REFERENCE, *shape, m, transpose=True)
            yield Cell("qjax", *shape, m, transpose=True)
    for library in ("bitsandbytes", "tinygemm int4"):
        for shape in MAIN:
            for m in ROWS:
                yield Cell(library, *shape, m)
    for shape in MAIN[:1]:  # its tuning takes 10 s a cell
        for m in (1, 16, 64, 256, 4, 1024):
            yield Cell("GemLite int4", *shape, m)
    for cell in MODEL_CELLS:
        yield Cell(REFERENCE, *cell)
        yield Cell("qjax", *cell)
    for shape in MAIN[:1]:
        for m in (1, 16, 64, 256, 1024, 8192):
            yield Cell("XLA dequantize + dot", *shape, m)
            yield Cell("jax bf16", *shape, m)
    for shape in LLAMA3:
        for m in ROWS:
            yield Cell(REFERENCE, *shape, m)
            yield Cell("qjax", *shape, m)
    for m in (1, 2, 4, 8):  # 8: the decode kernel, then a dot
        yield Cell("qjax triton", *MAIN[0], m)
    for m in BACKWARD_ROWS:
        yield Cell("bitsandbytes", *MAIN[0], m, transpose=True)


def copies(nbytes: int) -> int:
    """How many distinct weights of `nbytes` are used in turn, so that no cache holds them."""
    return min(8, max(3, -(-140_000_000 // nbytes)))  # the L2 of an H100 has 50 MB
