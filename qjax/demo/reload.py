"""A fresh process that puts saved adapters on the 4-bit model: `python -m qjax.demo.reload DIR`.

Prints the tokens of its answers to the held-out questions as one line of JSON.
"""

import json
import sys

from flax import nnx

import qjax
from qjax.demo.lessons import load_lessons
from qjax.demo.model import ask, dtype, lora_config, quant_config, weights_file


def main(adapters: str) -> None:
    """Answer with the adapters saved at `adapters`."""
    weights = weights_file()
    model = qjax.from_pretrained(weights, quant_config(), dtype=dtype(), scan_layers=True)
    model = qjax.add_lora(model, lora_config(), rngs=nnx.Rngs(1))
    model = qjax.load(adapters, like=model)
    questions = [fact.held_out for fact in load_lessons().facts]
    tokens, _ = ask(model, qjax.load_tokenizer(weights), questions)
    print(json.dumps(tokens.tolist()))


if __name__ == "__main__":
    main(sys.argv[1])
