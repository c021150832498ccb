"""How the Triton kernels are called: the one place that knows of the backend's deprecation."""

import warnings

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

NUM_WARPS = 4


def triton_call(
    kernel,
    *,
    grid: int,
    out_shape,
    interpret: bool,
    name: str,
    warps: int = NUM_WARPS,
    stages: int = 1,
    aliases: dict[int, int] | None = None,
):
    """A kernel over a grid of programs, by Pallas-Triton; `interpret` runs its jnp anywhere.

    `aliases` are operands that are results too, in place: their number to that of the result.
    """
    # JAX says so each time a kernel is lowered. Users can do nothing about it: `dispatch` is where
    # another backend would take over.
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    return pl.pallas_call(
        kernel,
        grid=(grid,),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        input_output_aliases=aliases or {},
        interpret=interpret,
        name=name,
    )
