"""Activations against each other in small: the paper's Tables 1 to 3 and Figures 4 and 5.

A SwiGLU model is trained from scratch, the base; then each activation is put into it and trained on
with the same further tokens in the same order, SwiGLU itself (the dense control) among them; and
each is trained from scratch on the base's tokens. What is measured is held out: none of it is in a
training part. Run it again to go on; finished runs are not trained again.

    python benchmarks/ablation.py                      # on the demo's own corpus
    python benchmarks/ablation.py --experts 8 --out runs/moe
    python benchmarks/ablation.py --data CORPORA --variants widen=1 widen=1,l1=1 widen=2,l1=1

Prints Markdown; OUT/result.json holds every number, OUT/losses.png the curves. The paper's own
figures are of a 300M model and 5B tokens: here only the comparison means something.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from ablation_data import make_data, training_texts
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from turbosparse.analyse import analyse
from turbosparse.analysis.measure import measure
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import copy_companions, new_folder, write_json
from turbosparse.convert import convert
from turbosparse.demo.tokenizer import train_tokenizer
from turbosparse.hf.activations import ACTIVATIONS as RECORDS
from turbosparse.hf.activations import WITHOUT_ZEROS, Activation
from turbosparse.hf.change import force_sparsity
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.packed.stats import FILE as STATS_FILE
from turbosparse.packed.stats import Stats
from turbosparse.train import run_recipe
from turbosparse.training.readers import documents, take_last
from turbosparse.training.recipe import parse_recipe

ACTIVATIONS = ("swiglu", "geglu", "reglu", "relu", "drelu")
FORCED = (0.0, 0.5, 0.8, 0.85, 0.9)
FORCED_OF = ("swiglu", "drelu")
TOP_K = 2  # experts of a token


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; the folder keeps it."""

    data: str | None
    hidden: int
    layers: int
    neurons: int
    experts: int
    vocabulary: int
    context: int
    tokens: int
    extra_tokens: int
    batch_size: int
    learning_rate: float
    held_out_tokens: int  # of each domain
    precision: str
    seed: int


QUICK = {
    "hidden": 32,
    "layers": 2,
    "neurons": 64,
    "vocabulary": 320,
    "context": 64,
    "tokens": 32_000,
    "extra_tokens": 16_000,
    "batch_size": 8,
    "held_out_tokens": 1000,
}


@dataclass(frozen=True)
class Run:
    """One training: `scratch`, or `continued` from the base; `extras` are keys of the recipe.

    With `widen` each FFN gets so many times its neurons, in a calibrated surgery if of dReLU.
    """

    road: str
    activation: str
    label: str
    widen: float | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.road}-{self.label}"

    @property
    def surgery(self) -> str:
        calibrated = f"+widen={self.widen:g}" if self.widen else ""
        return f"surgery-{self.activation}{calibrated}"


BASE = Run("scratch", "swiglu", "swiglu")


def plan(args: argparse.Namespace, settings: Settings) -> list[Run]:
    """All runs, the base first."""
    runs = [BASE] + [Run("scratch", a, a) for a in args.scratch if a != "swiglu"]
    if settings.extra_tokens:
        runs += [Run("continued", a, a) for a in args.activations]
        warmup = settings.extra_tokens // (settings.batch_size * settings.context) // 2
        for variant in args.variants:
            label = "+".join(["drelu", *(f"{key}={value:g}" for key, value in variant.items())])
            extras: dict[str, Any] = {}
            if weight := variant.get("l1"):
                extras["l1"] = {"weight": weight, "warmup_steps": warmup}
            if rate := variant.get("lr"):
                extras["learning_rate"] = rate
            runs.append(Run("continued", "drelu", label, variant.get("widen"), extras))
        if wide := args.wide_control:
            runs.append(Run("continued", "swiglu", f"swiglu+widen={wide:g}", wide))
    return runs


@torch.no_grad()
def widen_dense(source: Path, target: Path, times: float) -> None:
    """A SwiGLU model with more neurons, which add nothing yet: the control of a wider dReLU one."""
    model = load_model(source)
    more = round((times - 1) * model.config.intermediate_size)

    def wider(weight: Tensor) -> Tensor:
        new = torch.randn(*weight.shape[:-2], more, weight.shape[-1], dtype=weight.dtype)
        return torch.cat([weight, new * model.config.initializer_range], -2)

    for mlp in (block.mlp for block in model.model.layers):
        if hasattr(mlp, "experts"):
            gate_up = [wider(half) for half in mlp.experts.gate_up_proj.chunk(2, -2)]
            mlp.experts.gate_up_proj = Parameter(torch.cat(gate_up, -2))
            mlp.experts.down_proj = Parameter(pad(mlp.experts.down_proj, (0, more)))
        else:
            for part in (mlp.gate_proj, mlp.up_proj):
                part.weight = Parameter(wider(part.weight))
            mlp.down_proj.weight = Parameter(pad(mlp.down_proj.weight, (0, more)))
    model.config.intermediate_size += more
    with new_folder(target) as work:
        model.save_pretrained(work)
        copy_companions(source, work)


def surgery(out: Path, settings: Settings, run: Run) -> Path:
    """The model that the run goes on from."""
    folder, base = out / run.surgery, out / BASE.name
    if folder.exists():
        return folder
    if run.widen and run.activation == "swiglu":
        torch.manual_seed(settings.seed)
        widen_dense(base, folder, run.widen)
        return folder
    options: dict[str, Any] = {"activation": run.activation}
    if run.widen:
        options |= {"data": sorted((out / "corpus").glob("*/extra.jsonl")), "widen": run.widen}
    convert(str(base), folder, **options)
    return folder


def train_run(out: Path, settings: Settings, run: Run) -> None:
    """Train it, unless it is there; a stopped one goes on."""
    folder = out / run.name
    if folder.exists():
        return
    model: Any = {
        "model_type": "mixtral" if settings.experts else "mistral",
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.neurons,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": settings.context,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if settings.experts:
        model |= {"num_local_experts": settings.experts, "num_experts_per_tok": TOP_K}
        model |= {"output_router_logits": True}  # with it the loss keeps the experts balanced
    scratch = run.road == "scratch"
    if not scratch:
        model = str(surgery(out, settings, run))
    part, tokens = ("base", settings.tokens) if scratch else ("extra", settings.extra_tokens)
    domains = sorted(path.name for path in (out / "corpus").iterdir())
    steps = tokens // (settings.batch_size * settings.context)
    rate = settings.learning_rate * (1 if scratch else 0.5)
    recipe = {
        "model": model,
        "activation": run.activation if scratch else None,
        "tokenizer": str(out / "tokenizer"),
        "data": {
            "sources": [
                {"name": d, "path": f"{d}/{part}.jsonl", "proportion": 1 / len(domains)}
                for d in domains
            ],
            "sequence_length": settings.context,
        },
        "tokens": tokens,
        "batch_size": settings.batch_size,
        "learning_rate": rate,
        "min_learning_rate": rate / 10,
        "warmup_steps": max(1, steps // 50),
        "precision": settings.precision,
        "seed": settings.seed,
        "log_every": max(1, steps // 60),
        "checkpoint_every": 200,
        **run.extras,
    }
    trained = run_recipe(parse_recipe(recipe, run.name), out=folder, root=out / "corpus")
    write_json(folder / "trained.json", asdict(trained))


def held_out(out: Path) -> list[Path]:
    return sorted((out / "corpus").glob("*/held_out.jsonl"))


def stats_of(out: Path, settings: Settings, name: str) -> Stats:
    if not (out / name / STATS_FILE).is_file():
        limit = settings.held_out_tokens
        analyse(str(out / name), data=held_out(out), max_tokens=limit)
    return Stats.load(out / name / STATS_FILE)


def perplexities(stats: Stats) -> dict[str, float]:
    by_domain = {Path(path).parent.name: stats.perplexity(path) for path in stats.nats}
    return {"all": stats.perplexity()} | by_domain


def losses(folder: Path) -> list[dict[str, float]]:
    """The log of a run, with `lm`: the loss without what L1 adds to it."""
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [row | {"lm": row["loss"] - row.get("loss/l1", 0.0)} for row in rows]


def sparsity_of_experts(stats: Stats) -> dict[str, Any]:
    """The counterparts of Fig. 5 and §6.2: of each expert, and of the layer with all its experts.

    `whole_layer` counts the neurons of the experts that a token was not sent to as inactive too.
    """
    _, experts, neurons = stats.active.shape
    tokens = stats.tokens.sum(-1) / min(TOP_K, experts)  # a token reaches so many
    used = stats.active.sum((-2, -1)) / (tokens * experts * neurons)
    sparsity, reached = (1 - stats.active_ratio()).tolist(), (stats.tokens > 0).tolist()
    return {
        "sparsity": [  # [layer][expert]; none of an expert that no token was sent to
            [value if known else None for value, known in zip(*layer, strict=True)]
            for layer in zip(sparsity, reached, strict=True)
        ],
        "share_of_tokens": (stats.tokens / stats.tokens.sum(-1, keepdim=True)).tolist(),
        "whole_layer": (1 - used).tolist(),
    }


def result_of(out: Path, settings: Settings, run: Run) -> dict[str, Any]:
    folder = out / run.name
    stats, log = stats_of(out, settings, run.name), losses(folder)
    last = log[-max(1, len(log) // 10) :]  # one line alone is noise
    trained = folder / "trained.json"
    result = {
        **asdict(run),
        "training_loss": sum(row["lm"] for row in last) / len(last),
        "first_loss": log[0]["lm"],
        "perplexity": perplexities(stats),
        "activation_sparsity": stats.activation_sparsity(),
        "sparsity_per_layer": (1 - stats.per_layer(stats.active_ratio())).tolist(),
        "gate_positive": float(stats.per_layer(stats.gate_ratio()).mean()),
        "trained": json.loads(trained.read_text()) if trained.is_file() else None,
        "log": log,
    }
    if settings.experts:
        result["experts"] = sparsity_of_experts(stats)
    if run.road == "continued":
        result["after_surgery"] = perplexities(stats_of(out, settings, run.surgery))
    if run.label in FORCED_OF:
        result["forced"] = forced(out, settings, run)
    return result


def forced(out: Path, settings: Settings, run: Run) -> list[dict[str, Any]]:
    """Held-out perplexity when each token keeps only its largest entries of Combined (Table 3)."""
    file = out / run.name / "forced.json"
    if not file.is_file():
        model, tokenizer = load_model(out / run.name), load_tokenizer(out / run.name)
        if settings.experts:
            model.set_experts_implementation("grouped_mm")
        corpora = {str(path): take_last(documents(path), None) for path in held_out(out)}
        rows = []
        for share in FORCED:
            with force_sparsity(model, share):
                stats = measure(model, tokenizer, corpora, max_tokens=settings.held_out_tokens)
            zeros = stats.activation_sparsity()
            rows.append({"share": share, "perplexity": perplexities(stats), "zeros": zeros})
        write_json(file, rows)
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


def exact_reads(run: dict[str, Any]) -> float:
    """FFN weights that exact mode reads for a token, as a share of those of the dense FFN.

    All gates, up rows where the gate is positive, down rows of active neurons; the ungated relu has
    its up rows for gates. SwiGLU and GEGLU have no zeros to go by.
    """
    active, gate = 1 - run["activation_sparsity"], run["gate_positive"]
    gate = 1 if run["activation"] in WITHOUT_ZEROS else gate
    matrices = 1 + RECORDS[run["activation"]].gated * gate + active
    return float((run["widen"] or 1) * matrices / 3)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(result: dict[str, Any]) -> Iterator[str]:
    """The tables as Markdown."""
    runs, settings = result["runs"], result["settings"]
    domains = [name for name in runs[0]["perplexity"] if name != "all"]
    yield (
        f"{settings['layers']} layers, hidden {settings['hidden']}, {settings['neurons']} neurons"
        + (
            f" in each of {settings['experts']} experts, {TOP_K} used"
            if settings["experts"]
            else ""
        )
        + f"; {settings['tokens'] / 1e6:g} M tokens from scratch, "
        f"{settings['extra_tokens'] / 1e6:g} M further ones; seed {settings['seed']}; "
        f"perplexity of {result['held_out_tokens']} held-out tokens"
    )
    titles = {
        "scratch": "From scratch (Table 2)",
        "continued": "Continued from the SwiGLU base (Tables 1 and 2)",
    }
    # active neurons are counted in the dense FFN's, which a wider one has more of
    measures = [
        "activation sparsity",
        "active of the dense neurons",
        "exact mode reads",
        "gate > 0",
    ]
    for road, title in titles.items():
        chosen = [run for run in runs if run["road"] == road]
        if not chosen:
            continue
        start = ["right after surgery"] if road == "continued" else []
        head = ["activation", "minutes", "training loss", *start, "perplexity", *domains]
        rows = []
        for run in chosen:
            after = [f"{run['after_surgery']['all']:.2f}"] if start else []
            rows.append(
                [
                    run["label"],
                    f"{run['trained']['seconds'] / 60:.1f}" if run["trained"] else "–",
                    f"{run['training_loss']:.4f}",
                    *after,
                    f"{run['perplexity']['all']:.3f}",
                    *(f"{run['perplexity'][domain]:.3f}" for domain in domains),
                    f"{run['activation_sparsity']:.2%}",
                    f"{(1 - run['activation_sparsity']) * (run['widen'] or 1):.2%}",
                    f"{exact_reads(run):.0%}",
                    # the ungated relu has a gate in the checkpoint that nothing reads
                    "–" if run["activation"] == "relu" else f"{run['gate_positive']:.2%}",
                ]
            )
        yield f"### {title}\n\n" + table([*head, *measures], rows)
    rows = [
        [f"{run['road']} {run['label']}", *(f"{row['perplexity']['all']:.3f}" for row in found)]
        for run in runs
        if (found := run.get("forced"))
    ]
    head = ["", *(f"{share:.0%}" for share in FORCED)]
    yield "### Perplexity at forced sparsity (Table 3)\n\n" + table(head, rows)
    if settings["experts"]:
        rows = []
        for run in runs:
            of = run["experts"]
            every = [value for layer in of["sparsity"] for value in layer if value is not None]
            whole = sum(of["whole_layer"]) / len(of["whole_layer"])
            mean = f"{run['activation_sparsity']:.2%}"
            spread = [f"{min(every):.2%}", f"{max(every):.2%}"]
            rows.append([f"{run['road']} {run['label']}", mean, *spread, f"{whole:.2%}"])
        head = ["", "experts in use", "least", "greatest", "whole MoE layer"]
        yield "### Sparsity of the experts (Fig. 5, §6.2)\n\n" + table(head, rows)
        for run in runs:
            if run["label"] == "drelu":
                of = run["experts"]
                rows = [
                    [
                        str(layer),
                        *("–" if s is None else f"{s:.1%}" for s in sparsity),
                        f"{whole:.2%}",
                    ]
                    for layer, (sparsity, whole) in enumerate(
                        zip(of["sparsity"], of["whole_layer"], strict=True)
                    )
                ]
                names = [f"expert {number}" for number in range(settings["experts"])]
                head = ["layer", *names, "whole layer"]
                yield f"{run['road']} drelu, each expert:\n\n" + table(head, rows)


def plot(result: dict[str, Any], file: Path) -> None:
    """Loss (Fig. 4) and sparsity against the tokens seen, from scratch and continued."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    settings = result["settings"]
    roads = [r for r in ("scratch", "continued") if any(x["road"] == r for x in result["runs"])]
    figure, axes = plt.subplots(2, len(roads), squeeze=False, figsize=(6 * len(roads), 7))
    step_tokens = settings["batch_size"] * settings["context"] / 1e6
    for column, road in enumerate(roads):
        start = settings["tokens"] / 1e6 if road == "continued" else 0
        for run in result["runs"]:
            if run["road"] == road:
                x = [start + row["step"] * step_tokens for row in run["log"]]
                axes[0][column].plot(x, [row["lm"] for row in run["log"]], label=run["label"])
                axes[1][column].plot(x, [row["activation_sparsity"] for row in run["log"]])
        axes[0][column].set(title=road, ylabel="training loss, nats/token")
        axes[1][column].set(xlabel="M tokens", ylabel="activation sparsity")
        axes[0][column].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def open_folder(out: Path, settings: Settings) -> None:
    stored = out / "settings.json"
    if stored.is_file():
        old, new = json.loads(stored.read_text()), asdict(settings)
        if changed := sorted(key for key in new if new[key] != old.get(key)):
            raise TurboSparseError(
                f"{out} holds an ablation with other settings ({', '.join(changed)}); remove it or "
                "choose another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(stored, asdict(settings))


def ablate(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Train what is missing, measure, and write the result."""
    began = time.perf_counter()
    out: Path = args.out
    open_folder(out, settings)
    corpus = make_data(
        out / "corpus",
        Path(settings.data).expanduser() if settings.data else None,
        tokens=settings.tokens,
        extra_tokens=settings.extra_tokens,
        held_out=settings.held_out_tokens,
        seed=settings.seed,
    )
    if not (out / "tokenizer").exists():
        texts = training_texts(out / "corpus")
        fast = train_tokenizer(texts, vocabulary=settings.vocabulary, context=settings.context)
        with new_folder(out / "tokenizer") as work:
            fast.save_pretrained(work)
    runs = plan(args, settings)
    for number, run in enumerate(runs, 1):
        print(f"{number}/{len(runs)} {run.name}", file=sys.stderr)
        train_run(out, settings, run)
    results = [result_of(out, settings, run) for run in runs]
    result = {
        "settings": asdict(settings),
        "machine": machine(),
        "corpus_bytes": corpus,
        "held_out_tokens": sum(stats_of(out, settings, BASE.name).predicted.values()),
        "seconds": time.perf_counter() - began,  # of this call: a resumed one is shorter
        "runs": results,
    }
    write_json(out / "result.json", result)
    return result


def variant(text: str) -> dict[str, float]:
    given = dict(part.partition("=")[::2] for part in text.split(","))
    if unknown := given.keys() - {"widen", "l1", "lr"}:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return {key: float(value) for key, value in given.items()}


def activations(text: str) -> list[str]:
    chosen = [part for part in text.split(",") if part and part != "none"]
    if unknown := [name for name in chosen if name not in get_args(Activation)]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}")
    return chosen


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", help="a folder with a folder of text for each domain")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--neurons", type=int, default=384)
    parser.add_argument("--experts", type=int, default=0, help="of a Mixtral; 0: a Mistral")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--extra-tokens", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="half of it to go on")
    parser.add_argument("--held-out-tokens", type=int, default=20_000, help="of each domain")
    parser.add_argument("--precision", default="fp32", help="of training: fp32, bf16 or auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--activations", type=activations, default=list(ACTIVATIONS))
    parser.add_argument(
        "--scratch", type=activations, help="those also trained from scratch; none: only the base"
    )
    parser.add_argument(
        "--variants",
        type=variant,
        nargs="*",
        default=[],
        metavar="widen=1,l1=1",
        help="dReLU continued in these ways too: widen, after a calibrated surgery that gives so "
        "many times the neurons; l1, with this weight, which grows over half of the steps; lr, "
        "from this learning rate on to where the others end",
    )
    parser.add_argument(
        "--wide-control", type=float, help="SwiGLU continued with so many times the neurons too"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    if "--quick" in (sys.argv[1:] if arguments is None else arguments):
        parser.set_defaults(**QUICK)
    args = parser.parse_args(arguments)
    if args.scratch is None:
        args.scratch = args.activations
    return args, Settings(**{key: vars(args)[key] for key in Settings.__dataclass_fields__})


def main(arguments: list[str] | None = None) -> None:
    args, settings = parse(arguments)
    try:
        result = ablate(args, settings)
    except TurboSparseError as error:
        raise SystemExit(str(error)) from error
    print("\n\n".join(report(result)))
    try:
        plot(result, args.out / "losses.png")
    except ImportError:
        print("no losses.png: matplotlib comes with pip install '.[report]'", file=sys.stderr)


if __name__ == "__main__":
    main()
