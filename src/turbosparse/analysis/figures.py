"""The pictures of a report, each of all models; what is not known of any of them is not drawn.

Narrow, with letters that are large for their width, so that they can be read on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import cycle
from operator import itemgetter
from typing import Any, NamedTuple

from turbosparse.base.errors import TurboSparseError

Facts = dict[str, Any]
COLOURS = ("#2f7fc1", "#d9662b", "#2a9d6f", "#8b5fbf", "#b8923a", "#c2477f")
INK = "#10203a"  # becomes the colour of the page's text
METHODS = {"top_k": "top-k", "threshold": "one threshold", "cett": "CETT", "gate": "gates cut"}
_DASHES = {"top_k": "--", "threshold": ":", "cett": "-", "gate": "-."}
_WIDTH, _HEIGHT = 4.6, 3.1


class Drawn(NamedTuple):
    """A figure as bytes; `svg` takes its ink from the page."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def _styled(models: Sequence[Facts]) -> Iterator[tuple[dict[str, str], Facts]]:
    """Each model, with the colour and the label of what is drawn of it."""
    for colour, model in zip(COLOURS, models, strict=False):
        yield {"color": colour, "label": model["name"]}, model


def _layers(axes: Any, models: Sequence[Facts]) -> bool:
    for own, model in _styled(models):
        layers = range(model["layers"])
        axes.plot(layers, _percent(model["layer_sparsity"]), **own, marker="o", ms=3)
        if model["zeros"] and not model["experts"]:
            values = [layer[0] for layer in model["quantiles"]["values"]]
            low, high = ([100 - 100 * v[at] for v in values] for at in (-1, 0))
            axes.fill_between(layers, low, high, color=own["color"], alpha=0.18, lw=0)
    axes.set(xlabel="layer", ylabel="zeros in Combined, %", ylim=(0, 101))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return any(model["zeros"] for model in models)


def _kept(axes: Any, models: Sequence[Facts]) -> bool:
    known = [(own["color"], model) for own, model in _styled(models) if model["curves"]]
    for colour, model in known:
        curves = model["curves"]
        for method, points in curves["methods"].items():
            some = sorted({(p["kept"], p["perplexity"] / curves["perplexity"]) for p in points})
            x, y = zip(*some, strict=True)
            label = model["name"] if method == "cett" else None
            axes.plot(_percent(x), y, _DASHES[method], color=colour, label=label, lw=1.6)
        if best := curves["cett"]:
            rise = best["perplexity"] / curves["perplexity"]
            axes.plot(100 * best["kept"], rise, "o", color=colour, ms=6)
    axes.set(xscale="log", ylim=(0.95, 2), xlabel="neurons kept, %")
    axes.set(ylabel="perplexity, × all neurons")
    axes.set_xticks((1, 2, 5, 10, 20, 50, 100), (1, 2, 5, 10, 20, 50, 100))
    axes.set_xticks((), minor=True)
    if known:
        least = min(p["kept"] for _, m in known for p in m["curves"]["methods"]["cett"])
        axes.set_xlim(100 * least)
    _styles(axes, {METHODS[method]: dash for method, dash in _DASHES.items()})
    return bool(known)


def _styles(axes: Any, styles: dict[str, str]) -> None:
    """What the styles of lines mean, whatever their colour."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], ls=style, color="#888888", label=name) for name, style in styles.items()
    ]
    axes.legend(handles=lines, frameon=False, fontsize=9)


def _hot(axes: Any, models: Sequence[Facts]) -> bool:
    for own, model in _styled(models):
        axes.plot(range(len(model["hot_curve"])), _percent(model["hot_curve"]), **own)
    axes.axhline(80, color=INK, lw=0.8, alpha=0.4)
    axes.set(xlabel="hottest neurons, %", ylabel="of the activations, %")
    axes.set(xlim=(0, 100), ylim=(0, 101))
    return True


def _together(axes: Any, models: Sequence[Facts]) -> bool:
    for own, model in _styled(models):
        for kind, style in (("windows", {"ls": "-"}), ("batches", {"ls": ":", "label": None})):
            sizes, shares = map(int, model[kind]), _percent(model[kind].values())
            axes.plot(list(sizes), shares, **own | style, marker="o", ms=2.5)
    _styles(axes, {"neighbours": "-", "far apart": ":"})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="tokens", ylabel="neurons they need together, %", ylim=(0, 101))
    return any(model["windows"] for model in models)


def _positions(axes: Any, models: Sequence[Facts]) -> bool:
    for own, model in _styled(models):
        active = [100 * b["active"] for b in model["positions"]]
        axes.plot(range(len(active)), active, **own, marker="o", ms=3)
    longest = max((model["positions"] for model in models), key=len)
    axes.set_xticks(range(0, len(longest), 2), [f"{b['from']:g}" for b in longest[::2]])
    axes.set(xlabel="position in the window, from", ylabel="active set, % of neurons")
    axes.set_ylim(bottom=0)
    return bool(longest)


def _values(which: str) -> Callable[[Any, Sequence[Facts]], bool]:
    def draw(axes: Any, models: Sequence[Facts]) -> bool:
        edges = models[0]["values"]["edges"]
        zero, highest = edges.index(0.0), 0.0
        for own, model in _styled(models):
            shares = _percent(model["values"][which])
            if shares[zero] > 0.5:
                own["label"] += f" ({shares[zero]:.0f} % zeros)"
            shares[zero] = 0.0  # it would dwarf the others
            highest = max(highest, *shares)
            axes.stairs(shares, range(len(shares) + 1), **own, lw=1.4)
        ticks = [(zero + 0.5, "0")]
        for size in (2.0**-4, 4.0):
            at = edges.index(size)
            ticks += [(at + 1, f"{size:.1g}"), (2 * zero - at, f"−{size:.1g}")]
        axes.set_xticks(*zip(*ticks, strict=True))
        axes.set(xlabel=f"{which}, logarithmic on both sides", ylabel="entries, %")
        axes.set_ylim(0, highest * 1.05 or 1)
        return True

    return draw


def _signs(axes: Any, models: Sequence[Facts]) -> bool:
    width = 0.8 / len(models)
    for number, (own, model) in enumerate(_styled(models)):
        positive = model["positive"]
        places = [n + (number + 0.5) * width - 0.4 for n in range(3)]
        shares = _percent(positive[name] for name in ("gate", "up", "both"))
        axes.bar(places, shares, width * 0.92, **own)
        chance = 100 * positive["gate"] * positive["up"]
        axes.hlines(chance, places[2] - width / 2, places[2] + width / 2, color=INK, lw=1.5)
    axes.set_xticks(range(3), ["gate > 0", "up > 0", "both"])
    axes.set(ylabel="entries, %")
    return True


def pareto(axes: Any, models: Sequence[Facts]) -> bool:
    """Perplexity lost against bytes, a line for each model whose predictor was scored."""
    known = [(c, m) for c, m in zip(cycle(COLOURS), models, strict=False) if m["predictor"]]
    for colour, model in known:
        points = sorted(model["predictor"]["points"], key=itemgetter("bytes"))
        axes.plot(
            [point["bytes"] for point in points],
            [100 * (point["perplexity"] - 1) for point in points],
            color=colour,
            label=f"{model['name']} ({model['predictor']['share']:.0%} of the FFN)",
            marker="o",
            ms=4,
        )
    axes.axvline(1, color=INK, lw=1)
    axes.axhline(0, color=INK, lw=1)
    axes.set(xlabel="bytes, ÷ exact mode", ylabel="perplexity lost, %")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.yaxis.set_major_formatter("{x:g}")
    return bool(known)


def _grid(key: str, words: str) -> Callable[[Any, Facts], bool]:
    def draw(axes: Any, model: Facts) -> bool:
        rows = [_percent(row) for row in model[key]]
        if not rows[0]:
            return False
        image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, label=words)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        axes.set(ylabel="layer")
        return True

    return draw


_OF_ALL: dict[str, tuple[str, str, Callable[[Any, Sequence[Facts]], bool]]] = {
    "layers": (
        "Sparsity of each layer",
        "Exact zeros in Combined, the mean over experts. The band holds 80 % of the tokens.",
        _layers,
    ),
    "kept": (
        "Perplexity against kept neurons",
        "A token keeps only some of its neurons. The dot: CETT has cost its percent of perplexity.",
        _kept,
    ),
    "predictor": (
        "What the predictor saves and costs",
        "Bytes of the feed-forwards at several thresholds; left of the line less than exact mode.",
        pareto,
    ),
    "hot": (
        "Hot and cold neurons",
        "How much the hottest neurons do; where all are active, of the squares of Combined.",
        _hot,
    ),
    "together": (
        "What several tokens need together",
        "Neurons in the active set of any of them: neighbours (guessing ahead, caches), or tokens "
        "far apart (batches).",
        _together,
    ),
    "positions": ("Along the window", "Size of the active set by position.", _positions),
    "signs": (
        "Gate and up",
        "How often each is positive, and both; the line is what chance would give.",
        _signs,
    ),
    "gate": ("Values of gate", "Before the activation.", _values("gate")),
    "up": ("Values of up", "Before the activation.", _values("up")),
    "combined": (
        "Values of Combined",
        "What the down projection reads; exact zeros are counted apart.",
        _values("combined"),
    ),
}
_OF_ONE: dict[str, tuple[str, str, Callable[[Any, Facts], bool], str]] = {
    "sample": (
        "Token by token",
        "Share of the neurons in the active set, at each token of the sample text below.",
        _grid("sample", "active, %"),
        "token",
    ),
    "experts": (
        "Sparsity of each expert",
        "Exact zeros in Combined.",
        _grid("expert_sparsity", "zeros, %"),
        "expert",
    ),
    "load": (
        "Load of the experts",
        "Share of the layer's tokens that an expert gets.",
        _grid("expert_load", "tokens, %"),
        "expert",
    ),
}


def draw(models: Sequence[Facts]) -> list[Drawn]:
    """All figures that the models have data for; first those of all, then those of each.

    Raises:
        TurboSparseError: matplotlib is not installed, or there are more models than colours.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TurboSparseError("a report needs matplotlib: pip install it") from error
    if len(models) > len(COLOURS):
        raise TurboSparseError(f"a report shows at most {len(COLOURS)} models, not {len(models)}")
    drawn = []
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "turbosparse",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.facecolor": "none",
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        for name, (title, caption, paint) in _OF_ALL.items():
            figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
            axes = figure.subplots()
            if not paint(axes, models):
                continue
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.15)
            figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
            drawn.append(Drawn(name, title, caption, *_bytes(figure, name)))
        for number, model in enumerate(models):
            for key, (title, caption, grid, across) in _OF_ONE.items():
                figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
                axes = figure.subplots()
                if (key != "sample" and not model["experts"]) or not grid(axes, model):
                    continue
                axes.set(xlabel=across)
                name = f"{key}-{number + 1}"
                drawn.append(
                    Drawn(name, f"{title}: {model['name']}", caption, *_bytes(figure, name))
                )
    return drawn


def _percent(shares: Any) -> list[float]:
    return [100 * share for share in shares]


def _bytes(figure: Any, name: str) -> tuple[str, bytes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # not by savefig, which draws twice; what is laid out once stays
    svg, png = BytesIO(), BytesIO()
    figure.patch.set_visible(False)  # the page shows through
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(svg, metadata={"Date": None})
    figure.set_layout_engine("none")
    figure.patch.set_visible(True)
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.print_png(png)
    text = svg.getvalue().decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # several figures stand in one page
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" ',
        r"<svg \1",
        re.sub(r' height="[^"]*pt"', "", text, count=1),
        count=1,
    ), png.getvalue()
