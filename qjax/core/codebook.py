"""The 4-bit formats: a name and sixteen float32 values each.

`nf4` is NormalFloat4 of QLoRA (Dettmers et al. 2023, appendix E): quantiles of N(0, 1) with an
exact zero. `fp4` is bitsandbytes' FP4: a sign, then the magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6,
1/4 in code order. It is not OCP's E2M1, whose smallest non-zero magnitude is 16 times larger.
"""

import numpy as np

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12.0


def _table(values) -> np.ndarray:
    table = np.array(values, np.float32)
    table.setflags(write=False)
    return table


CODEBOOKS: dict[str, np.ndarray] = {
    "nf4": _table(_NF4),
    # `+ 0.0` makes code 8 a positive zero, as bitsandbytes' table has it.
    "fp4": _table(np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES]) + 0.0),
}


def codebook(format: str) -> np.ndarray:
    """Return the float32 [16] table of a format, indexed by code.

    Raises:
        ValueError: the format is not known.

    Example:
        >>> float(codebook("nf4")[15])
        1.0
    """
    if format not in CODEBOOKS:
        raise ValueError(f"format must be one of {sorted(CODEBOOKS)}, got {format!r}")
    return CODEBOOKS[format]
