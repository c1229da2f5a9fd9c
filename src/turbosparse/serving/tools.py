"""Tool calls in the text of a model, in the forms that the common families were trained on."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

# Hermes and Qwen: each call between tags
_OPEN = "<tool_call>"
_TAGGED = re.compile(rf"{_OPEN}(.*?)(?:</tool_call>|\Z)", re.DOTALL)
# Mistral and Llama 3: nothing but JSON, behind a token that most tokenizers do not show
_BEFORE_JSON = re.compile(r"\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*")
_BEGINNINGS = ("{", "[", "<|python_tag|>")


class ToolText:
    """Splits the text of an answer, as it comes, into what is shown and the calls at its end.

    Args:
        names: of the functions that may be called; a call of another is text.
        several: whether more than the first call counts.
    """

    def __init__(self, names: set[str], several: bool = True):
        self._names, self._several = names, several
        self._text, self._shown = "", 0

    def step(self, piece: str) -> str:
        """What can be shown, now that this came."""
        self._text += piece
        return self._show(self._certain())

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What is left to show, and the calls."""
        calls, begins = self._calls()
        return self._show(begins if calls else len(self._text)), calls

    def _show(self, end: int) -> str:
        begin, self._shown = self._shown, max(self._shown, end)
        return self._text[begin:end]

    def _certain(self) -> int:
        """Where what may be a call begins."""
        text = self._text
        start = text.lstrip()
        if any(start.startswith(begin) or begin.startswith(start) for begin in _BEGINNINGS):
            return 0
        if (at := text.find(_OPEN)) >= 0:
            return at
        sizes = range(min(len(_OPEN) - 1, len(text)), 0, -1)
        return len(text) - next((n for n in sizes if _OPEN.startswith(text[-n:])), 0)

    def _calls(self) -> tuple[list[dict[str, Any]], int]:
        """The calls in the form of the API, and where the first begins."""
        sources, begins = _TAGGED.findall(self._text), self._text.find(_OPEN)
        if not sources:
            sources, begins = [_BEFORE_JSON.sub("", self._text, count=1)], 0
        try:
            found = [json.loads(source) for source in sources]
        except (ValueError, RecursionError):
            return [], 0
        if len(found) == 1 and isinstance(found[0], list):
            found = found[0]
        calls = [_call(one) for one in found if isinstance(one, dict)]
        if len(calls) < len(found) or any(c["function"]["name"] not in self._names for c in calls):
            return [], 0
        return (calls if self._several else calls[:1]), begins


def _call(found: dict[str, Any]) -> dict[str, Any]:
    given = found.get("arguments", found.get("parameters", {}))
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": str(found.get("name")), "arguments": arguments},
    }
