"""A conversation with a packed model in the terminal.

turbosparse chat mistral-q4
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import statistics
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, TextIO

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path, new_file
from turbosparse.engine.api import Model, load
from turbosparse.engine.engine import Mode
from turbosparse.engine.generation import Ends, Token, check_prompt, stream
from turbosparse.engine.sampling import Sampling
from turbosparse.engine.sequence import Sequence
from turbosparse.generate import Generated, check_packed, summarise

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what would command the terminal
_FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)
_BORDER = re.compile(r"\n[ \t]*\n(?=\S)")  # between two blocks of markdown


def chat(
    model: AnyPath,
    *,
    system: str = "",
    temperature: float = 0.7,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    max_tokens: int | None = None,
    seed: int | None = None,
    mode: Mode = "auto",
    threads: int | None = None,
    kv_bytes: int | None = None,
    draft: str = "auto",
) -> None:
    """Talk with a packed model.

    Enter sends a message and Alt-Enter begins a new line; Ctrl-C stops an answer and Ctrl-D ends
    the program. /help lists the commands. Without a terminal each line of standard input is a
    message, and the answers go to standard output.

    Parameters
    ----------
    model
        Packed folder.
    system
        System prompt: what the model is told before the conversation.
    temperature
        0 is greedy: always the likeliest token.
    top_p
        Sample from the smallest set of tokens that holds this probability.
    repetition_penalty
        Divides the logits of tokens that came in the conversation; 1 is none.
    max_tokens
        End an answer after this many tokens; by default where the model's context ends.
    seed
        Makes sampling repeatable.
    mode
        exact skips neurons that are exactly zero and loses nothing; predicted also those that the
        folder's predictor does not pick, and may lose some; dense reads all.
    threads
        Threads of the C++ core; by default all processors of this process.
    kv_bytes
        Memory for keys and values, at most; by default half of what is available.
    draft
        Who guesses tokens ahead, so that one pass can check several: "auto", a packed folder of a
        smaller model, or "off"; see `turbosparse generate --help`.
    """
    sampling = Sampling(
        temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    check_packed(local_path(model), "chat")
    opened = load(model, mode=mode, threads=threads, kv_bytes=kv_bytes, draft=draft)
    talk = Chat(opened, sampling, Ends(opened.engine.context if max_tokens is None else max_tokens))
    talk.command_system(system)
    talk.say(f"{opened.engine.describe()}\n/help lists the commands")
    talk.run(_typed([*talk.commands(), "quit"]) if sys.stdin.isatty() else _piped(sys.stdin))


class Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Saved(BaseModel):
    """A conversation as `/save` writes it."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Turn]

    @classmethod
    def read(cls, path: Path) -> Saved:
        try:
            saved = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise TurboSparseError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            what = error.errors()[0]
            raise TurboSparseError(
                f"{path} is not a conversation that /save wrote: {what['msg']}"
            ) from error
        roles = [turn.role for turn in saved.messages if turn.role != "system"]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise TurboSparseError(f"{path}: its turns are not of user and assistant by turns")
        return saved


class Chat:
    """A conversation, and the commands on it.

    Args:
        model: that answers.
        sampling: how tokens are chosen.
        ends: where an answer ends, besides the model's own end tokens.
        out: where the answers go; figures and errors go to `notes`.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        ends: Ends,
        *,
        out: TextIO | None = None,
        notes: TextIO | None = None,
    ):
        self.model, self.sampling = model, sampling
        self.ends = replace(ends, ids=ends.ids | model.tokenizer.stop_ids(chat=True))
        self.sequence = model.new_sequence()
        self.turns: list[Turn] = []
        self.system = ""
        self.answers: list[Generated] = []
        self._out = Console(file=out or sys.stdout, highlight=False)
        self._notes = Console(file=notes or sys.stderr, highlight=False, markup=False)

    def run(self, messages: Iterable[str]) -> None:
        """Answer messages and obey commands until there are no more, or one is /quit."""
        with self.sequence:
            for message in messages:
                try:
                    if message.strip() == "/quit":
                        return
                    if message.startswith("/"):
                        self.obey(message)
                    elif message.strip():
                        self.ask(message)
                except TurboSparseError as error:
                    self.say(str(error), style="red")

    def say(self, text: str, *, style: str = "dim") -> None:
        self._notes.print(text, style=style, soft_wrap=True)  # a path stays whole

    def ask(self, message: str) -> None:
        """Answer a message. An error takes it out of the conversation again."""
        self.turns.append(Turn(role="user", content=message))
        try:
            answer = self._answer()
        except BaseException:
            self.turns.pop()
            raise
        self.turns.append(Turn(role="assistant", content=answer))

    def _answer(self) -> str:
        ids = self.model.tokenizer.chat([turn.model_dump() for turn in self._messages])
        check_prompt(ids, self.sequence.context)
        self.sequence.replace(ids)
        read = len(self.sequence.pending)
        tokens: list[Token] = []
        with _shown(self._out) as show, _stopped_by_interrupt(self.sequence):
            for token in _in_thread(self._tokens(ids)):
                tokens.append(token)
                show(token.text)
        self._count(tokens, len(ids), read)
        return "".join(token.text for token in tokens)

    @property
    def _messages(self) -> list[Turn]:
        return [*([Turn(role="system", content=self.system)] * bool(self.system)), *self.turns]

    def _tokens(self, ids: list[int]) -> Iterator[Token]:
        sampling = self.sampling
        if sampling.seed is not None:  # of each answer another, or /regen would give the same
            sampling = replace(sampling, seed=sampling.seed + len(self.answers))
        return stream(
            self.model.engine, self.model.tokenizer, ids,
            sampling=sampling, ends=self.ends, sequence=self.sequence, draft=self.model.draft,
        )  # fmt: skip

    def _count(self, tokens: list[Token], prompt: int, read: int) -> None:
        stopped = tokens[-1].finish == "cancelled"
        if passes := tokens[: len(tokens) - stopped]:
            made = summarise(passes, read, self.model.engine.describe())
            self.answers.append(made)
            self.say(
                f"{made.tokens} tokens at {made.tokens_per_second:.1f} tokens/s · "
                f"{made.activation_sparsity:.1%} of the neurons asleep · "
                f"read {read} of {prompt} prompt tokens in {made.prompt_seconds:.2f} s"
                f"{' · stopped' if stopped else ''}"
            )
        else:
            self.say("stopped")

    # -- commands ----------------------------------------------------------------------------------

    def obey(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command = self.commands().get(name)
        if command is None:
            raise TurboSparseError(
                f"/{name} is not a command; /help lists them. Begin a message with a space to send "
                "it as it is"
            )
        command(rest.strip())

    def commands(self) -> dict[str, Callable[[str], None]]:
        return {
            name.removeprefix("command_"): getattr(self, name)
            for name in vars(type(self))
            if name.startswith("command_")
        }

    def command_system(self, text: str) -> None:
        """TEXT  tell the model this before the conversation; without TEXT nothing"""
        self.system = text

    def command_regen(self, _: str) -> None:
        """write the last answer anew"""
        if not self.turns:
            raise TurboSparseError("there is no answer yet; send a message first")
        message, answer = self.turns[-2:]
        del self.turns[-2:]
        try:
            self.ask(message.content)
        except BaseException:
            self.turns += [message, answer]
            raise

    def command_temperature(self, text: str) -> None:
        """NUMBER  how freely tokens are drawn; 0 always takes the likeliest"""
        try:
            temperature = float(text)
        except ValueError:
            raise TurboSparseError(
                f"temperature {text!r} is not a number; it is {self.sampling.temperature:g} now"
            ) from None
        self.sampling = replace(self.sampling, temperature=temperature)

    def command_new(self, _: str) -> None:
        """begin a new conversation"""
        self.turns.clear()

    def command_save(self, text: str) -> None:
        """FILE  write the conversation as JSON"""
        path = _file(text)
        if path.exists():
            Saved.read(path)  # nothing else is written over
        saved = Saved(model=self.model.engine.packed.folder.name, messages=self._messages)
        try:
            with new_file(path) as work:
                work.write_text(saved.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise TurboSparseError(f"{path} cannot be written: {error.strerror}") from error

    def command_load(self, text: str) -> None:
        """FILE  go on with a saved conversation"""
        saved = Saved.read(_file(text))
        system = [turn.content for turn in saved.messages if turn.role == "system"]
        self.system = "\n".join(system)
        self.turns = [turn for turn in saved.messages if turn.role != "system"]
        self.say(f"{len(self.turns) // 2} answers, by {saved.model}")

    def command_stats(self, _: str) -> None:
        """speed and sparsity of all answers so far"""
        self.say(self.model.engine.describe())
        if self.answers:
            tokens = sum(made.tokens for made in self.answers)
            self.say(
                f"answers: {len(self.answers)}, of {tokens} tokens; the median one came at "
                f"{statistics.median(made.tokens_per_second for made in self.answers):.1f} "
                "tokens/s with "
                f"{statistics.median(made.activation_sparsity for made in self.answers):.1%} of "
                f"the neurons asleep; {sum(made.prompt_tokens for made in self.answers)} prompt "
                "tokens were read"
            )
        self.say(f"{self.sequence.length} of {self.sequence.context} tokens of context in use")

    def command_help(self, _: str) -> None:
        """list the commands"""
        for name, command in [*self.commands().items(), ("quit", None)]:
            self.say(f"/{name} {(inspect.getdoc(command) if command else 'end the program')}")


def _file(text: str) -> Path:
    if not text:
        raise TurboSparseError("name a file, as in /save talk.json")
    return local_path(text)


# -- input -----------------------------------------------------------------------------------------


def _piped(source: TextIO) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in source)


def _typed(commands: Iterable[str]) -> Iterator[str]:
    """Messages from the terminal; those of earlier sessions come back with the arrow keys."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(
        "› ", multiline=True, key_bindings=keys, prompt_continuation="  ",
        history=FileHistory(str(_history())),
        completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
        complete_while_typing=False,
    )  # fmt: skip
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:  # leaves what was typed
            continue
        except EOFError:
            return


def _history() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    path = state / "turbosparse" / "chat"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


# -- output ----------------------------------------------------------------------------------------


def _in_thread(tokens: Iterator[Token]) -> Iterator[Token]:
    """The same tokens, made elsewhere: this thread stays free to handle Ctrl-C during a pass."""
    with ThreadPoolExecutor(1) as worker:
        while token := worker.submit(next, tokens, None).result():
            yield token


@contextmanager
def _stopped_by_interrupt(sequence: Sequence) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, lambda *_: sequence.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sequence.resume()


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[str], None]]:
    """Yields what shows a piece of an answer: markdown on a terminal, else the text as it is."""
    if console.is_terminal:
        with _without_echo(), _Drawn(console) as drawn:
            yield drawn.add
        return

    def write(piece: str) -> None:
        console.file.write(piece)
        console.file.flush()

    yield write
    write("\n")


@contextmanager
def _without_echo() -> Iterator[None]:
    """What is typed meanwhile would move the cursor; it waits for the next prompt."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class _Drawn:
    """Markdown as it comes: blocks that are whole are printed, the last one is drawn anew."""

    def __init__(self, console: Console):
        self._console, self._text = console, ""
        self._live = Live(console=console, transient=True, refresh_per_second=12)

    def __enter__(self) -> _Drawn:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._text:
            self._console.print(Markdown(self._text))
        self._console.print()

    def add(self, piece: str) -> None:
        self._text += _CONTROL.sub("", piece)
        if end := whole_blocks(self._text):
            self._console.print(Markdown(self._text[:end]))
            self._console.print()
            self._text = self._text[end:]
        self._live.update(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The last lines of what is not printed yet: more than the screen has cannot be redrawn."""
        lines = console.render_lines(Markdown(self._text or "…"), options)
        for line in lines[2 - console.height :]:
            yield from line
            yield Segment.line()


def whole_blocks(text: str) -> int:
    """Length of the blocks at the beginning of a markdown text that nothing can change any more."""
    ends = [border.end() for border in _BORDER.finditer(text)]
    return next((end for end in reversed(ends) if len(_FENCE.findall(text[:end])) % 2 == 0), 0)
