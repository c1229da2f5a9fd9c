"""The command line: one verb per stage, imported when it is called.

The flags of a verb are the parameters of its function, and its help is the docstring.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from typing import Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter

from turbosparse import __version__
from turbosparse.base.errors import TurboSparseError

VERBS = {
    "demo": (
        "turbosparse.demo.run:demo",
        "See the whole line work on a small model made here, with no network.",
    ),
    "convert": (
        "turbosparse.convert:convert",
        "Replace the SwiGLU feed-forward of a dense model by dReLU.",
    ),
    "train": (
        "turbosparse.train:train",
        "Recover quality by continued training, or train from scratch.",
    ),
    "analyse": (
        "turbosparse.analyse:analyse",
        "Measure perplexity and activation sparsity of a model.",
    ),
    "report": (
        "turbosparse.report:report",
        "Make a page of what is known inside one model or several.",
    ),
    "pack": ("turbosparse.pack:pack", "Quantise a model and lay it out for sparse reading."),
    "inspect": ("turbosparse.inspect:inspect", "Print what a packed folder holds."),
    "validate": ("turbosparse.inspect:validate", "Check a packed folder to the last byte."),
    "export": ("turbosparse.export:export", "Write a sparse model in the form of another program."),
    "publish": (
        "turbosparse.publish:publish",
        "Upload a model to the hub, with a card of what was measured of it.",
    ),
    "generate": ("turbosparse.generate:generate", "Continue a prompt with a packed model."),
    "chat": ("turbosparse.chat:chat", "Talk with a packed model in the terminal."),
    "serve": ("turbosparse.serve:serve", "Serve packed models by the OpenAI API."),
    "evaluate": (
        "turbosparse.evaluate:evaluate",
        "Measure quality: perplexity, tasks, and how far two models agree.",
    ),
    "count": (
        "turbosparse.count:count",
        "Count the parameters, bytes and FLOPs of a token, and the speed that they allow.",
    ),
    "plan": (
        "turbosparse.plan:plan",
        "Say how fast a packed model will be under a memory limit, or which limit a speed needs.",
    ),
    "bench": (
        "turbosparse.bench:bench",
        "Measure decoding speed against the machine's bandwidth, and against a peer.",
    ),
}

DATA_VERBS = {
    "prepare": (
        "turbosparse.prepare:prepare",
        "Tokenise and pack a recipe's data once, into files that training maps.",
    ),
}
PREDICTOR_VERBS = {
    "train": ("turbosparse.predictor:train", "Make predictors for a sparse model."),
    "score": (
        "turbosparse.score:score",
        "Measure what predictors cost in quality and save in bytes.",
    ),
}
GROUPS = {
    "data": ("Prepare data for training.", DATA_VERBS),
    "predictor": ("Find the neurons that a token needs before reading them.", PREDICTOR_VERBS),
}

app = App(
    name="turbosparse",
    help="Run large language models on a fraction of their weights.\n\n"
    "A model goes convert → train → analyse → pack → generate. Start with `turbosparse demo`.",
    help_epilogue="Every verb takes --json: its result as one JSON document, last line of stdout.",
    version=__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `main` reports it
)
app.meta.suppress_keyboard_interrupt = False
for _verb, (_target, _help) in VERBS.items():
    names = (_verb, "analyze") if _verb == "analyse" else _verb
    app.command(_target, name=names, help=_help)
for _name, (_help, _verbs) in GROUPS.items():
    _group = App(name=_name, help=_help)
    for _verb, (_target, _about) in _verbs.items():
        _group.command(_target, name=_verb, help=_about)
    app.command(_group)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Run one verb and show its result."""
    command, bound, injected = app.parse_args(tokens, exit_on_error=False, print_error=False)
    if "show" in injected and not as_json:
        bound.arguments["show"] = _show_piece
    result = command(*bound.args, **bound.kwargs)
    if result is None or os.environ.get("RANK", "0") != "0":  # torchrun: one process speaks
        return
    if as_json:
        print(json.dumps(result if isinstance(result, str) else dataclasses.asdict(result)))
        return
    from rich.console import Console

    # a table is what was asked for; a line only says what was done
    table = hasattr(result, "__rich__")
    Console(stderr=not table, highlight=False, markup=False).print(
        result if table else str(result), soft_wrap=not table
    )


def _show_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> NoReturn:
    """Entry point: a mistake in the input is one line on stderr and exit code 2."""
    # a stop by a supervisor, or by a terminal that closes, unwinds like Ctrl-C, so that nothing
    # half-written is left behind
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):  # whatever the locale can show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app.meta(sys.argv[1:], result_action="return_value")
        sys.stdout.flush()
    except (TurboSparseError, CycloptsError) as error:
        _fail(" ".join(str(error).split()), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", 1)
    except MemoryError:
        _fail("out of memory; use a smaller quantisation, a shorter prompt or fewer sequences", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"turbosparse: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
