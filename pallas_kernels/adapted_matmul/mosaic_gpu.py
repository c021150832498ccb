"""adapted_matmul on Hopper for M <= 128: the kernels of `matmul` add the rest to their sums."""

import dataclasses

from pallas_kernels import mosaic
from pallas_kernels.matmul import mosaic_gpu
from pallas_kernels.matmul.mosaic_low_rank import STEP
from pallas_kernels.matmul.problem import describe


def adapted_matmul(
    x,
    packed,
    scales,
    codebook,
    adapter=None,
    residual=None,
    *,
    block_size,
    sections,
    layer=None,
    config=None,
):
    """See `pallas_kernels.adapted_matmul`; `config` as in `matmul`."""
    problem, operands = describe(x, packed, scales, codebook, block_size, layer)
    if adapter is not None:
        problem = dataclasses.replace(problem, rank=adapter[1].shape[-1], sections=sections)
        operands = operands._replace(adapter=tuple(adapter))
    if residual is not None:
        problem = dataclasses.replace(problem, residual=True)
        operands = operands._replace(residual=(residual,))
    sms = mosaic.multiprocessors()
    tiles = config or mosaic_gpu.choose(problem, mosaic.device_kind(), sms)
    return mosaic_gpu.build(problem, tiles, sms)(operands)


def unsupported(
    x, packed, scales, codebook, adapter=None, residual=None, *, block_size, sections, layer=None
) -> str | None:
    """Why these kernels cannot run a call (the device apart), or None."""
    if adapter is not None:
        rank = adapter[1].shape[-1]
        if rank % 2:
            return f"the rank is {rank}; the kernel reads pairs"
        if any(size % STEP for size in sections[:-1]):
            return f"sections are {sections}; the kernel takes multiples of {STEP}"
        if adapter[1].size >= 2**31:
            return f"B has {adapter[1].size} elements; the kernel's offsets are 32 bits"
    return mosaic_gpu.unsupported(x, packed, block_size=block_size)
