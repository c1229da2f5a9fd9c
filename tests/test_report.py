"""The page of a report: what it says, and how it stands in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from turbosparse.analyse import analyse
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import write_json
from turbosparse.packed.stats import Stats
from turbosparse.report import report
from turbosparse.score import SCORES

Make = Callable[..., Path]
POINT = {"target": 0.9, "recall": 0.9, "norm_recall": 0.9, "density": 0.2, "kl": 0.01}
SCORED = {"model": "m", "predictor": "sign", "tokens": 9, "perplexity": 2.0, "active": 0.1}
SCORED |= {"share": 0.11, "chosen": 0, "layers": [[0.9, 0.9, 0.2, 0.1]]}
BAD = "<b>&\"'</script><script>alert(1)</script>"


@pytest.fixture(scope="session")
def measured(sparse: Make, corpus: Path, shared: Callable[..., Path]) -> Callable[[str], Path]:
    """measured(family): a folder with the statistics and curves of a toy model."""

    def folder(family: str, activation: str) -> Path:
        make = partial(analyse, str(sparse(family, activation)), data=[corpus], last=3, curves=90)
        return shared(f"inside-{family}-{activation}", lambda out: make(out=out))

    return folder


@pytest.fixture(scope="session")
def made(measured: Make, shared: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """A report of a dense model, a sparse one and a mixture, whose texts are markup."""
    files = []
    for name, family, activation in (
        ("dense", "llama", "swiglu"),
        ("$sparse_1 <i>", "llama", "drelu"),
        ("mixture", "mixtral", "drelu"),
    ):
        stats = Stats.load(measured(family, activation) / "stats.turbosparse")
        (corpus,) = stats.predicted
        for counts in (stats.nats, stats.predicted, stats.corpora):
            counts[BAD] = counts.pop(corpus)
        stats.words[1], stats.about["model"] = BAD, BAD
        files.append(tmp_path_factory.mktemp("files") / f"{name}.turbosparse")
        stats.save(files[-1])
    points = [POINT | {"bytes": 0.5 + 0.1 * at, "perplexity": 1.01 - 0.003 * at} for at in range(4)]
    write_json(files[1].with_name(SCORES), SCORED | {"points": points})
    return shared("report", lambda out: report(files, out=out))


def test_a_report_says_what_the_statistics_say(made: Path, measured: Make) -> None:
    page, data = (made / "report.html").read_text(), json.loads((made / "report.json").read_text())
    stats = Stats.load(measured("llama", "drelu") / "stats.turbosparse")
    assert [model["name"] for model in data] == ["dense", "$sparse_1 <i>", "mixture"]
    sparse = data[1]
    assert sparse["sparsity"] == stats.activation_sparsity()
    assert f"<dd>{stats.activation_sparsity():.1%}</dd>" in page
    assert f"<dd>{stats.perplexity():.2f}</dd>" in page
    assert sparse["hot_curve"][0] == 0
    assert sparse["hot_curve"][-1] == pytest.approx(1)
    assert sum(sparse["values"]["combined"]) == pytest.approx(1)
    assert data[2]["expert_sparsity"] != data[1]["expert_sparsity"]
    (inside,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', page)
    assert json.loads(inside) == data


def test_what_comes_from_files_is_text(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert BAD not in page
    assert "<i>" not in page
    assert page.count("<script") == 1
    assert not re.search(r"(?:src|href)=\"(?!#|data:image)", page), (
        "nothing is loaded from elsewhere"
    )
    assert "$sparse_1 &lt;i&gt;" in page


def test_figures_are_files_too_and_have_names_of_their_own(made: Path) -> None:
    svgs = sorted((made / "figures").glob("*.svg"))
    names = {path.stem for path in svgs}
    assert {
        "layers",
        "kept",
        "predictor",
        "hot",
        "together",
        "signs",
        "gate",
        "up",
        "combined",
    } <= names
    assert {"sample-1", "sample-3", "experts-3", "load-3"} <= names
    assert "experts-1" not in names
    assert {path.stem for path in (made / "figures").glob("*.png")} == names
    for path in svgs:
        root = ElementTree.parse(path).getroot()
        assert root.get("viewBox")
        assert not root.get("width")
    page = (made / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_a_report_fits_a_phone_and_a_desktop(made: Path, browser: Any, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((made / "report.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script(
        "return [...document.querySelectorAll('.card')]"
        ".every((card) => card.scrollWidth <= card.clientWidth)"
    )
    letters = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')]"
        ".map((text) => text.getBoundingClientRect().height)"
    )
    assert len(letters) > 100
    assert min(letters) > 7
    outside = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].filter((text) => {"
        "  const inner = text.getBoundingClientRect();"
        "  const outer = text.closest('figure').getBoundingClientRect();"
        "  return inner.left < outer.left || inner.right > outer.right;"
        "}).map((text) => text.textContent)"
    )
    assert outside == []
    assert browser.get_log("browser") == []


def test_what_cannot_be_shown_is_refused(sparse: Make, tmp_path: Path, measured: Make) -> None:
    with pytest.raises(TurboSparseError, match=r"run `turbosparse analyse .*llama.*` first"):
        report([sparse("llama")], out=tmp_path / "new")
    with pytest.raises(TurboSparseError, match="give a model folder"):
        report([], out=tmp_path / "new")
    with pytest.raises(TurboSparseError, match="at most 6 models, not 7"):
        report([measured("llama", "drelu")] * 7, out=tmp_path / "new")
    file = shutil.copy(measured("llama", "drelu") / "stats.turbosparse", tmp_path)
    (tmp_path / SCORES).write_text("{}")
    with pytest.raises(TurboSparseError, match=r"scores.json is not what .* writes; run it again"):
        report([file], out=tmp_path / "new")
    with pytest.raises(TurboSparseError, match="exists already"):
        report([measured("llama", "drelu")], out=sparse("llama"))
    assert not (tmp_path / "new").exists()


def test_models_of_one_name_are_told_apart(measured: Make, tmp_path: Path) -> None:
    folder = measured("llama", "drelu")
    made = report([folder, folder], out=tmp_path / "new")
    assert made.models == [f"{folder.name} 1", f"{folder.name} 2"]


def test_statistics_of_nothing_make_a_page(sparse: Make, tmp_path: Path) -> None:
    from turbosparse.hf.load import load_config

    stats = Stats.empty(load_config(sparse("mixtral")))
    stats.save(tmp_path / "stats.turbosparse")
    report([tmp_path], out=tmp_path / "new")
    assert "never active" in (tmp_path / "new/report.html").read_text()
