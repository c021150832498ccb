"""The vmap rule of the matmul kernels, around a product that any device runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul.batching import with_vmap
from pallas_kernels.matmul.xla import matmul
from tests.pallas_kernels.problems import NF4, decoded, weight

N, K, BLOCK = 6, 64, 32


def product(x, packed, scales, codebook, layer):
    return matmul(x, packed, scales, codebook, block_size=BLOCK, layer=layer)


def one(x, packed, scales, layer=None):
    return with_vmap(product, x, packed, scales, jnp.asarray(NF4), layer)


def rows(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape).astype(np.float32))


def check(y, x, packed, scales, *layer):
    want = np.asarray(x).astype(np.float64) @ decoded(packed, scales, BLOCK, *layer).T
    np.testing.assert_allclose(y, want, atol=1e-4)  # 64 float32 products of size about 1


@pytest.mark.parametrize("double", [False, True])
def test_batched_weights_are_read_as_a_stack(double):
    packed, scales = weight(N, K, BLOCK, double=double, layers=3)
    axes = scales._replace(codes=0, absmax=0, offset=0, table=None) if double else 0
    x = rows(3, 2, K)
    y = jax.jit(jax.vmap(one, in_axes=(0, 0, axes)))(x, packed, scales)
    shared = jax.vmap(one, in_axes=(None, 0, axes))(x[0], packed, scales)
    for i in range(3):
        check(y[i], x[i], packed, scales, i)
        check(shared[i], x[0], packed, scales, i)


def test_batched_rows_are_more_rows():
    packed, scales = weight(N, K, BLOCK)
    x = rows(3, 2, K)
    shapes = []

    def spy(x, *rest):
        shapes.append(x.shape)
        return product(x, *rest)

    y = jax.vmap(lambda x: with_vmap(spy, x, packed, scales, jnp.asarray(NF4), None))(x)
    check(y.reshape(6, N), x.reshape(6, K), packed, scales)
    assert shapes[-1] == (6, K)


def test_nested_batches_and_a_layer_of_each():
    packed, scales = weight(N, K, BLOCK, layers=12)
    stack = jax.tree.map(lambda a: a.reshape(2, 2, 3, *a.shape[1:]), (packed, scales))
    x = rows(2, 2, 4, K)
    layer = jnp.asarray([0, 2])
    y = jax.vmap(jax.vmap(one, in_axes=(0, 0, 0, 0)), in_axes=(0, 0, 0, None))(x, *stack, layer)
    for i in range(2):
        for j in range(2):
            check(y[i, j], x[i, j], packed, scales, 6 * i + 3 * j + int(layer[j]))


def test_numpy_arrays_outside_jit():
    packed, scales = weight(N, K, BLOCK, layers=3)
    x, layer = np.asarray(rows(3, 2, K)), np.array([2, 0, 1], np.int32)
    y = jax.vmap(one, in_axes=(0, None, None, 0))(x, np.asarray(packed), np.asarray(scales), layer)
    for i in range(3):
        check(y[i], x[i], packed, scales, layer[i])
