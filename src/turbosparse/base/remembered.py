"""What was measured of this machine, kept in JSON files for the next runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from turbosparse.base.folders import new_file


def recall(file: Path) -> dict[str, Any]:
    """All that a file keeps; one that is not ours or damaged keeps nothing."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def remember(file: Path, key: str, value: Any) -> None:
    """Add it to the file, or begin a new one; without a place for it the next run tries again."""
    try:
        with new_file(file) as work:
            work.write_text(json.dumps(recall(file) | {key: value}, indent=2), encoding="utf-8")
    except OSError:
        pass
