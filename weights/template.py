"""Render a model's chat template in a process of its own.

A template is a program that comes with the weights, from anyone. jinja2's sandbox keeps it away
from Python, but not from an endless loop or from all memory: the limits of a process do.
"""

import json
from datetime import datetime
from functools import lru_cache

from support.worker import Worker

MOST_TEXT = 2**24  # characters
PROBE = "7350926184"  # a text that no filter changes
WORKER = Worker("weights.template", "Renderer")


@lru_cache(maxsize=16)
def render(template: str, values: str, now: str) -> str:
    """The template's text. `values` is a JSON object of its variables, as text: `lru_cache` needs
    arguments that do not change. `now` is a time in ISO format. ValueError if it fails, or exceeds
    a limit."""
    try:
        return WORKER.call("render", template, json.loads(values), now)
    except ValueError as error:
        raise ValueError(f"the model's chat template failed: {error}") from None


class Renderer:
    """What the other process does. It may raise anything."""

    def __init__(self):
        import jinja2.sandbox  # noqa: F401  it takes long: now, while the tokens are read

    def render(self, template: str, values: dict, now: str) -> str:
        template, problem = environment(now).from_string(template), None
        for shape in (str, in_parts):
            try:
                if PROBE in template.render(**with_content(values, shape, probe=True)):
                    return checked(template.render(**with_content(values, shape)))
            except (MemoryError, OverflowError):
                raise
            except Exception as error:
                problem = error if shape is str else problem  # the usual shape says what is wrong
        raise problem or ValueError("it leaves out the user's text")


def with_content(values: dict, shape, probe: bool = False) -> dict:
    """The variables, the content of all messages in this shape. With `probe`, the last one's is the
    text that is looked for in what comes of it."""
    *before, last = values["messages"]
    messages = [*before, last | {"content": PROBE} if probe else last]
    return values | {"messages": [m | {"content": shape(m["content"])} for m in messages]}


def in_parts(content: str) -> list:
    """Content as the templates of models have it that also see pictures."""
    return [{"type": "text", "text": content}]


def checked(text: str) -> str:
    """ValueError if a template's text is too long, or no text."""
    if len(text) > MOST_TEXT:
        raise ValueError(f"it makes more than {MOST_TEXT} characters")
    text.encode()  # a lone surrogate
    return text


def environment(now: str):
    """What a template can use, as transformers has it."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model learns to write. It is rendered as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=["jinja2.ext.loopcontrols", Generation])
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = datetime.fromisoformat(now).strftime
    made.filters["tojson"] = tojson
    return made
