"""Toy models of every family, small enough to build in a second, and a tokenizer for them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

# before huggingface_hub is imported: no test may reach for the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# what a machine was found to do is kept there: tests must not tell the user's programs
os.environ["XDG_CACHE_HOME"] = mkdtemp(prefix="turbosparse-tests-")

import torch

if not torch.cuda.is_available():  # before the kernels are imported
    os.environ["TRITON_INTERPRET"] = "1"

from turbosparse.convert import convert
from turbosparse.engine.engine import Engine
from turbosparse.engine.text import Tokenizer
from turbosparse.hf.load import quiet
from turbosparse.pack import pack


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


pytest.register_assert_rewrite("processes", "training_runs")
# triton is for Linux only
collect_ignore = [] if find_spec("triton") else ["test_gpu.py", "test_hybrid.py"]

FAMILIES = ("mistral", "llama", "qwen2", "mixtral")  # dense; convert makes them sparse
NATIVE = ("arcee", "nemotron")  # made sparse, without a gate
EVERY = (*FAMILIES, *NATIVE)
VOCABULARY = 320
CONTEXT = 160
WINDOW = 24  # shorter than the contexts that tests use

# what each family has that the others have not
_SPECIAL = {
    "mistral": {"sliding_window": WINDOW, "head_dim": 24},
    "llama": {
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    },
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "arcee": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    },
    "nemotron": {"head_dim": 24, "partial_rotary_factor": 0.5},
}


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of `VOCABULARY` tokens with BOS 0, EOS 1 and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([(Path(__file__).parents[1] / "LICENSE").read_text()], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    )
    fast.save_pretrained(folder)


def make_model(family: str, folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """A toy model of `family` with random weights, in Hugging Face form."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.15,  # so that logits differ enough for greedy tokens to be stable
        **_SPECIAL[family],
        **changes,
    }
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or (family == "nemotron" and "norm" in name):
                parameter.normal_(std=0.1)
    with quiet():
        model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """shared(name, make): the folder that make(folder) filled, once for all workers.

    Do not write into it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def dense(shared: Shared) -> Callable[[str], Path]:
    """dense(family): the folder of a toy model as it is published; do not write into it."""
    return lambda family: shared(f"dense-{family}", partial(make_model, family))


@pytest.fixture(scope="session")
def sparse(dense: Callable[[str], Path], shared: Shared) -> Callable[..., Path]:
    """sparse(family, activation="drelu"): a converted toy model; do not write into it.

    Of the native families it is the model itself.
    """

    def folder(family: str, activation: str = "drelu") -> Path:
        if family in NATIVE:
            return dense(family)
        make = partial(convert, str(dense(family)), activation=activation)
        return shared(f"sparse-{family}-{activation}", make)

    return folder


@pytest.fixture(scope="session")
def packed_mistral(sparse: Callable[..., Path], shared: Shared) -> Path:
    """A packed toy model; do not write into it."""
    return shared("packed-mistral", partial(pack, str(sparse("mistral")), quant="q8"))


@pytest.fixture(scope="module")
def engine(packed_mistral: Path) -> Engine:
    return Engine(packed_mistral, threads=1)


@pytest.fixture(scope="module")
def tokenizer(packed_mistral: Path) -> Tokenizer:
    return Tokenizer(packed_mistral)


def drelu_recipe(model: Path, corpus: Path, length: int, /, **fields: object) -> dict[str, Any]:
    """The recipe that all training tests start from: the model as a dReLU one, on the corpus."""
    return {
        "model": str(model),
        "activation": "drelu",
        "data": {
            "sources": [{"name": "boats", "path": str(corpus), "proportion": 1}],
            "sequence_length": length,
        },
        "learning_rate": 2e-3,
        "precision": "fp32",
        "log_every": 1,
        **fields,
    }


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The input_ids of every forward pass, in order."""
    return record_batches(monkeypatch)


def record_batches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    from turbosparse.training.trainer import SparseTrainer

    seen: list[torch.Tensor] = []
    step = SparseTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(inputs["input_ids"].clone())
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(SparseTrainer, "training_step", training_step)
    return seen


@pytest.fixture
def recipe(tmp_path: Path, dense: Callable[[str], Path], corpus: Path) -> Callable[..., Path]:
    """recipe(**changes): the path of a recipe that trains the dense Mistral as a dReLU model."""
    from training_runs import write_recipe

    return partial(write_recipe, tmp_path / "recipe.yaml", dense, corpus)


@pytest.fixture(scope="session")
def whole_of(shared: Shared, dense: Callable[[str], Path], corpus: Path) -> Callable[[str], Path]:
    """whole_of(family): a run of `recipe()` that nothing stopped: model/ and its batches."""
    from training_runs import write_recipe

    from turbosparse.train import train

    def make(family: str, folder: Path) -> None:
        folder.mkdir()
        model = str(dense(family))
        path = write_recipe(folder / "recipe.yaml", dense, corpus, model=model)
        with pytest.MonkeyPatch.context() as patch:
            seen = record_batches(patch)
            train(path, out=folder / "model")
        torch.save(seen, folder / "batches")

    return lambda family: shared(f"trained-{family}", partial(make, family))


@pytest.fixture
def whole(whole_of: Callable[[str], Path]) -> Path:
    return whole_of("mistral") / "model"


@pytest.fixture
def whole_batches(whole_of: Callable[[str], Path]) -> list[torch.Tensor]:
    return torch.load(whole_of("mistral") / "batches")


def merge_predictor(model: Path, copy: Path, **settings: object) -> Path:
    """A copy of a toy model with a random predictor of ranks 32 and 64 merged into it.

    `settings` are the block of config.json.
    """
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    tensors = load_file(copy / "model.safetensors")
    random = torch.Generator().manual_seed(7)
    for layer, rank in enumerate((32, 64)):
        ffns = [f"model.layers.{layer}.mlp"]
        if "num_local_experts" in config:
            moe = f"model.layers.{layer}.block_sparse_moe.experts"
            ffns = [f"{moe}.{expert}" for expert in range(config["num_local_experts"])]
        for ffn in ffns:
            fc1 = torch.randn(rank, config["hidden_size"], generator=random)
            fc2 = torch.randn(config["intermediate_size"], rank, generator=random)
            tensors[f"{ffn}.predictor.fc1.weight"] = fc1
            tensors[f"{ffn}.predictor.fc2.weight"] = fc2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    if settings:
        config["predictor"] = settings
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="session")
def merged(sparse: Callable[..., Path], shared: Shared) -> Path:
    """The Mistral toy model with a merged predictor; do not write into it."""
    settings = {"input": "pre_norm", "threshold": -1.5, "recall": 0.5}
    return shared("merged", partial(merge_predictor, sparse("mistral"), **settings))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small JSON-lines corpus of 40 documents."""
    import json

    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    text = "The {} small boats and the {} gulls went home. "
    rows = [{"text": text.format(n, n * 7 % 11) * (n % 5 + 1)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Toy matrices are slower on two threads, by far where the processors are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    chromium, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver_path):
        missing = "pages are not tested: install chromium and chromium-driver"
        if os.environ.get("TURBOSPARSE_REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage"]
    for flag in flags + ["--no-sandbox"] * (os.geteuid() == 0):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of the longest tests come first, or one worker would be left with the last of them."""
    long = ("deepspeed", "scale", "demo", "neon", "plan", "prepare")
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in long)
