"""The packed folder: what any reader sees in it, and that no damage goes unnoticed or crashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.engine import Engine
from turbosparse.inspect import validate
from turbosparse.pack import pack
from turbosparse.packed import files as packed_files
from turbosparse.packed.files import PAGE
from turbosparse.packed.format import Packed
from turbosparse.packed.header import Fault, FormatError

Make = Callable[..., Path]
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def whole(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed toy model with a predictor; do not write into it."""
    folder = tmp_path_factory.mktemp("packed") / "whole"
    pack(str(merged), folder, quant="q8")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the packed toy model to damage."""
    return shutil.copytree(whole, tmp_path / "damaged")


# --- ways to damage a folder
# -----------------------------------------------------------------------------------


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_block(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_config(folder, lambda config: change(config["turbosparse"]))


def edit_predictor(folder: Path, **fields: Any) -> None:
    edit_block(folder, lambda block: block["ffn"]["predictor"].update(fields))


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def read_entries(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    entries = json.loads(data[8 : header_end(data)])
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


def replace_header(path: Path, text: bytes) -> None:
    """Put `text` in place of the header; the size of the file stays."""
    data = path.read_bytes()
    end = header_end(data)
    assert len(text) <= end - 8
    path.write_bytes(data[:8] + text.ljust(end - 8) + data[end:])


def edit_entries(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    entries = read_entries(folder / WEIGHTS)
    change(entries)
    replace_header(folder / WEIGHTS, json.dumps(entries, separators=(",", ":")).encode())


def edit_entry(folder: Path, name: str, **fields: Any) -> None:
    edit_entries(folder, lambda entries: entries[name].update(fields))


def write_at(folder: Path, offset: int, data: bytes) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        file.write(data)


def shift(folder: Path, name: str, by: int) -> None:
    first, last = read_entries(folder / WEIGHTS)[name]["data_offsets"]
    edit_entry(folder, name, data_offsets=[first + by, last + by])


def repeat_a_neuron(folder: Path) -> None:
    path = folder / WEIGHTS
    first, _ = read_entries(path)["model.layers.1.neuron_order"]["data_offsets"]
    write_at(folder, header_end(path.read_bytes()) + first, np.int32([7, 7]).tobytes())


def edit_profile(folder: Path, **fields: Any) -> None:
    """Give the block a sound profile, changed so."""
    profile = {
        "tokens": 10,
        "nats_per_token": 2.0,
        "active": [[0.1], [0.2]],
        "gate_positive": [[0.3], [0.4]],
        "expert_tokens": [[10], [10]],
    }
    edit_block(folder, lambda block: block.update(profile=profile | fields))


def rename(folder: Path, name: str, new: str) -> None:
    edit_entries(folder, lambda entries: entries.update({new: entries.pop(name)}))


def twice(folder: Path) -> None:
    """A key that stands in the header two times: JSON readers take the last."""
    entries = read_entries(folder / WEIGHTS)
    text = json.dumps(entries, separators=(",", ":"))
    again = json.dumps({NORM: entries[NORM]}, separators=(",", ":"))[1:-1]
    replace_header(folder / WEIGHTS, f"{text[:-1]},{again}}}".encode())


def off_the_page(folder: Path) -> None:
    """The norm trades places with a part of the pad behind it."""
    entries = read_entries(folder / WEIGHTS)
    first, last = entries[NORM]["data_offsets"]
    pad = next(n for n, e in entries.items() if e["data_offsets"][0] == last)
    end = entries[pad]["data_offsets"][1]

    def change(table: dict[str, Any]) -> None:
        table["pad.98"] = {"dtype": "U8", "shape": [64], "data_offsets": [first, first + 64]}
        table[NORM]["data_offsets"] = [first + 64, last + 64]
        table[pad] = {"dtype": "U8", "shape": [end - last - 64], "data_offsets": [last + 64, end]}

    edit_entries(folder, change)


def put_nan(folder: Path, name: str, kind: type, at: int = 0) -> None:
    """A NaN in a tensor, in a file whose checksum is right."""
    first, _ = read_entries(folder / WEIGHTS)[name]["data_offsets"]
    start = header_end((folder / WEIGHTS).read_bytes())
    write_at(folder, start + first + at, kind(np.nan).tobytes())
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    edit_block(folder, lambda block: block["files"][WEIGHTS].update(sha256=digest))


NORM = "model.norm.weight"  # F32 [64]
FC2 = "model.layers.1.predictor.fc2"  # U8 [96, 80], of rank 64
DAMAGES: dict[str, tuple[Callable[[Path], object], Fault]] = {
    "no block": (lambda f: edit_config(f, lambda c: c.pop("turbosparse")), Fault.NOT_PACKED),
    "block of convert": (
        lambda f: edit_block(f, lambda b: b.pop("format_version")),
        Fault.NOT_PACKED,
    ),
    "later version": (lambda f: edit_block(f, lambda b: b.update(format_version=4)), Fault.VERSION),
    "unknown quant": (lambda f: edit_block(f, lambda b: b.update(quant="q5")), Fault.HEADER),
    "unknown key": (lambda f: edit_block(f, lambda b: b.update(colour="red")), Fault.HEADER),
    "key missing": (lambda f: edit_block(f, lambda b: b.pop("ffn")), Fault.HEADER),
    "unknown predictor": (lambda f: edit_predictor(f, kind="oracle"), Fault.HEADER),
    "threshold no number": (lambda f: edit_predictor(f, threshold=float("nan")), Fault.HEADER),
    "low_rank without ranks": (lambda f: edit_predictor(f, ranks=None), Fault.HEADER),
    "sign with ranks": (lambda f: edit_predictor(f, kind="sign"), Fault.HEADER),
    "sign before the norm": (
        lambda f: edit_predictor(f, kind="sign", quant=None, ranks=None),
        Fault.HEADER,
    ),
    "ranks of fewer layers": (lambda f: edit_predictor(f, ranks=[[32]]), Fault.HEADER),
    "ranks of experts": (lambda f: edit_predictor(f, ranks=[[32, 32], [64, 64]]), Fault.HEADER),
    "rank off the block": (lambda f: edit_predictor(f, ranks=[[32], [63]]), Fault.HEADER),
    "rank 0": (lambda f: edit_predictor(f, ranks=[[32], [0]]), Fault.HEADER),
    "rank of another": (lambda f: edit_predictor(f, ranks=[[32], [96]]), Fault.TENSOR_SHAPE),
    "predictor of another quant": (lambda f: edit_predictor(f, quant="q4"), Fault.TENSOR_SHAPE),
    "predictor of swiglu": (
        lambda f: edit_block(f, lambda b: b["ffn"].update(activation="swiglu")),
        Fault.HEADER,
    ),
    "predictor of geglu": (
        lambda f: edit_block(f, lambda b: b["ffn"].update(activation="geglu")),
        Fault.HEADER,
    ),
    "predictor not in the block": (
        lambda f: edit_block(f, lambda b: b["ffn"].pop("predictor")),
        Fault.TENSOR_UNKNOWN,
    ),
    "signs for matrices": (
        lambda f: edit_predictor(f, kind="sign", quant=None, ranks=None, input="post_norm"),
        Fault.TENSOR_UNKNOWN,
    ),
    "half a predictor": (lambda f: rename(f, FC2, "extra"), Fault.TENSOR_UNKNOWN),
    "activation of another": (
        lambda f: edit_config(f, lambda c: c.update(ffn_activation="reglu")),
        Fault.ACTIVATION,
    ),
    "threshold of another": (
        lambda f: edit_config(f, lambda c: c.update(ffn_threshold=0.25)),
        Fault.ACTIVATION,
    ),
    "profile of another": (lambda f: edit_profile(f, active=[[0.5]]), Fault.PROFILE),
    "profile of more than all": (lambda f: edit_profile(f, active=[[1.5], [0.5]]), Fault.HEADER),
    "profile that is NaN": (lambda f: edit_profile(f, nats_per_token=float("nan")), Fault.HEADER),
    "a threshold below zero": (
        lambda f: edit_block(f, lambda b: b["ffn"].update(threshold=-1.0)),
        Fault.HEADER,
    ),
    "clusters of another size": (
        lambda f: edit_block(f, lambda b: b.update(cluster_neurons=7)),
        Fault.HEADER,
    ),
    "tensor twice": (twice, Fault.TENSOR_TWICE),
    "tensors that overlap": (lambda f: shift(f, FC2, -PAGE), Fault.FILE_LAYOUT),
    "a hole": (lambda f: edit_entries(f, lambda e: e.pop(NORM)), Fault.FILE_LAYOUT),
    "NaN in a norm": (lambda f: put_nan(f, NORM, np.float32), Fault.NOT_FINITE),
    "NaN in a scale": (lambda f: put_nan(f, FC2, np.float16, at=64), Fault.NOT_FINITE),
    "fc2 of another shape": (lambda f: edit_entry(f, FC2, shape=[192, 64]), Fault.TENSOR_SHAPE),
    "path as file name": (
        lambda f: edit_block(f, lambda b: b.update(files={f"../{WEIGHTS}": b["files"][WEIGHTS]})),
        Fault.HEADER,
    ),
    "file missing": (lambda f: (f / WEIGHTS).unlink(), Fault.FILE_MISSING),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 8 * PAGE), Fault.FILE_SIZE),
    "grown": (lambda f: os.truncate(f / WEIGHTS, 1 << 20), Fault.FILE_SIZE),
    "header too long": (lambda f: write_at(f, 0, b"\xff" * 8), Fault.FILE_HEADER),
    "header no JSON": (lambda f: write_at(f, 8, b"\xff\x00?"), Fault.FILE_HEADER),
    "header no object": (lambda f: replace_header(f / WEIGHTS, b"[1]"), Fault.FILE_HEADER),
    "span outside": (lambda f: shift(f, NORM, 1 << 40), Fault.FILE_LAYOUT),
    "span backwards": (lambda f: edit_entry(f, NORM, data_offsets=[9, 3]), Fault.FILE_HEADER),
    "tensor missing": (lambda f: rename(f, NORM, "pad.99"), Fault.TENSOR_MISSING),
    "tensor unknown": (
        lambda f: rename(f, NORM, "extra"),
        Fault.TENSOR_UNKNOWN,
    ),
    "wrong shape": (lambda f: edit_entry(f, NORM, shape=[32, 2]), Fault.TENSOR_SHAPE),
    "wrong type": (lambda f: edit_entry(f, NORM, dtype="I32"), Fault.TENSOR_SHAPE),
    "span too short": (
        lambda f: edit_entry(f, NORM, data_offsets=[0, 128]),
        Fault.FILE_LAYOUT,
    ),
    "config of a wider model": (
        lambda f: edit_config(f, lambda c: c.update(intermediate_size=128)),
        Fault.TENSOR_SHAPE,
    ),
    "config of a deeper model": (
        lambda f: (
            edit_config(f, lambda c: c.update(num_hidden_layers=3)),
            edit_predictor(f, ranks=[[32], [64], [64]]),
        ),
        Fault.TENSOR_MISSING,
    ),
    "off the page": (off_the_page, Fault.ALIGNMENT),
    "neuron twice": (repeat_a_neuron, Fault.NEURON_ORDER),
    "flipped byte": (lambda f: write_at(f, -3, b"\x01"), Fault.CHECKSUM),
}


def test_every_fault_has_a_damage() -> None:
    later = {Fault.FILE_CHANGED}  # of a folder that is open
    assert {fault for _, fault in DAMAGES.values()} | later == set(Fault)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_the_folder_and_what_to_do(folder: Path, damage: str) -> None:
    spoil, fault = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(FormatError) as error:
        validate(folder)
    assert error.value.fault is fault
    assert str(error.value).startswith(f"{folder} {fault.value}")
    assert "; copy the folder" in fault.value or "pack" in fault.value.partition(";")[2]


@pytest.mark.parametrize("quant", ["f16", "q4"])
def test_a_block_that_names_another_quant_is_refused(folder: Path, quant: str) -> None:
    edit_block(folder, lambda block: block["quant"].update(q=quant))
    with pytest.raises(FormatError, match="wrong type or shape"):
        Packed(folder)


def test_a_folder_from_before_predictors_opens(sparse: Make, folder: Path, tmp_path: Path) -> None:
    pack(str(sparse("mistral")), tmp_path / "old", quant="q8")
    edit_block(tmp_path / "old", lambda block: block["ffn"].pop("predictor"))
    assert Packed(tmp_path / "old").predictor("model.layers.0.") is None
    assert Packed(folder).predictor("model.layers.0.") is not None


def test_shapes_are_integers(folder: Path) -> None:
    """JSON knows 64.0, which equals 64 in Python."""
    edit_entry(folder, NORM, shape=[64.0])
    assert Packed(folder).tensors[NORM].shape == (64,)


# --- a folder that changes while it is open
# ---------------------------------------------------------------------------------------------


def copy_over(folder: Path) -> None:
    """As `cp` writes: into the same file, of the same size."""
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())


@pytest.mark.parametrize(
    "change",
    [lambda folder: os.truncate(folder / WEIGHTS, PAGE), copy_over],
    ids=["truncated", "written over"],
)
def test_a_file_that_changes_while_it_is_open_is_named(
    folder: Path, change: Callable[[Path], object]
) -> None:
    engine, packed = Engine(folder, threads=1), Packed(folder)
    sequence = engine.sequence([5, 9])
    change(folder)
    for use in (lambda: engine.step([sequence]), packed.verify):
        with pytest.raises(FormatError, match=WEIGHTS) as caught:
            use()
        assert caught.value.fault is Fault.FILE_CHANGED
    assert sequence.pending == [5, 9]


def test_a_file_that_is_replaced_stays_open(folder: Path) -> None:
    engine = Engine(folder, threads=1)
    before = engine.step([engine.sequence([5, 9])])[0].logits
    (folder / "new").write_bytes(b"the weights of another model")
    (folder / "new").replace(folder / WEIGHTS)
    assert np.array_equal(engine.step([engine.sequence([5, 9])])[0].logits, before)


# --- what a whole folder holds
# ---------------------------------------------------------------------------------


def assert_readers_agree(packed: Packed) -> None:
    seen = set()
    for name in packed.header.files:
        with safe_open(packed.folder / name, framework="np") as file:
            for tensor in file.keys():  # noqa: SIM118
                if not tensor.startswith("pad."):
                    seen.add(tensor)
                    ours, theirs = packed.tensors[tensor], file.get_tensor(tensor)
                    assert ours.dtype == theirs.dtype
                    assert np.array_equal(ours, theirs)
    assert seen == set(packed.plan)


def test_the_official_reader_sees_the_same_tensors(whole: Path) -> None:
    assert_readers_agree(Packed(whole))


def test_every_tensor_begins_on_a_page(whole: Path) -> None:
    data = (whole / WEIGHTS).read_bytes()
    assert header_end(data) % PAGE == 0
    assert len(data) % PAGE == 0
    for name, entry in read_entries(whole / WEIGHTS).items():
        assert name.startswith("pad.") or entry["data_offsets"][0] % PAGE == 0, name


def test_tensors_cannot_be_written(whole: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        Packed(whole).tensors[NORM][0] = 1


def test_a_model_in_several_files_opens_as_one(
    merged: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_files, "SHARD_BYTES", 80_000)
    pack(str(merged), tmp_path / "shards", quant="q8")
    packed, one = Packed(tmp_path / "shards"), Packed(whole)
    assert len(packed.header.files) > 1
    assert sorted(packed.header.files) == sorted(
        path.name for path in (tmp_path / "shards").glob("*.safetensors")
    )
    assert_readers_agree(packed)
    assert packed.tensors.keys() == one.tensors.keys()
    for name, tensor in one.tensors.items():
        assert np.array_equal(packed.tensors[name], tensor), name
    packed.verify()


# --- fuzzing: opening works or raises our error, and nothing else
# ----------------------------------------------

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["a" * 300, "..", "\0", "mixtral", "q4", 1, 0, -1]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)


def open_or_refuse(folder: Path) -> None:
    try:
        packed = Packed(folder)
    except TurboSparseError:
        return
    for name, spec in packed.plan.items():
        assert packed.tensors[name].shape == spec.shape
        packed.tensors[name].max()  # inside the mapped file


@pytest.fixture(scope="module")
def scratch(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which each example of a fuzz test writes its file anew."""
    return shutil.copytree(whole, tmp_path_factory.mktemp("fuzz") / "scratch")


def put(path: Path, data: bytes) -> None:
    """Replace a file that an earlier example may still have mapped."""
    path.unlink()
    path.write_bytes(data)


@fuzz
@given(data=st.data())
def test_fuzzed_bytes_of_the_weight_file(whole: Path, scratch: Path, data: st.DataObject) -> None:
    content = bytearray((whole / WEIGHTS).read_bytes())
    end = header_end(content)
    if data.draw(st.booleans(), label="random"):
        start = data.draw(st.sampled_from([0, 8]))
        noise = data.draw(st.binary(min_size=1, max_size=200))
        content[start : start + len(noise)] = noise
    else:
        used = len(bytes(content[:end]).rstrip())
        at = st.integers(0, used - 1)
        byte = st.integers(0, 255) | st.sampled_from(b'0123456789[]{},:".-eE')
        for position, value in data.draw(st.lists(st.tuples(at, byte), min_size=1, max_size=4)):
            content[position] = value
    put(scratch / WEIGHTS, content)
    put(scratch / "config.json", (whole / "config.json").read_bytes())
    open_or_refuse(scratch)


@fuzz
@given(data=st.data())
def test_fuzzed_entries_of_the_weight_file(whole: Path, scratch: Path, data: st.DataObject) -> None:
    original = (whole / WEIGHTS).read_bytes()
    end = header_end(original)
    entries = read_entries(whole / WEIGHTS)
    tensor = data.draw(st.sampled_from(sorted(entries)), label="tensor")
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "pair", ""]))
    if field == "pair":
        pair = st.lists(st.integers(-5000, 10**6) | st.floats(), min_size=2, max_size=2)
        entries[tensor]["data_offsets"] = data.draw(pair)
    elif field:
        entries[tensor][field] = data.draw(JSON)
    else:
        entries[tensor] = data.draw(JSON)
    text = json.dumps(entries, separators=(",", ":")).encode()[: end - 8]
    put(scratch / WEIGHTS, original[:8] + text.ljust(end - 8) + original[end:])
    put(scratch / "config.json", (whole / "config.json").read_bytes())
    open_or_refuse(scratch)


def paths_into(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The way to every value inside nested JSON objects."""
    own = [path] if path else []
    inner = value.items() if isinstance(value, dict) else ()
    return own + [found for key, child in inner for found in paths_into(child, (*path, key))]


def fuzz_config(whole: Path, scratch: Path, path: tuple[str, ...], value: Any) -> None:
    config = json.loads((whole / "config.json").read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    put(scratch / "config.json", json.dumps(config).encode())
    put(scratch / WEIGHTS, (whole / WEIGHTS).read_bytes())
    open_or_refuse(scratch)


@fuzz
@given(data=st.data())
def test_fuzzed_block_of_the_config(whole: Path, scratch: Path, data: st.DataObject) -> None:
    block = json.loads((whole / "config.json").read_text())["turbosparse"]
    names = [("files", f"model-{1:0{n}}-of-00002.safetensors") for n in (5, 300)]
    path = data.draw(st.sampled_from([("new",), *names, *paths_into(block)]))
    value = {"bytes": PAGE, "sha256": ""} if path in names else data.draw(JSON)
    fuzz_config(whole, scratch, ("turbosparse", *path), value)


ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "sliding_window",
    "rope_parameters",
    "dtype",
    "architectures",
)


@fuzz
@given(
    key=st.sampled_from(ARCHITECTURE),
    value=JSON | st.integers(-70, 400) | st.sampled_from([10**6, 10**9, 10**15, 10**30]),
)
@example(key="num_attention_heads", value=0)
@example(key="num_hidden_layers", value=10**9)
@example(key="hidden_size", value=None)
def test_fuzzed_architecture(whole: Path, scratch: Path, key: str, value: Any) -> None:
    fuzz_config(whole, scratch, (key,), value)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"{}"],
    ids=["empty", "list", "null", "binary", "deep", "long number", "no keys"],
)
def test_a_config_that_is_no_config_is_refused(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(TurboSparseError, match=str(folder)):
        Packed(folder)
