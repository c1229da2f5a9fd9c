"""A checkpoint on disk: its safetensors shards, checked against the config without loading them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a model folder by name, each read from disk when it is asked for."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.shards = shard_files(folder)
        self._home: dict[str, Any] = {}
        for path in self.shards:
            try:
                shard = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise TurboSparseError(
                    f"{path} cannot be read as safetensors ({error}); download or export it again"
                ) from error
            self._home |= dict.fromkeys(shard.keys(), shard)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._home[name].get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __iter__(self) -> Any:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._home[name].get_slice(name).get_shape())

    def check(self, config: Any) -> None:
        """Raise unless every tensor that `config` calls for is here in its shape.

        Raises:
            TurboSparseError: names the first few tensors that are missing or have another shape.
        """
        self._check_shapes(families.tensor_shapes(config))

    def predictor_ranks(self, config: Any) -> list[list[int]] | None:
        """Ranks of the merged predictor, ``[layers][experts]``; None if there is none.

        Raises:
            TurboSparseError: it is not whole: every FFN has an fc1 ``[R, H]`` and fc2 ``[I, R]``.
        """
        name = families.table(config).name
        matrices = [(name("fc1", *slot), name("fc2", *slot)) for slot in families.ffns(config)]
        if not any(name in self for pair in matrices for name in pair):
            return None
        ranks = [self.shape(fc1)[0] if fc1 in self else 0 for fc1, _ in matrices]
        expected: dict[str, tuple[int, ...]] = {}
        for (fc1, fc2), rank in zip(matrices, ranks, strict=True):
            expected[fc1], expected[fc2] = (
                (rank, config.hidden_size),
                (config.intermediate_size, rank),
            )
        self._check_shapes(expected)
        width = max(1, families.experts(config))
        return [ranks[at : at + width] for at in range(0, len(ranks), width)]

    def _check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        missing = [name for name in expected if name not in self._home]
        wrong = [
            f"{name} is {list(self.shape(name))}, config.json asks for {list(shape)}"
            for name, shape in expected.items()
            if name in self._home and self.shape(name) != shape
        ]
        faults = [f"{name} is missing" for name in missing] + wrong
        if faults:
            more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
            raise TurboSparseError(
                f"{self.folder}: config.json and the tensors disagree: "
                f"{'; '.join(faults[:3])}{more}; use the config.json that belongs to these weights"
            )


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in the order of the index."""
    index = folder / INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            paths = [folder / shard for shard in shards]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TurboSparseError(f"{index} is not a safetensors index: {error!r}") from error
    else:
        paths = [folder / "model.safetensors"]
    for path in paths:
        if not path.is_file():
            hint = "download it again"
            if any(folder.glob("pytorch_model*.bin")):
                hint = "this folder holds pickled .bin weights; save it as safetensors first"
            raise TurboSparseError(f"{path} is missing; {hint}")
    return paths
