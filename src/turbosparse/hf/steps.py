"""A pass over the layers of a model that resumes where it was stopped.

Its state stands in a folder: a shard for each finished layer, and the hidden states behind the last
of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_file, read_config, write_json
from turbosparse.base.progress import note, track
from turbosparse.hf.layerwise import Layerwise

STATE, HIDDEN = "state.json", "hidden.safetensors"


class Steps:
    """What a pass has done so far; `about` is what it said of each finished layer.

    Args:
        work: folder of this pass.
        model: whose layers they are.
        ids: token ids of the text that goes through them, ``[N, T]``.
        request: what else the result depends on.
        what: messages call it.

    Raises:
        TurboSparseError: `work` holds a pass with another request.
    """

    def __init__(
        self, work: Path, model: Layerwise, ids: Tensor, request: dict[str, Any], what: str
    ):
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.about = work, list[Any]()
        self._model, self._ids = model, ids
        request = {
            "source": str(model.checkpoint.folder.resolve()),
            "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
            "dtype": str(model.dtype),
            **request,
        }
        if not (work / STATE).is_file():
            with new_file(work / STATE) as file:
                write_json(file, request)
        state = read_config(work, STATE)
        if changed := [key for key in request if request[key] != state.get(key)]:
            raise TurboSparseError(
                f"{work} holds a stopped {what} with other settings ({', '.join(changed)}); "
                "remove it to start again, or give the old settings to resume"
            )
        if (work / HIDDEN).is_file():
            with safe_open(work / HIDDEN, framework="pt") as file:
                self.about = json.loads(file.metadata()["about"])
            note(f"resuming after layer {len(self.about) - 1}")

    def hidden(self) -> Tensor:
        """The states behind the last finished layer, ``[N, T, H]``."""
        if not self.about:
            return self._model.embed(self._ids)
        with safe_open(self.work / HIDDEN, framework="pt") as file:
            hidden: Tensor = file.get_tensor("hidden").clone()
        return hidden

    def left(self, what: str) -> Iterator[int]:
        """The layers that are still to do, behind a progress bar."""
        done, layers = len(self.about), self._model.config.num_hidden_layers
        return track(range(done, layers), what, total=layers - done)

    def finish(self, tensors: dict[str, Tensor], hidden: Tensor, about: Any) -> None:
        """Keep what was made of the next layer, and the states behind it."""
        save(self.work / shard_name(len(self.about)), tensors)
        self.about.append(about)
        save(self.work / HIDDEN, {"hidden": hidden}, {"about": json.dumps(self.about)})


def shard_name(index: int) -> str:
    return f"layer-{index:05}.safetensors"


def save(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    with new_file(path) as work:
        save_file(tensors, work, metadata={"format": "pt", **(about or {})})
