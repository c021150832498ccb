"""Loading holds the model as it will be and little more."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

HIDDEN, INNER, VOCAB, LAYERS = 4096, 11008, 32000, 4  # 2 GiB in bfloat16
LARGEST = VOCAB * HIDDEN * 2

CHILD = """
import json, sys, threading, time
import jax
from flax import nnx
import qjax

def resident():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.005)

jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
before = resident()
thread = threading.Thread(target=watch)
thread.start()
model = qjax.from_pretrained(sys.argv[1], config=qjax.QuantConfig())
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
done = True
thread.join()
print(json.dumps({"peak": peak - before, "model": sum(leaf.nbytes for leaf in leaves)}))
"""


def write_checkpoint(folder):
    values = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * 0.02
    values = values.astype(ml_dtypes.bfloat16)
    weight_map = {}

    def write(file, shapes):
        save_file({name: np.resize(values, shape) for name, shape in shapes.items()}, folder / file)
        weight_map.update(dict.fromkeys(shapes, file))

    table = (VOCAB, HIDDEN)
    outside = {"lm_head.weight": table, "model.embed_tokens.weight": table}
    write("outside.safetensors", {**outside, "model.norm.weight": (HIDDEN,)})
    for i in range(LAYERS):
        shapes = {f"self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        shapes |= {f"{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
        shapes["mlp.down_proj.weight"] = (HIDDEN, INNER)
        write(f"{i}.safetensors", {f"model.layers.{i}.{n}": s for n, s in shapes.items()})
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_2_gib_holds_the_model_and_less_than_three_tensors_more(tmp_path):
    write_checkpoint(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = json.loads(child.stdout)
    assert found["model"] < 1e9  # embeddings and head in bfloat16, the rest in 4 bits
    assert found["peak"] < found["model"] + 3 * LARGEST
