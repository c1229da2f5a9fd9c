"""A checkpoint on disk: its safetensors shards, checked against the config without loading them.

Every verb reads weights by the same rule: each tensor that the config calls for is there in its
shape, and each tensor that is there is read, or known to be harmless, or an error that names it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config, refuse_pointer, write_json
from turbosparse.hf import families
from turbosparse.hf.published import own_fields

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
PREDICTOR = "predictor.safetensors"
_KEPT = ("kind", "input", "threshold")  # of a predictor's block
INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
# buffers that older versions of transformers saved, computed again by every reader
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", re.ASCII)
_ROWS = 4096  # of two tables to compare at a time
# what a folder without safetensors weights may hold, and what its user should do
_OTHERS = {
    "model-*-of-*.safetensors": f"it has shards but not their {INDEX}; copy that file too",
    "adapter_model.*": "it is a LoRA adapter; merge it into its base model first",
    "pytorch_model*.bin": "it holds pickled .bin weights; save it as safetensors first",
    "consolidated*": "it has weights in Mistral's own form; get those in Hugging Face form",
    "*.gguf": "it holds GGUF weights; get the model in Hugging Face form",
    "*.safetensors": f"its weights have other names; save the model so that they are {SINGLE}",
}


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a model folder by name, each read from disk when it is asked for."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.shards = shard_files(folder)
        self._home: dict[str, tuple[str, Any]] = {}
        self._merged: dict[str, torch.Tensor] = {}
        for path in self.shards:
            refuse_pointer(path)
            try:
                shard = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise TurboSparseError(
                    f"{path} cannot be read as safetensors ({error}); download or export it again"
                ) from error
            for name in shard.keys():  # noqa: SIM118 (it is not a mapping)
                if name in self._home:
                    raise TurboSparseError(
                        f"{folder}: {name} stands in {self._home[name][0]} and in {path.name}; "
                        "download or export the model again"
                    )
                self._home[name] = path.name, shard

    def merge(self, source: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add tensors that are published apart, by names that the folder must not have.

        Raises:
            TurboSparseError: it has one of them.
        """
        if twice := [name for name in tensors if name in self]:
            raise TurboSparseError(
                f"{self.folder} holds {twice[0]} itself; leave out the one of {source}"
            )
        self._merged |= tensors
        self._home |= dict.fromkeys(tensors, (source, None))

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        if name in self._merged:
            return self._merged[name]
        # opened for each: what was read through a mapping counts as memory until it is closed
        with safe_open(self.folder / self._home[name][0], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._merged:
            return tuple(self._merged[name].shape)
        return tuple(self._home[name][1].get_slice(name).get_shape())

    def check(self, config: Any) -> None:
        """Raise unless these are the weights of `config`, all of them and no others.

        Raises:
            TurboSparseError: names the first few tensors that are missing, of another shape, of a
                type that is not a floating point number, or that nobody would read.
        """
        expected = families.tensor_shapes(config)
        self._check_shapes(expected)
        for name, (file, shard) in self._home.items():
            dtype = shard.get_slice(name).get_dtype()
            if dtype not in _FLOATS:
                raise TurboSparseError(
                    f"{self.folder / file}: {name} is of type {dtype}, as in a quantised model; "
                    f"use the weights in {', '.join(_FLOATS)}"
                )
        if left := [
            name for name in self if name not in expected and not self._known(name, config)
        ]:
            raise TurboSparseError(
                f"{self.folder}: config.json does not call for {_few(left)}; without them the "
                "model would be another one: use the config.json that belongs to these weights"
            )

    def _known(self, name: str, config: Any) -> bool:
        """Whether a tensor that the config does not call for may be there."""
        found = families.table(config).find(name)
        if found is None:
            return bool(_HARMLESS.fullmatch(name))
        if found[0].role != "head":
            return found[0].when == "predictor"
        if not self._equal(name, families.table(config).name("embedding")):
            raise TurboSparseError(
                f"{self.folder}: config.json says tie_word_embeddings, but {name} differs from the "
                f"embedding; set tie_word_embeddings to false, or remove {name}"
            )
        return True

    def _equal(self, one: str, other: str) -> bool:
        if self.shape(one) != self.shape(other):
            return False
        first, second = (self._home[name][1].get_slice(name) for name in (one, other))
        starts = range(0, self.shape(one)[0], _ROWS)
        return all(bool((first[at : at + _ROWS] == second[at : at + _ROWS]).all()) for at in starts)

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
        missing = [f"{name} is missing" for name in expected if name not in self]
        wrong = [
            f"{name} is {list(self.shape(name))}, config.json asks for {list(shape)}"
            for name, shape in expected.items()
            if name in self and self.shape(name) != shape
        ]
        if missing or wrong:
            raise TurboSparseError(
                f"{self.folder}: config.json and the tensors disagree: "
                f"{_few(missing + wrong)}; use the config.json that belongs to these weights"
            )


def _few(items: list[str]) -> str:
    more = f" (and {len(items) - 3} more)" if len(items) > 3 else ""
    return "; ".join(items[:3]) + more


def add_shard(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors into a file beside the others of a model folder, and into its index."""
    from safetensors.torch import save_file

    homes = {tensor: file for tensor, (file, _) in Checkpoint(folder)._home.items()}
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / name, metadata={"format": "pt"})
    _write_index(folder, homes | dict.fromkeys(tensors, name))


def _write_index(folder: Path, homes: dict[str, str]) -> None:
    total = sum((folder / file).stat().st_size for file in set(homes.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": homes})


def copy_weights(checkpoint: Checkpoint, out: Path) -> None:
    """Put the weight files of a model into another folder, without a predictor."""
    from safetensors.torch import save_file

    homes: dict[str, str] = {}
    for shard in checkpoint.shards:
        names = [name for name, (home, _) in checkpoint._home.items() if home == shard.name]
        kept = [name for name in names if ".predictor." not in name]
        if kept == names:
            shutil.copyfile(shard, out / shard.name)
        elif kept:
            tensors = {name: checkpoint[name] for name in kept}
            save_file(tensors, out / shard.name, metadata={"format": "pt"})
        homes |= dict.fromkeys(kept, shard.name)
    if (checkpoint.folder / INDEX).is_file():
        _write_index(out, homes)


def carry_predictor(
    source: Path, out: Path, tensors: dict[str, torch.Tensor] | None = None
) -> None:
    """Give the folder of a model that was trained on the predictor of its source.

    What was measured of it is left behind: the weights are others now. `tensors` stand in for those
    of the source.
    """
    checkpoint = Checkpoint(source)
    own = {name: checkpoint[name] for name in checkpoint if ".predictor." in name}
    if tensors := tensors or own:
        add_shard(out, PREDICTOR, tensors)
    raw = read_config(out)
    block = raw.pop("predictor", None) or own_fields(source).get("predictor")
    if block:
        raw["predictor"] = {key: block[key] for key in _KEPT if key in block}
        write_json(out / "config.json", raw)


def shard_names(folder: Path) -> list[str]:
    """Names of the weight files of a model folder: those of the index, or the one file.

    Raises:
        TurboSparseError: the index is damaged, or names files outside the folder.
    """
    if not (folder / INDEX).is_file():
        return [SINGLE]
    homes = read_config(folder, INDEX).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise TurboSparseError(f"{folder / INDEX} is not a safetensors index: it has no weight_map")
    for name in homes.values():
        # a separator of any system would lead out of the folder
        if not (isinstance(name, str) and re.fullmatch(r"[^/\\:\0]+\.safetensors", name)):
            raise TurboSparseError(
                f"{folder / INDEX} names {name!r:.80}, which is not a safetensors file beside it; "
                "download it again"
            )
    return sorted(set(homes.values()))


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, all there.

    Raises:
        TurboSparseError: a file is missing, or it is not clear which files are the model.
    """
    names = shard_names(folder)
    if (folder / "adapter_config.json").exists() and (folder / names[0]).exists():
        raise TurboSparseError(
            f"{folder} holds weights and an adapter to them (adapter_config.json); merge the two, "
            "or remove the adapter"
        )
    if SINGLE not in names and (folder / SINGLE).exists():
        raise TurboSparseError(
            f"{folder} holds both {SINGLE} and {INDEX}, which names other files; "
            "remove the one that is not the model"
        )
    for name in names:
        if not (folder / name).is_file():
            raise TurboSparseError(_missing(folder, name))
    return [folder / name for name in names]


def _missing(folder: Path, name: str) -> str:
    if name == SINGLE:
        for pattern, hint in _OTHERS.items():
            if any(folder.glob(pattern)):
                return f"{folder} has no {SINGLE}: {hint}"
    return f"{folder / name} is missing; download it again"
