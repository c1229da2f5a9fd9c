"""Tool calls in the text of a model, in the forms that the common families were trained on."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from turbosparse.engine.text import CALL_MARKERS, Tokenizer, begun

_OPENERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_OPEN = re.compile("|".join(map(re.escape, _OPENERS)))
_CLOSE = "</tool_call>"
_NAMED = re.compile(r"\s*([\w.-]+)\[ARGS\](.*)", re.DOTALL)
_MARKERS = re.compile(f"({'|'.join(map(re.escape, CALL_MARKERS))})")

# What a chat template holds, and how its model writes a call: the first line that fits counts.
_FORMS = {
    "[ARGS]": "[TOOL_CALLS]NAME[ARGS]ARGUMENTS",  # Mistral since 2025
    "[TOOL_CALLS]": '[TOOL_CALLS][{"name": "NAME", "arguments": ARGUMENTS}]',  # Mistral before
    "<tool_call>": '<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>',
    "": '{"name": "NAME", "parameters": ARGUMENTS}',  # Llama 3
}


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
        if text.lstrip()[:1] in ("", "{", "["):  # Llama 3 writes nothing but JSON
            return 0
        if opened := _OPEN.search(text):
            return opened.start()
        return len(text) - begun(text, _OPENERS)

    def _calls(self) -> tuple[list[dict[str, Any]], int]:
        """The calls in the form of the API, and where the first begins."""
        before, *sources = _OPEN.split(self._text)
        found: list[Any] = []
        try:
            for source in sources or [before]:
                read = _read(source)
                found += read if isinstance(read, list) else [read]
        except (ValueError, RecursionError):
            return [], 0
        calls = [_call(one) for one in found if isinstance(one, dict)]
        if len(calls) < len(found) or any(c["function"]["name"] not in self._names for c in calls):
            return [], 0
        return (calls if self._several else calls[:1]), len(before) if sources else 0


def forced_call(tokenizer: Tokenizer, functions: Mapping[str, dict[str, Any]]) -> str:
    """A Lark grammar of one call, in the form that the model's chat template knows.

    Args:
        tokenizer: of the model.
        functions: the JSON schema of the arguments of each that may be called.
    """
    form = next(form for sign, form in _FORMS.items() if sign in tokenizer.chat_template)
    before, after = form.split("ARGUMENTS")
    calls = [
        f"{_lark(before.replace('NAME', name), tokenizer)} "
        f"%json {json.dumps(schema | _COMPACT)} {_lark(after, tokenizer)}"
        for name, schema in functions.items()
    ]
    return f"start: {' | '.join(calls)}"


_COMPACT = {"x-guidance": {"whitespace_flexible": False}}


def _lark(text: str, tokenizer: Tokenizer) -> str:
    """Text in Lark; markers that are a token of the model are that token."""
    ids = tokenizer.vocabulary
    parts = filter(None, _MARKERS.split(text))
    return " ".join(f"<[{ids[part]}]>" if part in ids else json.dumps(part) for part in parts)


def _read(source: str) -> Any:
    """The JSON of a call, or of a list of calls."""
    if named := _NAMED.fullmatch(source):
        return {"name": named[1], "arguments": json.loads(named[2])}
    return json.loads(source.partition(_CLOSE)[0])


def _call(found: dict[str, Any]) -> dict[str, Any]:
    given = found.get("arguments", found.get("parameters", {}))
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": str(found.get("name")), "arguments": arguments},
    }
