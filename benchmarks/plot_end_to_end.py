"""Plot benchmarks/results/{finetune,decode,peer}.json to benchmarks/results/end-to-end.png.

python benchmarks/plot_end_to_end.py
"""

import json
import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = pathlib.Path(__file__).parent / "results"
PEER, OURS = "#9aa0a6", "#2b6cb0"


def rows(name: str) -> dict[str, dict]:
    report = json.loads((RESULTS / f"{name}.json").read_text())
    return {row["case"]: row for row in report["rows"]}


def bars(axes, labels, values, colors, title, unit) -> None:
    drawn = axes.barh(labels[::-1], values[::-1], color=colors[::-1])
    axes.bar_label(drawn, [f" {value:,.0f} {unit}" for value in values[::-1]])
    axes.set_xlim(0, 1.45 * max(values))
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xticks([])


def main() -> None:
    finetune, decode, peer = (rows(name) for name in ("finetune", "decode", "peer"))
    case = "llama-2-7b/nf4/4x2048"
    figure, (train, generate, parts) = plt.subplots(1, 3, figsize=(13, 2.6))
    cases = {
        "bitsandbytes 7B, 4 x 2048": (peer[case]["tokens_per_s"], PEER),
        "qjax 7B, 4 x 2048": (finetune[case]["tokens_per_s"], OURS),
        "qjax 7B, 8 x 2048": (finetune["llama-2-7b/nf4/8x2048"]["tokens_per_s"], OURS),
        "qjax 8B, 4 x 2048": (finetune["llama-3-8b/nf4/4x2048"]["tokens_per_s"], OURS),
        "qjax 70B, 1 x 2048": (finetune["llama-3-70b/nf4/1x2048"]["tokens_per_s"], OURS),
    }
    values, colors = zip(*cases.values())
    bars(train, list(cases), values, colors, "QLoRA training on one H100", "tokens/s")
    cases = {
        "bitsandbytes 7B, adapters": (peer["llama-2-7b/nf4/on/1x64+32"]["tokens_per_s"], PEER),
        "qjax 7B, adapters": (decode["llama-2-7b/nf4/on/1x64+192"]["tokens_per_s"], OURS),
        "qjax 7B": (decode["llama-2-7b/nf4/off/1x64+192"]["tokens_per_s"], OURS),
        "qjax 70B": (decode["llama-3-70b/nf4/off/1x64+64"]["tokens_per_s"], OURS),
    }
    values, colors = zip(*cases.values())
    bars(generate, list(cases), values, colors, "Generation, batch 1", "tokens/s")
    found = {name: us / 1e3 for name, us in finetune[case]["parts_us"].items()}
    bars(
        parts, list(found), list(found.values()), [OURS] * len(found), "A training step of 7B", "ms"
    )
    figure.tight_layout()
    figure.savefig(RESULTS / "end-to-end.png", dpi=110)


if __name__ == "__main__":
    main()
