"""The conversation in the terminal: commands, interruption, and what is read again."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import turbosparse
from turbosparse.base.errors import TurboSparseError
from turbosparse.chat import Chat, chat, whole_blocks
from turbosparse.engine.api import Model
from turbosparse.engine.generation import Ends
from turbosparse.engine.sampling import Sampling

LENGTH = 8  # tokens of an answer


@pytest.fixture(scope="module")
def model(packed_mistral: Path) -> Model:
    return turbosparse.load(packed_mistral, threads=1)


class Screen(io.StringIO):
    """Takes the answers as a terminal does."""

    def isatty(self) -> bool:
        return True


class Talk:
    """A greedy chat with what it shows."""

    def __init__(self, model: Model, out: io.StringIO | None = None, **sampling: float):
        self.out, self.notes = out or io.StringIO(), io.StringIO()
        self.chat = Chat(model, Sampling(**sampling), Ends(LENGTH), out=self.out, notes=self.notes)

    def __call__(self, *messages: str) -> str:
        """The notes on these messages, on one line."""
        self.notes.seek(0)
        self.notes.truncate()
        self.chat.run(messages)
        return " ".join(self.notes.getvalue().split())

    @property
    def texts(self) -> list[str]:
        return [turn.content for turn in self.chat.turns]


def expected(model: Model, *messages: str, system: str = "") -> list[str]:
    """The turns that greedy decoding gives, each answer from an empty cache."""
    turns = [{"role": "system", "content": system}] if system else []
    for message in messages:
        turns.append({"role": "user", "content": message})
        answer = "".join(token.text for token in model.stream(turns, max_tokens=LENGTH))
        turns.append({"role": "assistant", "content": answer})
    return [turn["content"] for turn in turns if turn["role"] != "system"]


# --- the conversation -----------------------------------------------------------------------------


def test_answers_are_those_of_the_model_and_the_second_reads_only_what_is_new(
    model: Model,
) -> None:
    talk = Talk(model)
    notes = talk("One", "Two")
    assert talk.texts == expected(model, "One", "Two")
    assert talk.out.getvalue() == "".join(f"{text}\n" for text in talk.texts[1::2])
    first, second = (
        len(model.tokenizer.chat([turn.model_dump() for turn in talk.chat.turns[:end]]))
        for end in (1, 3)
    )
    assert talk.chat.answers[0].prompt_tokens == first
    assert 0 < talk.chat.answers[1].prompt_tokens <= second - first
    assert notes.count("tokens/s") == notes.count("asleep") == 2
    assert f"read {talk.chat.answers[1].prompt_tokens} of {second} prompt tokens" in notes


def test_regen_writes_the_last_answer_anew_and_reads_one_token(model: Model) -> None:
    talk = Talk(model)
    talk("One", "/regen")
    assert talk.texts == expected(model, "One")
    assert talk.chat.answers[1].prompt_tokens == 1
    warm = Talk(model, temperature=5.0, seed=1)
    warm("One")
    before = warm.texts[1]
    warm("/regen")
    assert warm.texts[0] == "One"
    assert warm.texts[1] != before
    assert "no answer yet" in Talk(model)("/regen")


def test_system_temperature_and_new_change_what_follows(model: Model) -> None:
    talk = Talk(model, temperature=5.0)
    talk("/system Be brief.", "/temperature 0", "One")
    assert talk.texts == expected(model, "One", system="Be brief.")
    talk("/system", "/new", "Two")
    assert talk.texts == expected(model, "Two")


def test_a_saved_conversation_goes_on_where_it_was(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk = Talk(model)
    talk("/system Be brief.", "One", f"/save {file}", "Two", f"/save {file}")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    other = Talk(model)
    assert "2 answers" in other(f"/load {file}")
    assert other.texts == talk.texts
    other("Three")
    assert other.texts == expected(model, "One", "Two", "Three", system="Be brief.")


def test_a_foreign_file_is_neither_loaded_nor_written_over(model: Model, tmp_path: Path) -> None:
    talk, file = Talk(model), tmp_path / "notes.json"
    talk("One")
    for text in ("mine", '{"model": "m", "messages": [{"role": "user", "content": "One"}]}'):
        file.write_text(text)
        for command in ("save", "load"):
            assert str(file) in talk(f"/{command} {file}")
        assert file.read_text() == text
    assert "No such file" in talk(f"/load {tmp_path / 'none'}")
    assert "name a file" in talk("/save")
    assert "cannot be written" in talk("/save /proc/talk.json")
    assert talk.texts == expected(model, "One")


def test_an_interrupt_stops_the_answer_and_not_the_program(model: Model) -> None:
    class Interrupts(io.StringIO):
        def write(self, text: str) -> int:
            if not self.getvalue():
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    talk = Talk(model, out=Interrupts())
    before = signal.getsignal(signal.SIGINT)
    notes = talk("One", "Two")
    assert signal.getsignal(signal.SIGINT) is before
    assert notes.count("stopped") == 1
    assert [made.tokens for made in talk.chat.answers] == [1, LENGTH]
    whole = expected(model, "One")[1]
    assert whole.startswith(talk.texts[1])
    assert len(talk.texts) == 4


def test_what_does_not_fit_is_refused_and_the_conversation_stays(model: Model) -> None:
    talk = Talk(model)
    assert "shorten the prompt" in talk("One", "x" * 1000)
    assert talk.texts == expected(model, "One")
    talk("Two")
    assert talk.texts == expected(model, "One", "Two")


def test_help_lists_the_commands_and_mistakes_name_them(model: Model) -> None:
    talk = Talk(model)
    shown = talk("/help")
    for name in ["system", "save", "load", "regen", "temperature", "stats", "quit", "help"]:
        assert f"/{name} " in shown
    assert "/help lists them" in talk("/what")
    assert "'warm'" in talk("/temperature warm")
    assert "temperature is -1.0" in talk("/temperature -1")
    assert "of context in use" in talk("/stats")
    assert "answers: 1, of 8 tokens" in talk("One", "/stats")
    assert talk("/quit", "/what") == ""


# --- the terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("one", ""),
        ("one\n\n", ""),  # more of the same block may follow
        ("one\n\ntwo", "one\n\n"),
        ("- one\n\n  more of it", ""),
        ("```\none\n\ntwo", ""),
        ("```\none\n\ntwo\n```\n\nthree", "```\none\n\ntwo\n```\n\n"),
    ],
)
def test_only_whole_blocks_are_printed_for_good(text: str, whole: str) -> None:
    assert text[: whole_blocks(text)] == whole


def test_markdown_is_drawn_and_cannot_command_the_terminal(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = iter(["# Bo", "ats\n\n**la", "rge**\x1b]0;title\x07", " ones"])
    token = model.tokenizer.token_bytes

    def text(_: object, token_id: int) -> str:
        assert token(token_id) is not None
        return next(pieces, "")

    monkeypatch.setattr("turbosparse.engine.text.Detokenizer.step", text)
    talk = Talk(model, out=Screen())
    talk("One")
    shown = talk.out.getvalue()
    assert "Boats" in shown
    assert "**" not in shown
    assert "\x1b]0;" not in shown
    assert "]0;title ones" in shown


def test_lines_of_a_pipe_are_messages_and_no_torch_is_loaded(packed_mistral: Path) -> None:
    code = (
        "import sys; from turbosparse import cli\n"
        "try: cli.main()\n"
        "finally: assert 'torch' not in sys.modules, 'torch'"
    )
    words = ["chat", packed_mistral, "--temperature", "0", "--max-tokens", str(LENGTH)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], input="One\n\nTwo", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = expected(turbosparse.load(packed_mistral, threads=1), "One", "Two")[1::2]
    assert done.stdout.split("\n") == "\n".join([*answers, ""]).split("\n")
    assert done.stderr.count("tokens/s") == 2


def test_a_terminal_edits_several_lines_and_survives_an_interrupt(
    packed_mistral: Path, tmp_path: Path
) -> None:
    main, other = pty.openpty()
    seen = b""

    def wait(until: Callable[[], bool]) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while not until():
            assert time.monotonic() < end, seen
            if select.select([main], [], [], 0.1)[0]:
                seen += os.read(main, 4096)

    environment = {"XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    entry = [Path(sys.executable).with_name("turbosparse"), "chat", packed_mistral]
    with subprocess.Popen(
        [*entry, "--temperature", "0", "--max-tokens", "4"],
        stdin=other, stdout=other, stderr=other, start_new_session=True,
        env=os.environ | environment,
    ) as process, ExitStack() as stack:  # fmt: skip
        stack.callback(process.kill)
        os.close(other)
        wait(lambda: "›".encode() in seen)
        os.write(main, b"not this\x03")  # Ctrl-C leaves the line
        wait(lambda: seen.count("›".encode()) > 1 and b"not this" in seen)
        os.write(main, b"One\x1b\rmore\r")
        wait(lambda: b"tokens/s" in seen)
        file = tmp_path / "talk.json"
        os.write(main, f"/save {file}\r".encode())
        wait(file.exists)
        for _ in range(600):
            if process.poll() is not None:
                break
            os.write(main, b"\x04")  # Ctrl-D; one that comes between two prompts is lost
            time.sleep(0.1)
        assert process.returncode == 0
        os.close(main)
    messages = json.loads(file.read_text())["messages"]
    assert [turn["role"] for turn in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "One\nmore"
    assert "One" in (tmp_path / "turbosparse" / "chat").read_text()


def test_an_answer_has_one_token_at_least(packed_mistral: Path) -> None:
    with pytest.raises(TurboSparseError, match="max-tokens is 0"):
        chat(packed_mistral, max_tokens=0, threads=1)


def test_a_model_that_is_not_packed_is_told_how_to_become_one(dense: Callable[[str], Path]) -> None:
    with pytest.raises(TurboSparseError, match=r"`turbosparse chat .*-packed`"):
        chat(dense("mistral"))
