"""See inside models, side by side: one page made of the statistics that `analyse` wrote.

turbosparse report sparse control --out report
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbosparse import __version__
from turbosparse.analysis.facts import facts
from turbosparse.analysis.figures import Drawn, draw
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, check_free, local_path, new_folder, write_json
from turbosparse.packed.stats import FILE, Stats
from turbosparse.score import read_scores

PAGE = Path(__file__).parent / "analysis" / "report.html.jinja"


@dataclass(frozen=True)
class Report:
    """Where the page stands, and what it shows."""

    page: str
    models: list[str]
    figures: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {', '.join(self.models)} in {len(self.figures)} figures"


def report(models: Sequence[AnyPath], *, out: AnyPath = "report") -> Report:
    """Make a page of what is known inside one model or several, side by side.

    It reads the statistics that `analyse` wrote, and runs nothing. The folder holds report.html,
    which needs no other file, report.json with all data, and each figure as SVG and PNG.

    Parameters
    ----------
    models
        Model folders that hold stats.turbosparse, or such files themselves.
    out
        Folder for the page, which must not exist.
    """
    if not models:
        raise TurboSparseError("give a model folder that `turbosparse analyse` measured")
    folder = local_path(out)
    check_free(folder)
    files = [_file(local_path(model)) for model in models]
    names = _names(files)
    known = [_known(file, name) for file, name in zip(files, names, strict=True)]
    figures = draw(known)
    with new_folder(folder) as work:
        (work / "figures").mkdir()
        for figure in figures:
            (work / "figures" / f"{figure.name}.svg").write_text(_alone(figure), encoding="utf-8")
            (work / "figures" / f"{figure.name}.png").write_bytes(figure.png)
        write_json(work / "report.json", known)
        (work / "report.html").write_text(_page(known, figures), encoding="utf-8")
    return Report(str(folder / "report.html"), names, [figure.name for figure in figures])


def _file(path: Path) -> Path:
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise TurboSparseError(f"there is no {file}; run `turbosparse analyse {path}` first")
    return file


def _known(file: Path, name: str) -> dict[str, Any]:
    scores = read_scores(file.parent)
    return facts(Stats.load(file), name) | {"predictor": scores and asdict(scores)}


def _names(files: list[Path]) -> list[str]:
    """Short names, each once."""
    short = [f.resolve().parent.name if f.name == FILE else f.stem for f in files]
    return [
        n if short.count(n) == 1 else f"{n} {short[:i].count(n) + 1}" for i, n in enumerate(short)
    ]


def _alone(figure: Drawn) -> str:
    """The SVG as a file of its own, black on white."""
    return figure.svg.replace("<svg ", '<svg style="color: #10203a; background: #fff" ', 1)


def _page(models: list[dict[str, Any]], figures: list[Drawn]) -> str:
    import jinja2
    from markupsafe import Markup

    words = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    words.filters |= {"percent": "{:.1%}".format, "commas": "{:,}".format}
    data = json.dumps(models).replace("<", "\\u003c")
    return words.from_string(PAGE.read_text(encoding="utf-8")).render(
        models=models,
        figures=[figure._replace(svg=Markup(figure.svg)) for figure in figures],
        data=Markup(data),
        version=__version__,
    )
