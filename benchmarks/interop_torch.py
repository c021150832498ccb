"""Load what qjax exports with transformers, bitsandbytes and PEFT, and compare logits.

    python benchmarks/interop_torch.py [--venv FOLDER] [FAMILY ...]

Exports the golden models in both layouts, with and without adapters, makes a Python 3.11
environment with the packages below (kept where --venv says, else in a temporary folder), loads each
export there with `interop_load.py` and writes benchmarks/results/interop.json: the largest absolute
difference of logits of size 10 to 17, computed in float32 on both sides. The cases "int8" have
8-bit weights alone; "llm_int8" multiplies them by 8-bit activations, of which some are rounded to
the neighbouring code where both sides' float32 differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qjax

REQUIREMENTS = [
    *("torch==2.13.0", "transformers==5.23.0", "bitsandbytes==0.50.2", "peft==0.21.2"),
    "accelerate",
]
HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "golden" / "hf"
RESULT = HERE / "results" / "interop.json"
CONFIG = qjax.QuantConfig(compute_dtype=jnp.float32)
ADAPTERS = {
    "lora": qjax.LoraConfig(rank=4, alpha=8),
    "rslora": qjax.LoraConfig(rank=8, alpha=8, rslora=True),
}
EIGHT_BITS = {
    "int8": qjax.QuantConfig("int8", compute_dtype=jnp.float32),
    "llm_int8": qjax.QuantConfig("int8", int8_threshold=6.0, compute_dtype=jnp.float32),
}
INPUTS = ("input_ids", "token_type_ids", "decoder_input_ids")
IN_EIGHT_BITS = ("bert", "gpt2", "llama")
ADAPTED = ("llama", "qwen2", "gpt2", "gpt_neox", "t5", "bert")

forward = nnx.jit(lambda model, ids, **kwargs: model(ids, **kwargs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="where the torch environment is, or is made")
    parser.add_argument("--python", default="python3.11", help="interpreter of that environment")
    every = sorted(path.parent.name for path in GOLDEN.glob("*/ref.npz"))
    parser.add_argument("families", nargs="*", help="those to measure again; all by default")
    options = parser.parse_args()
    families = options.families or every
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        python = environment(options.venv or work / "venv", options.python)
        cases = work / "cases"
        for family in families:
            export(family, cases / family)
            print("exported", family, flush=True)
        command = [python, HERE / "interop_load.py", cases, work / "found.json"]
        subprocess.run(command, check=True)
        found = json.loads((work / "found.json").read_text())
    rows = found.pop("rows")
    if len(families) < len(every):
        kept = json.loads(RESULT.read_text())["rows"]
        rows += [row for row in kept if row["family"] not in families]
    rows.sort(key=lambda row: (row["family"], row["case"]))
    bad = [row for row in rows if not row["ok"]]
    found["versions"] |= {"jax": version("jax"), "flax": version("flax")}
    head = json.dumps(found, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    RESULT.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    print(f"{len(rows) - len(bad)} of {len(rows)} agree; {RESULT}")
    sys.exit(bool(bad))


def environment(folder: Path, interpreter: str) -> Path:
    """Return the Python of an environment with the requirements, made if it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    return python


def export(family: str, folder: Path) -> None:
    """Write every export of a golden model, each with the inputs and the logits that we get."""
    with np.load(GOLDEN / family / "ref.npz") as ref:
        inputs = {name: ref[name] for name in INPUTS if name in ref}
    model = qjax.from_pretrained(GOLDEN / family / "hf", config=CONFIG)
    logits = run(model, inputs)
    for layout in ("bitsandbytes", "float"):
        model.save_pretrained(folder / layout, layout=layout)
        write_case(folder / layout, layout, layout, None, inputs, logits)
    if family in ADAPTED:
        for name, config in ADAPTERS.items():
            export_adapter(family, name, config, folder, inputs)
    if family in IN_EIGHT_BITS:
        for name, config in EIGHT_BITS.items():
            model = qjax.from_pretrained(GOLDEN / family / "hf", config=config)
            model.save_pretrained(folder / name)
            write_case(folder / name, name, name, None, inputs, run(model, inputs))


def export_adapter(family, name, config, folder, inputs) -> None:
    model = qjax.from_pretrained(GOLDEN / family / "hf", config=CONFIG)
    model = qjax.add_lora(model, config, rngs=nnx.Rngs(0))
    for i, (_, layer) in enumerate(nnx.iter_modules(model)):
        if getattr(layer, "lora_b", None) is not None:  # zeros, to begin with
            noise = jax.random.normal(jax.random.key(i), layer.lora_b.shape)
            layer.lora_b.set_value(noise * 0.1)
    logits = run(model, inputs)
    qjax.save_adapter(model, folder / name)
    model.save_pretrained(folder / f"merged_{name}", layout="float")
    for layout in ("bitsandbytes", "float"):
        case = folder / f"{layout}_{name}"
        case.mkdir()
        write_case(case, f"{layout} + {name}", layout, name, inputs, logits)
    write_case(folder / f"merged_{name}", f"{name} merged", f"merged_{name}", None, inputs, logits)


def run(model, inputs) -> np.ndarray:
    named = {name: value for name, value in inputs.items() if name != "input_ids"}
    return np.asarray(forward(model, inputs["input_ids"], **named))


def write_case(folder, name, base, adapter, inputs, logits) -> None:
    np.savez(folder / "case.npz", logits=logits, **inputs)
    (folder / "case.json").write_text(json.dumps({"name": name, "base": base, "adapter": adapter}))


if __name__ == "__main__":
    main()
