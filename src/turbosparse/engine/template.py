"""Renders a chat template; run as a process of its own, with limits, by `text.Tokenizer`.

Templates come with models, from anyone: a sandbox keeps them from files and code, and the limits
on time and memory from stopping the program that uses them. Imports nothing of turbosparse.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

SECONDS = 5
MEMORY = 1 << 30  # bytes, of the process that renders
OUTPUT = 16 << 20  # characters


def render(template: str, values: dict[str, Any]) -> str:
    """The text of a template, in the environment that transformers gives it."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what is trained on; here it shows what it holds."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def fail(message: object) -> None:
        raise TemplateError(str(message))

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template).render(**values)


def main() -> None:
    """Read template and values as JSON from standard input; print text or error as JSON."""
    import resource

    request = json.loads(sys.stdin.buffer.read())
    sys.path[:0] = request["path"]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        answer = {"text": render(request["template"], request["values"])}
        if len(answer["text"]) > OUTPUT:
            answer = {"error": f"the text is longer than {OUTPUT} characters"}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY >> 20} MB of memory"}
    except Exception as error:  # of the template: any
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
