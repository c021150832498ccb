"""The torch side of interop_torch.py: load each case, and say how far its logits are from ours.

    python interop_load.py CASES RESULT

Knows nothing of qjax: it runs in an environment of its own.
"""

import json
import sys
import traceback
from pathlib import Path

import bitsandbytes
import numpy as np
import peft
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn import Linear4bit, Linear8bitLt

# Float32 against float64 differs by about 1e-5 on these logits: 2e-4 is the bound of the tests.
TOLERANCE = 2e-4
# A code of an activation that is rounded to its neighbour moves later ones: by about this much.
TOLERANCE_INT8 = 0.1
AUTO = {
    "bert": transformers.AutoModelForMaskedLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
}


def int8_mm_dequant(sums, rows, columns, dtype=None, bias=None):
    """Scale 8-bit products by 1 / 127**2, in the place of bitsandbytes' own code for CPUs.

    That multiplies by 6.200124e-05, which is 1.8e-5 too large (the CUDA kernels have 6.200012e-05)
    and enough to move codes further on.
    """
    y = sums.view(-1, sums.shape[-1]) * (rows.view(-1, 1) * columns.view(1, -1)) / 127**2
    return (y if bias is None else y + bias).to(dtype or torch.float16)


def main() -> None:
    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("int8_mm_dequant", int8_mm_dequant, "CPU")
    cases, result = map(Path, sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    rows = [check(file) for file in sorted(cases.glob("*/*/case.json"))]
    packages = (torch, transformers, bitsandbytes, peft)
    versions = {package.__name__: package.__version__ for package in packages}
    head = {"tolerance": TOLERANCE, "tolerance_llm_int8": TOLERANCE_INT8}
    result.write_text(json.dumps({**head, "versions": versions, "rows": rows}))


def check(file: Path) -> dict:
    case = json.loads(file.read_text())
    family = file.parent.parent
    row = {"family": family.name, "case": case["name"]}
    try:
        model = load(family, case["base"])
        if decoded := decode_straddling(model):
            row["decoded_beforehand"] = decoded
        if case["adapter"]:
            model = peft.PeftModel.from_pretrained(model, family / case["adapter"])
        rounds = case["name"] == "llm_int8"
        row["max_abs_error"] = float(f"{error(model, file.parent / 'case.npz', rounds):.3g}")
        row["ok"] = row["max_abs_error"] < (TOLERANCE_INT8 if rounds else TOLERANCE)
    except Exception as failure:
        traceback.print_exc()
        row |= {"ok": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}
    print(row, flush=True)
    return row


def load(family: Path, base: str):
    auto = AUTO.get(family.name.partition("_")[0], transformers.AutoModelForCausalLM)
    model, info = auto.from_pretrained(
        family / base,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    wrong = {key: names for key, names in info.items() if names}
    assert not wrong, wrong
    return model


def decode_straddling(model) -> list[str]:
    """Decode weights whose blocks straddle rows by bitsandbytes' generic code; return their names.

    Its AVX-512 kernel for the CPU is wrong for them: it counts the scales of each row anew.
    """
    decoded = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit) or module.in_features % 64 == 0:
            continue
        state = module.weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2)
            absmax = absmax + state.offset
        weight = _dequantize_4bit_compute(
            module.weight.reshape(-1), absmax, state.code, 64, state.shape, torch.float32
        )
        linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
        linear.weight, linear.bias = torch.nn.Parameter(weight), module.bias
        model.set_submodule(name, linear)
        decoded.append(name)
    return decoded


def error(model, arrays: Path, rounds_activations: bool) -> float:
    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In eval mode bitsandbytes repacks weights for the CPU, and cannot for many shapes.
            module.train()
        if isinstance(module, Linear8bitLt) and not rounds_activations:
            module.train()  # on a CPU it multiplies by the decoded weight then
    with np.load(arrays) as held:
        inputs = {name: torch.from_numpy(held[name]).long() for name in held if name != "logits"}
        ours = held["logits"]
    with torch.no_grad():
        theirs = model(**inputs).logits.float().numpy()
    return np.abs(theirs - ours).max()


if __name__ == "__main__":
    main()
