"""Chat templates: the Jinja text beside a tokenizer that turns messages into the model's format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.hf.extras import require
from qjax.hf.gguf import Metadata
from qjax.hf.hub import locate

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A chat template, compiled in Jinja's sandbox: templates are data from strangers.

    Args:
        source: the template.
        variables: what it may use beside the messages, such as `bos_token`.

    Example:
        >>> ChatTemplate("User: {{ messages[0].content }}").render([{"content": "Hi"}])
        'User: Hi'
    """

    def __init__(self, source: str, variables: Mapping[str, Any] = {}):
        jinja2 = require("jinja2", "hf")
        sandbox = require("jinja2.sandbox", "hf")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.add_extension(_generation_extension(jinja2))
        environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise
        self._errors = jinja2.TemplateError
        self._variables = dict(variables)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no Jinja template: {error}") from None

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Return the messages as text, and with `add_generation_prompt` how an answer begins.

        Raises:
            ValueError: the template does not take such messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except (self._errors, TypeError) as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from None

    def answers(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and where in it the assistant's words are, ends of turns included.

        Raises:
            ValueError: no message of the assistant; or a template that writes earlier messages in
                another way when later ones follow.
        """
        text, spans = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], add_generation_prompt=True)
            after = self.render(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template writes message {i + 1} differently when others follow, so "
                    "what to train on cannot be told"
                )
            spans.append((len(before), len(after)))
        if not spans:
            raise ValueError("there is no message with role 'assistant' to train on")
        return text, spans


def load_chat_template(path_or_id) -> ChatTemplate | None:
    """Return the chat template of a model folder, a .gguf file or a model of the hub, if any.

    Raises:
        ValueError: there is no such model, or the template is broken.
        ModuleNotFoundError: jinja2 (extra `hf`) is not installed.
    """
    path = locate(path_or_id)
    if path.is_file():
        metadata = Metadata(path)
        source = metadata.get("tokenizer.chat_template", "") or None
        return None if source is None else ChatTemplate(source, {"bos_token": "", "eos_token": ""})
    config = tokenizer_config(path)
    file = path / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    return ChatTemplate(source, special_tokens(config))


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the tokenizer_config.json of a folder, {} without one."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must be a JSON object")
    return data


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return bos_token, eos_token and the like of a tokenizer_config.json, as text."""
    tokens = {}
    for key, value in config.items():
        value = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and isinstance(value, str):
            tokens[key] = value
    return tokens


def _raise(message: str) -> None:
    raise require("jinja2", "hf").TemplateError(message)


def _generation_extension(jinja2) -> type:
    """Return an extension for `{% generation %}`, which marks answers and prints its content."""

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    return Generation
