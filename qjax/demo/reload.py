"""A fresh process that puts saved adapters on the 4-bit model: `python -m qjax.demo.reload DIR`.

Prints the tokens of its answers to the greeting and the held-out questions as one line of JSON.
"""

import json
import sys

from flax import nnx

import qjax
from qjax.demo.lessons import load_lessons
from qjax.demo.model import GREETING, ask, load_float, lora_config, quant_config, weights_file


def main(adapters: str) -> None:
    """Answer with the adapters saved at `adapters`."""
    model = qjax.quantize_model(load_float(), quant_config())
    # Another seed: whatever is not restored would show.
    model = qjax.add_lora(model, lora_config(), rngs=nnx.Rngs(1))
    model = qjax.load(adapters, like=model)
    tokenizer = qjax.load_tokenizer(weights_file())
    tokens, _ = ask(model, tokenizer, [GREETING, *load_lessons().held_out()])
    print(json.dumps(tokens.tolist()))


if __name__ == "__main__":
    main(sys.argv[1])
