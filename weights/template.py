"""Render a model's chat template in a process of its own.

A template is a program that comes with the weights, from anyone. jinja2's sandbox keeps it away
from Python, but not from an endless loop or from all memory: the limits of a process do.
"""

import json
import subprocess
import sys
from functools import lru_cache

SECONDS, MOST_MEMORY, MOST_TEXT = 10, 2**30, 2**26  # seconds, bytes, characters


@lru_cache(maxsize=16)
def render(template: str, values: str, now: str) -> str:
    """The template's text. `values` is a JSON object of its variables, `now` a time in ISO format.
    ValueError if it fails, or exceeds a limit."""
    job = json.dumps({"template": template, "values": json.loads(values), "now": now})
    try:
        done = subprocess.run([sys.executable, "-I", __file__], input=job.encode(),
                              capture_output=True, timeout=SECONDS)
        result = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        result = {"error": f"it takes more than {SECONDS} seconds"}
    except ValueError:  # it was killed, or ran out of memory outside of Python
        result = {"error": "it was stopped"}
    if error := result.get("error"):
        raise ValueError(f"the model's chat template failed: {error}")
    return result["text"]


def render_here(template: str, values: dict, now: str) -> str:
    """What the other process does. It may raise anything."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = datetime.fromisoformat(now).strftime
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **how)
    text = environment.from_string(template).render(**values)
    if len(text) > MOST_TEXT:
        raise ValueError(f"it makes more than {MOST_TEXT} characters")
    text.encode()  # a lone surrogate is no text
    return text


def main():
    try:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    except ImportError:
        pass
    try:
        result = {"text": render_here(**json.load(sys.stdin))}
    except MemoryError:
        result = {"error": "it needs too much memory"}
    except Exception as error:  # it is somebody else's program
        result = {"error": " ".join(f"{error}".split())[:300] or type(error).__name__}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
