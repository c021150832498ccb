"""A model folder to fine-tune: the golden Llama with a tokenizer of single characters."""

import json
import pathlib
import shutil

import tokenizers

from tests.models.golden import FOLDER

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> tokenizers.Tokenizer:
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def make_folder(path: pathlib.Path, template: str | None = CHATML) -> pathlib.Path:
    shutil.copytree(FOLDER / "llama" / "hf", path)
    make_tokenizer().save(str(path / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def write_lines(path: pathlib.Path, *records) -> pathlib.Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{a}+{b}"},
            {"role": "assistant", "content": str(a + b)},
        ]
    }
    for a in range(4)
    for b in range(3)
]
