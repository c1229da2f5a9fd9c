"""Text and tokens: encoding, chat templates, and text that comes in pieces. Loads no torch.

It reads ``tokenizer.json`` with the tokenizers library; transformers is not needed.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import local_path, read_config
from turbosparse.engine import template

Message = dict[str, Any]
# Tokens around tool calls are text to whoever reads these, also where a tokenizer hides them.
CALL_MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


class Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        TurboSparseError: there is none, or it is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = local_path(folder)
        self.settings = self._read("tokenizer_config.json")
        self._tokenizer = self._load()
        self.special = {
            token for token, added in self._tokenizer.get_added_tokens_decoder().items()
            if added.special and added.content not in CALL_MARKERS
        }  # fmt: skip
        decoder = self._tokenizer.decoder  # alone: the whole tokenizer as JSON takes half a second
        decoder = {} if decoder is None else json.loads(decoder.__getstate__())
        self._decoders = {decoder.get("type")} | {
            part.get("type") for part in decoder.get("decoders", [])
        }
        self._bytes: dict[int, bytes] = {}

    def _read(self, name: str) -> dict[str, Any]:
        return read_config(self.folder, name) if (self.folder / name).is_file() else {}

    def _load(self) -> Any:
        from tokenizers import Tokenizer as Fast

        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise TurboSparseError(
                f'{self.folder} has no tokenizer.json; make one with `python -c "from transformers '
                f"import AutoTokenizer as A; A.from_pretrained('{self.folder}').save_pretrained("
                f"'{self.folder}')\"`, or copy the original model's into it"
            )
        try:
            fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TurboSparseError(
                f"{self.folder}: the tokenizer cannot be loaded ({error}); "
                "copy the original model's tokenizer files into it"
            ) from error
        fast.no_truncation()
        fast.no_padding()
        return fast

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def _id(self, role: str) -> int | None:
        """Of the token that the settings name as ``bos_token`` or the like."""
        token = self.settings.get(role)
        if isinstance(token, dict):
            token = token.get("content")
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        return None if found is None else int(found)

    @property
    def bos(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos(self) -> int | None:
        return self._id("eos_token")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text; with `special` the start token comes first, if the model has one.

        An end token that the tokenizer adds is taken off: what follows continues the text.
        """
        _check_utf8(text)
        plain: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not special:
            return plain
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        while ids and ids[-1] == self.eos and (not plain or plain[-1] != self.eos):
            ids = ids[:-1]
        begins = self.bos is not None and ids[:1] == [self.bos]
        wanted = self.settings.get("add_bos_token")
        if self.bos is not None and not begins and (wanted is True or not ids):
            return [self.bos, *ids]
        if begins and wanted is False and plain[:1] != [self.bos]:
            return ids[1:]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of tokens; special ones are left out."""
        stream = Detokenizer(self)
        return "".join(map(stream.step, ids)) + stream.finish()

    def chat(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Tokens of a conversation in the model's chat template, up to where the answer begins.

        `tools` are JSON schemas of functions that the template tells the model of.

        Raises:
            TurboSparseError: there is no template, or it fails or needs too much.
        """
        return self.encode(self.chat_text(messages, tools), special=False)

    def chat_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        answer: bool = True,
    ) -> str:
        """The text of `chat`; without `answer` up to the end of the last message."""
        special = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in self.settings.items()
            if name.endswith("_token") and isinstance(token, (str, dict))
        }
        values = {
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": answer,
            **special,
        }
        return render(self.chat_template, values, self.folder)

    @cached_property
    def chat_template(self) -> str:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeError as error:
                raise TurboSparseError(f"{path} is not valid UTF-8: {error}") from error
        found = self.settings.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
            if found is None:
                raise TurboSparseError(
                    f"{self.folder} has {len(named)} chat templates and none is named default; "
                    "put the one to use into chat_template.jinja"
                )
        if not isinstance(found, str):
            raise TurboSparseError(
                "this model has no chat template: it continues texts (generate without --chat, "
                "/v1/completions) and cannot chat; use one that was trained to, or write its "
                "template into chat_template.jinja"
            )
        return found

    def stop_ids(self, extra: Iterable[str] = (), *, chat: bool = False) -> frozenset[int]:
        """Tokens that end a text: those of the configs, or else the tokenizer's, and `extra`."""
        found: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            eos = self._read(name).get("eos_token_id")
            ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
            if any(type(token) is not int for token in ids):
                raise TurboSparseError(
                    f"{self.folder / name}: eos_token_id is {eos!r:.80}, not a whole number or a "
                    "list of them"
                )
            found.update(ids)
        if self.eos is not None and (chat or not found):
            found.add(self.eos)
        for token in extra:
            if token in self.vocabulary and not token.isdecimal():
                found.add(self.vocabulary[token])
            elif token.isdecimal():
                found.add(int(token))
            else:
                raise TurboSparseError(
                    f"--stop-token {token!r} is neither a token of the model nor an id"
                )
        return frozenset(found)

    def token_bytes(self, token: int, *, first: bool = False) -> bytes:
        """What a token adds to a text, as UTF-8; `first` if nothing stands before it."""
        if token in self.special:
            return b""
        if first and "ByteLevel" not in self._decoders:
            return self._decode([token]).encode()
        if token not in self._bytes:
            self._bytes[token] = self._added_bytes(token)
        return self._bytes[token]

    def _added_bytes(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token)
        if name is None:  # a row of the embedding that the tokenizer does not use
            return b""
        if "ByteLevel" in self._decoders:
            try:
                return bytes(_BYTE_OF[character] for character in name)
            except KeyError:  # an added token, which is plain text
                return str(name).encode()
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        # decoders strip what begins a text, so it is decoded after another token
        before = self._decode([self._anchor])
        return self._decode([self._anchor, token])[len(before) :].encode()

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    @cached_property
    def _anchor(self) -> int:
        ids = self._tokenizer.encode("a", add_special_tokens=False).ids
        return int(ids[-1]) if ids else 0


class Detokenizer:
    """Text of tokens as they come: a character appears when its last byte is there.

    Args:
        tokenizer: of the model.
        prompt: what stands before; the text may complete its last character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = all(token in tokenizer.special for token in prompt)
        for token in prompt[-4:]:
            self._decoder.decode(tokenizer.token_bytes(token))

    def step(self, token: int) -> str:
        piece = self._tokenizer.token_bytes(token, first=self._first)
        self._first &= token in self._tokenizer.special
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was not completed."""
        return self._decoder.decode(b"", final=True)


def begun(text: str, strings: Collection[str]) -> int:
    """Length of the longest end of a text that one of the strings begins with."""
    sizes = range(min(max(map(len, strings), default=0), len(text)), 0, -1)
    return next((n for n in sizes if any(one.startswith(text[-n:]) for one in strings)), 0)


class StopStrings:
    """Holds text back while it may become one of the strings that end it."""

    def __init__(self, strings: Iterable[str] = ()):
        self._strings = tuple(strings)
        if not all(isinstance(string, str) and string for string in self._strings):
            raise TurboSparseError(f"stop {self._strings!r} must be strings that are not empty")
        self._held = ""

    def step(self, piece: str) -> tuple[str, bool]:
        """Text that is certain, and whether it ended before a stop string."""
        text = self._held + piece
        found = [at for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        certain = len(text) - begun(text, self._strings)
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def render(source: str, values: dict[str, Any], where: object) -> str:
    """The text of a chat template, rendered in a process with limits on time and memory.

    Raises:
        TurboSparseError: the template fails, or needs too much.
    """
    spec = importlib.util.find_spec("jinja2")
    if spec is None or spec.origin is None:
        raise TurboSparseError("chat templates need jinja2: pip install jinja2")
    try:
        request = {
            "template": source,
            "values": values,
            "path": [str(Path(spec.origin).parents[1])],
        }
        done = subprocess.run(
            [sys.executable, "-I", "-S", template.__file__],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=2 * template.SECONDS,
            check=True,
            env={},  # nothing that is preloaded, and nothing to learn from
        )
        answer = json.loads(done.stdout)
    except (TypeError, UnicodeError) as error:
        raise TurboSparseError(f"the messages are not plain JSON: {error}") from error
    except (subprocess.SubprocessError, ValueError) as error:
        raise TurboSparseError(
            f"{where}: the chat template took more than {template.SECONDS} s or "
            f"{template.MEMORY >> 20} MB; leave out --chat or mend chat_template.jinja"
        ) from error
    if "error" in answer:
        raise TurboSparseError(
            f"{where}: the chat template cannot be used ({answer['error']}); "
            "leave out --chat or mend chat_template.jinja"
        )
    return str(answer["text"])


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeError as error:
        raise TurboSparseError(f"the prompt is not valid UTF-8: {error}") from error


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
