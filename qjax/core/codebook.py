"""The tables of the 4-bit formats: sixteen float32 values each, indexed by code.

`nf4` is NormalFloat4 of QLoRA (Dettmers et al. 2023, appendix E): quantiles of N(0, 1) with an
exact zero. `fp4` is bitsandbytes' FP4: a sign, then the magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6,
1/4 in code order. It is not OCP's E2M1 (`fp4_e2m1`: a sign, then 0, 0.5, 1, 1.5, 2, 3, 4, 6, over
6), whose smallest non-zero magnitude is 16 times larger. `int4` is -8 to 7, over 7.
"""

import numpy as np

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12.0
_E2M1_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _table(values) -> np.ndarray:
    table = np.array(values, np.float32)
    table.setflags(write=False)
    return table


def _signed(magnitudes) -> np.ndarray:
    # `+ 0.0` makes code 8 a positive zero, as bitsandbytes' table has it.
    return np.concatenate([magnitudes, -magnitudes]) + 0.0


CODEBOOKS: dict[str, np.ndarray] = {
    "nf4": _table(_NF4),
    "fp4": _table(_signed(_FP4_MAGNITUDES)),
    "int4": _table(np.arange(-8, 8) / 7),
    "int4_asym": _table(np.arange(-8, 8)),
    "fp4_e2m1": _table(_signed(_E2M1_MAGNITUDES) / 6),
    "mxfp4": _table(_signed(_E2M1_MAGNITUDES)),
    "nvfp4": _table(_signed(_E2M1_MAGNITUDES)),
}


def codebook(format: str) -> np.ndarray:
    """Return the float32 [16] table of a 4-bit format, indexed by code.

    Raises:
        ValueError: the format is not known, or has no table.

    Example:
        >>> float(codebook("nf4")[15])
        1.0
    """
    if format not in CODEBOOKS:
        raise ValueError(f"format must be one of {sorted(CODEBOOKS)}, got {format!r}")
    return CODEBOOKS[format]


def checked_table(name: str, values) -> np.ndarray:
    """Return sixteen values as a table, or say what is wrong with them.

    Raises:
        ValueError: not sixteen increasing finite values whose largest magnitude is 1.
    """
    table = np.asarray(values, np.float32)
    if table.shape != (16,) or not np.isfinite(table).all() or not (np.diff(table) > 0).all():
        raise ValueError(f"{name}: a codebook is 16 increasing finite values, got {values!r}")
    if np.abs(table).max() != 1:
        raise ValueError(
            f"{name}: the largest magnitude of a codebook is 1, got {np.abs(table).max()}: "
            "divide the values by it"
        )
    return _table(table)
