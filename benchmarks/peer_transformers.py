"""The Llama-2-7B shape on transformers, bitsandbytes and PEFT: QLoRA training and generation.

python benchmarks/peer_transformers.py --out benchmarks/results/peer.json [--batch 4] [--steps 3]

Random weights, NF4 with double quantization, LoRA of rank 16 on all linear layers of the blocks,
gradient checkpointing, AdamW, sdpa attention, bfloat16: what `finetune.py` and `decode.py` do.
"""

import argparse
import json
import pathlib
import time

import bitsandbytes as bnb
import peft
import torch
import transformers

LENGTH, NEW = 2048, 32
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quantized(linear: torch.nn.Linear) -> torch.nn.Module:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = 0.02 * torch.randn(
        linear.out_features, linear.in_features, dtype=torch.bfloat16, device="cuda"
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    ).cuda()
    return layer


def make_model():
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantized(module))
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            parent, _, leaf = name.rpartition(".")
            value = torch.ones_like(parameter, device="cuda")
            value = value if "norm" in name else value.normal_(std=0.02)
            fixed = torch.nn.Parameter(value, requires_grad=False)
            setattr(model.get_submodule(parent), leaf, fixed)
    rotary = type(model.model.rotary_emb)(config, device="cuda")
    model.model.rotary_emb = rotary
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
    model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, lora).cuda()


def train(model, batch: int, steps: int) -> dict:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4)
    ids = torch.randint(0, 32000, (batch, LENGTH), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    step = sorted(times[1:])[steps // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "case": f"llama-2-7b/nf4/{batch}x{LENGTH}",
        "tokens_per_s": round(batch * LENGTH / step),
        "step_ms": round(step * 1e3, 1),
        "peak_gib": round(peak, 2),
    }


@torch.no_grad()
def generate(model, batch: int) -> dict:
    model.eval()
    model.gradient_checkpointing_disable()
    ids = torch.randint(0, 32000, (batch, 64), device="cuda")
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.autocast("cuda", torch.bfloat16):
        model.generate(input_ids=ids, **{**options, "max_new_tokens": 4, "min_new_tokens": 4})
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(input_ids=ids, **options)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "case": f"llama-2-7b/nf4/on/{batch}x64+{NEW}",
        "tokens_per_s": round(batch * NEW / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    report = {"device": torch.cuda.get_device_name(), "rows": []}
    for name in ("torch", "transformers", "bitsandbytes", "peft"):
        report[name] = __import__(name).__version__
    model = make_model()
    for work in (
        lambda: train(model, args.batch, args.steps),
        lambda: generate(model, 1),
        lambda: generate(model, 32),
    ):
        row = work()
        print(json.dumps(row), flush=True)
        report["rows"].append(row)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
