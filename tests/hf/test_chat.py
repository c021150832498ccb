"""Chat templates: rendered as the models' authors wrote them, in a sandbox."""

import json

import pytest

from qjax.hf.chat import ChatTemplate, load_chat_template
from tests.finetune.folders import CHATML, make_folder

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_chatml():
    template = ChatTemplate(CHATML)
    prompt = template.render(MESSAGES[:1], add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    text, spans = template.answers(MESSAGES)
    assert [text[a:b] for a, b in spans] == ["Ho<|im_end|>\n"]


def test_variables_filters_and_generation_blocks():
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m | tojson }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    expected = '<s>{"role": "user", "content": "Hi"}Ho</s>'
    assert template.render(MESSAGES) == expected


def test_broken_and_hostile_templates_are_errors():
    with pytest.raises(ValueError, match=r"no Jinja template: .*endfor"):
        ChatTemplate("{% for m in messages %}")
    with pytest.raises(ValueError, match="does not take these messages: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(MESSAGES)
    with pytest.raises(ValueError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render(MESSAGES)


def test_where_a_folder_keeps_it(tmp_path):
    folder = make_folder(tmp_path / "config")
    assert load_chat_template(folder).render(MESSAGES[:1]).startswith("<|im_start|>user")
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]
    config = {"chat_template": named, "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(folder).render(MESSAGES) == "D</s>"
    (folder / "chat_template.jinja").write_text("J")
    assert load_chat_template(folder).render(MESSAGES) == "J"
    assert load_chat_template(make_folder(tmp_path / "none", template=None)) is None
    (tmp_path / "none" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        load_chat_template(tmp_path / "none")
