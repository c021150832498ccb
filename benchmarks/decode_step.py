"""Tokens a second of a 32-layer decode step of the Llama-2-7B shape, batch 1 and up, under jit.

python benchmarks/decode_step.py [--batch 1] [--tokens 64] [--layers 32] [--unrolled] [--double]
    [--graph] [--out FILE]

Random NF4 weights (block 64), a bfloat16 head, a cache of 512 positions. Weights are stacked and
read in place by a layer index inside `lax.scan`, or unrolled as separate arrays. Prints the wall
time, and the copies of packed weights that the compiled program holds (there should be none);
--out adds them to a results file. --graph compiles with XLA's command buffers (CUDA graphs).
"""

import argparse
import functools
import json
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import matmul_report

import pallas_kernels
from pallas_kernels.scales import DoubleQuantScales
from pallas_kernels.stacked import take_layer

DIM, HIDDEN, HEADS, VOCAB, CONTEXT, BLOCK = 4096, 11008, 32, 32000, 512, 64
# Compiled programs replay CUDA graphs that XLA captures of them.
GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL",
    "xla_gpu_graph_min_graph_size": 1,
}
SHAPES = {
    "q": (DIM, DIM),
    "k": (DIM, DIM),
    "v": (DIM, DIM),
    "o": (DIM, DIM),
    "gate": (HIDDEN, DIM),
    "up": (HIDDEN, DIM),
    "down": (DIM, HIDDEN),
}


def random_weight(key: jax.Array, n: int, k: int, double: bool):
    """A random packed weight [n, k] and its scales."""
    packed_key, scale_key = jax.random.split(key)
    packed = jax.random.bits(packed_key, (n, k // 2), jnp.uint8)
    blocks = (n, k // BLOCK)
    if not double:
        return packed, jax.random.uniform(scale_key, blocks, jnp.float32, 0.01, 0.03)
    codes = jax.random.bits(scale_key, blocks, jnp.uint8)
    absmax = jnp.full((n * k // BLOCK // 256,), 0.01, jnp.float32)
    table = jnp.linspace(-1, 1, 256, dtype=jnp.float32)
    return packed, DoubleQuantScales(codes, absmax, jnp.float32(0.02), table)


def norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def decode_layer(linear, x, cache, position):
    """One transformer layer on x [batch, DIM]; cache [2, batch, CONTEXT, HEADS, DIM // HEADS]."""
    h = norm(x)
    heads = (x.shape[0], HEADS, DIM // HEADS)
    q, k, v = (linear(name, h).reshape(heads) for name in "qkv")
    new = jnp.stack([k, v])[:, :, None]
    cache = jax.lax.dynamic_update_slice(cache, new, (0, 0, position, 0, 0))
    scores = jnp.einsum("bhd,bchd->bhc", q, cache[0], preferred_element_type=jnp.float32)
    visible = jnp.arange(CONTEXT) <= position
    scores = jnp.where(visible, scores * (DIM // HEADS) ** -0.5, -jnp.inf)
    mixed = jnp.einsum("bhc,bchd->bhd", jax.nn.softmax(scores).astype(x.dtype), cache[1])
    x = x + linear("o", mixed.reshape(x.shape))
    h = norm(x)
    return x + linear("down", jax.nn.silu(linear("gate", h)) * linear("up", h)), cache


def generate(params, cache, tokens, codebook, *, count: int, layers: int, unrolled: bool):
    """Greedy decoding of `count` tokens from tokens [batch]."""

    def linear(weights, layer, name, x):
        packed, scales = weights[name]
        multiply = functools.partial(pallas_kernels.matmul, block_size=BLOCK, layer=layer)
        return multiply(x, packed, scales, codebook)

    def token_step(carry, position):
        tokens, cache = carry
        x = params["embed"][tokens]
        if unrolled:
            cache = list(cache)
            for i, weights in enumerate(params["layers"]):
                layer = functools.partial(linear, weights, None)
                x, cache[i] = decode_layer(layer, x, cache[i], position)
        else:

            def body(x, inputs):
                i, cache = inputs
                return decode_layer(
                    functools.partial(linear, params["layers"], i), x, cache, position
                )

            x, cache = jax.lax.scan(body, x, (jnp.arange(layers), cache))
        logits = jnp.dot(norm(x), params["head"].T, preferred_element_type=jnp.float32)
        tokens = jnp.argmax(logits, -1)
        return (tokens, cache), tokens

    (_, cache), out = jax.lax.scan(token_step, (tokens, cache), jnp.arange(count))
    return out, cache


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--unrolled", action="store_true")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    key = jax.random.key(0)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def make(key, n, k):
        weight = functools.partial(random_weight, n=n, k=k, double=args.double)
        packed, scales = jax.lax.map(weight, jax.random.split(key, args.layers))
        if args.double:
            scales = scales._replace(table=scales.table[0])  # shared by the layers
        return packed, scales

    names = enumerate(SHAPES.items())
    stack = {name: make(jax.random.fold_in(key, i), *shape) for i, (name, shape) in names}
    if args.unrolled:
        stack = [
            {name: take_layer(*weight, layer=i) for name, weight in stack.items()}
            for i in range(args.layers)
        ]
    head = 0.02 * jax.random.normal(key, (VOCAB, DIM), jnp.bfloat16)
    params = {"layers": stack, "embed": head, "head": head}
    shape = (2, args.batch, CONTEXT, HEADS, DIM // HEADS)
    if args.unrolled:
        cache = [jnp.zeros(shape, jnp.bfloat16) for _ in range(args.layers)]
    else:
        cache = jnp.zeros((args.layers, *shape), jnp.bfloat16)
    codebook = jnp.linspace(-1, 1, 16, dtype=jnp.float32)
    tokens = jnp.zeros(args.batch, jnp.int32)

    run = functools.partial(generate, count=args.tokens, layers=args.layers, unrolled=args.unrolled)
    lowered = jax.jit(run).lower(params, cache, tokens, codebook)
    compiled = lowered.compile(compiler_options=GRAPH if args.graph else {})
    copies = re.findall(r"= u8\[[^ ]* (?:copy|dynamic-slice|fusion)\(", compiled.as_text())
    jax.block_until_ready(compiled(params, cache, tokens, codebook))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        out, _ = jax.block_until_ready(compiled(params, cache, tokens, codebook))
        times.append(time.perf_counter() - start)
    seconds = sorted(times)[2] / args.tokens
    names = ("batch", "layers", "unrolled", "double", "graph")
    settings = {name: getattr(args, name) for name in names}
    figures = {
        "ms_a_token": round(seconds * 1e3, 3),
        "tokens_a_second": round(args.batch / seconds, 1),
        "packed_copies": len(copies),
    }
    print(json.dumps(settings | figures), flush=True)
    if args.out:
        matmul_report.put(args.out, "decode_step", settings, figures)


if __name__ == "__main__":
    main()
