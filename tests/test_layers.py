"""The import direction between the packages: an arrow that runs back fails."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import turbosparse

SOURCE = Path(turbosparse.__file__).parent
# what each package may import besides itself; the verbs, which stand at the top, may import all
ALLOWED = {
    "base": set(),
    "hf": {"base"},
    "ops": {"base", "hf"},
    "packed": {"base", "hf", "ops"},
    "predictors": {"base", "hf", "ops", "training"},
    "engine": {"base", "hf", "ops", "packed"},
    "serving": {"base", "hf", "packed", "engine"},
    "training": {"base", "hf"},
    "analysis": {"base", "hf", "ops", "packed"},
    "sharing": {"base", "hf", "ops", "packed", "training"},
    "benchmark": {"base", "hf", "ops", "packed", "engine"},
    "evaluation": {"base", "hf", "ops", "packed", "engine"},
}
FREE = {"_core", "__version__"}


def back_arrows(source: Path) -> list[str]:
    """Imports that the table does not allow, wherever in a file they stand."""
    found = []
    for file in sorted(source.rglob("*.py")):
        package = file.relative_to(source).parts[0]
        allowed = ALLOWED.get(package)
        if allowed is None:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] == "turbosparse" and len(parts) > 1:
                    target = parts[1]
                    if target not in allowed | {package} | FREE:
                        found.append(f"{file.relative_to(source)}:{node.lineno} imports {name}")
    return found


def test_imports_run_in_one_direction() -> None:
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} >= set(ALLOWED)
    assert back_arrows(SOURCE) == []


@pytest.mark.parametrize(
    "line",
    [
        "from turbosparse.engine import model",
        "from turbosparse.pack import pack",
        "import turbosparse.engine.model",
        "def f():\n    from turbosparse import train",
    ],
)
def test_a_planted_back_arrow_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "planted.py").write_text(line)
    assert len(back_arrows(tmp_path)) == 1
