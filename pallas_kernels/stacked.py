"""One layer of a stack of weights, as `jax.lax.scan` over a model's layers meets them."""

import jax

from pallas_kernels.scales import DoubleQuantScales


def take_layer(
    packed: jax.Array, scales: jax.Array | DoubleQuantScales, layer: jax.Array | int | None
) -> tuple[jax.Array, jax.Array | DoubleQuantScales]:
    """Return layer `layer` of `packed` [L, N, K // 2] and its scales; with None, both unchanged.

    Of double-quantized scales, `codes`, `absmax` and `offset` are stacked; the table, the origin
    and the pitch are shared by the layers.
    """
    if layer is None:
        return packed, scales
    if isinstance(scales, DoubleQuantScales):
        one = scales._replace(
            codes=scales.codes[layer], absmax=scales.absmax[layer], offset=scales.offset[layer]
        )
        return packed[layer], one
    return packed[layer], scales[layer]
