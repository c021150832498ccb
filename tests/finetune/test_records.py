"""JSONL to tokens: what is trained, and what is said of a broken line."""

import pytest

from qjax.finetune.records import Encoder, read_examples
from qjax.hf.chat import ChatTemplate
from tests.finetune.folders import CHATML, make_tokenizer, write_lines

EOS = 2
ENCODER = Encoder(make_tokenizer(), ChatTemplate(CHATML), EOS)


def trained_text(example) -> str:
    """The trained tokens as text, special ones too."""
    ids = [i for i, flag in zip(example.ids, example.trained, strict=True) if flag]
    return "".join(ENCODER.tokenizer.id_to_token(i) for i in ids)


def read(tmp_path, *records):
    return read_examples(write_lines(tmp_path / "data.jsonl", *records), ENCODER)


def test_in_a_chat_the_answers_are_trained_with_the_ends_of_their_turns(tmp_path):
    turns = [("system", "Be brief."), ("user", "1+1"), ("assistant", "2")]
    turns += [("user", "and 2+2?"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (example,) = read(tmp_path, {"messages": messages})
    assert trained_text(example) == "2<|im_end|>\n4<|im_end|>\n"
    whole = "".join(ENCODER.tokenizer.id_to_token(i) for i in example.ids)
    assert whole == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def test_a_completion_and_a_text_are_trained_to_their_end(tmp_path):
    completion, text = read(tmp_path, {"prompt": "1+1=", "completion": "2"}, {"text": "abc"})
    assert trained_text(completion) == "2</s>" and len(completion.ids) == 6
    assert trained_text(text) == "abc</s>" and all(text.trained)


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"', "is not JSON: Expecting ',' delimiter"),
        ("[1]", "must be a JSON object with"),
        ('{"txt": "a"}', r"must have either .*; it has \['txt'\]"),
        ('{"text": "a", "messages": []}', r"it has \['messages', 'text'\]"),
        ('{"text": 3}', "'text' must be a string, got int"),
        ('{"messages": []}', "must be a list with at least one message"),
        ('{"messages": [{"role": "user"}]}', 'message 1 must have "role" and "content"'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message with role 'assistant'"),
        ('{"prompt": "a"}', r"must have either .*; it has \['prompt'\]"),
    ],
)
def test_a_broken_line_is_named(line, message, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(ValueError, match=rf"data.jsonl, line 3:? .*{message}|line 3 {message}"):
        read_examples(file, ENCODER)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"data='.*missing.jsonl' is not a file"):
        read_examples(tmp_path / "missing.jsonl", ENCODER)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty.jsonl has no lines"):
        read_examples(tmp_path / "empty.jsonl", ENCODER)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin.jsonl is not UTF-8 text"):
        read_examples(tmp_path / "latin.jsonl", ENCODER)


def test_a_chat_needs_a_template_that_lets_tell_the_answers(tmp_path):
    file = write_lines(
        tmp_path / "chat.jsonl",
        {"messages": [{"role": r, "content": r} for r in ("user", "assistant", "user")]},
    )
    with pytest.raises(ValueError, match=r"line 1: the model has no chat template"):
        read_examples(file, ENCODER._replace(template=None))
    only_last = ChatTemplate("{{ messages[-1].content if messages else '' }}")
    with pytest.raises(ValueError, match=r"line 1: the chat template writes message 2 differently"):
        read_examples(file, ENCODER._replace(template=only_last))
