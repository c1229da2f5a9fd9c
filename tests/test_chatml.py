"""Conversations: their text, their tokens, what of them is learnt, and a model that speaks them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config
from turbosparse.generate import generate
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.pack import pack
from turbosparse.train import train
from turbosparse.training import chatml
from turbosparse.training.mixture import Source, packed_sequences

Dense = Callable[[str], Path]
IGNORED = chatml.IGNORED
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": " How many\n boats? "},
    {"role": "assistant", "content": "Two boats."},
    {"role": "user", "content": "And gulls?"},
    {"role": "assistant", "content": " Nine\n"},
]


@pytest.fixture
def tokenizer(dense: Dense) -> Any:
    loaded = load_tokenizer(dense("mistral"))
    chatml.teach_tokenizer(loaded)
    return loaded


def test_a_conversation_becomes_the_text_of_the_paper() -> None:
    text, _ = chatml.render(CHAT[1:3])
    assert text == (
        "<|im_start|>user\n How many\n boats? <|im_end|>\n"
        "<|im_start|>assistant\nTwo boats.<|im_end|>\n"
    )


def test_ids_are_those_of_the_template_and_labels_the_answers_token_by_token(
    tokenizer: Any,
) -> None:
    ids, labels = chatml.tokenise(CHAT, tokenizer)
    assert ids == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == chatml.render(CHAT)[0]

    # the same by hand: every piece tokenised for itself
    start, end = tokenizer.convert_tokens_to_ids([chatml.START, chatml.END])
    expected: list[tuple[int, int]] = []

    def put(text: str, *, learnt: bool) -> None:
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            expected.append((token, token if learnt else IGNORED))

    for message in CHAT:
        answer = message["role"] == "assistant"
        expected.append((start, IGNORED))
        put(message["role"] + "\n", learnt=False)
        put(message["content"], learnt=answer)
        expected.append((end, end if answer else IGNORED))
        put("\n", learnt=False)
    # " How" and " Nine" after a line break are one token with the break in no tokenizer like this
    assert list(zip(ids, labels, strict=True)) == expected
    assert labels.count(end) == 2


def test_the_prompt_of_an_answer_is_what_training_saw_before_it(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    ids, labels = chatml.tokenise(CHAT[:3], tokenizer)
    assert ids[: len(prompt)] == prompt
    assert [label != IGNORED for label in labels].index(True) == len(prompt)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT[1:3]},
        {
            "conversations": [
                {"from": "human", "value": CHAT[1]["content"]},
                {"from": "gpt", "value": CHAT[2]["content"]},
            ]
        },
        {"q": CHAT[1]["content"], "a": CHAT[2]["content"]},
    ],
    ids=["messages", "ShareGPT", "templates"],
)
def test_the_forms_of_a_row_give_the_same_conversation(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    fields = {"prompt": "{q}", "answer": "{a}"} if "q" in row else {}
    source = Source(name="c", path="c.jsonl", proportion=1, format="chat", **fields)
    assert list(source.documents(tmp_path)) == [CHAT[1:3]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"c\.jsonl:1 holds no conversation; the row has text"),
        ({"messages": [{"role": "user"}]}, "c.jsonl:1 holds a turn whose role or content"),
        ({"messages": ["hello"]}, "c.jsonl:1 holds no conversation"),
        ({"messages": CHAT[:2]}, "c.jsonl:1 holds no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content is not text"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "c.jsonl:1 holds a turn whose role"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    source = Source(name="c", path="c.jsonl", proportion=1, format="chat")
    with pytest.raises(TurboSparseError, match=message):
        list(source.documents(tmp_path))


def test_labels_travel_with_the_packed_tokens_and_long_conversations_are_cut(
    tokenizer: Any,
) -> None:
    chats = [CHAT, CHAT[1:3]] * 9
    rows = list(packed_sequences(chats, tokenizer, 16, append_eos=True))
    pairs = [chatml.tokenise(chat, tokenizer) for chat in chats]
    ids = [token for pair in pairs for token in pair[0]]
    labels = [label for pair in pairs for label in pair[1]]
    expected = [
        {"input_ids": ids[n : n + 16], "labels": labels[n : n + 16]}
        for n in range(0, len(ids) - 15, 16)
        if set(labels[n : n + 16]) != {IGNORED}
    ]
    assert rows == expected
    assert len(rows) < len(ids) // 16, "sequences without an answer teach nothing"


def test_new_rows_are_the_mean_of_the_others(dense: Dense, tokenizer: Any) -> None:
    for family in ("mistral", "llama"):  # llama's are tied
        model, before = load_model(dense(family)), load_model(dense(family))
        chatml.teach_model(model, tokenizer)
        for get in ("get_input_embeddings", "get_output_embeddings"):
            new, old = getattr(model, get)().weight, getattr(before, get)().weight
            assert new.shape == (len(tokenizer), old.shape[1])
            assert torch.equal(new[: len(old)], old)
            torch.testing.assert_close(new[len(old) :], old.mean(0).expand(2, -1))
        chatml.teach_model(model, tokenizer)  # again changes nothing
        assert model.config.vocab_size == len(tokenizer)


@pytest.fixture
def recipe(tmp_path: Path, dense: Dense) -> Path:
    """Fine-tuning of the dense Mistral as a dReLU model on one question and answer."""
    rows = [{"messages": CHAT[1:3]}] * 40
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "chat", "path": "chat.jsonl", "format": "chat", "proportion": 1}
    fields = {
        "model": str(dense("mistral")),
        "activation": "drelu",
        "data": {"sources": [source], "sequence_length": 48},
        "tokens": 30 * 4 * 48,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "log_every": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_fine_tuning_learns_the_answers_and_every_verb_goes_on_with_them(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    trained = train(recipe, out=out)
    assert trained.last_loss < trained.first_loss / 4

    tokenizer, config = load_tokenizer(out), read_config(out)
    end = tokenizer.convert_tokens_to_ids(chatml.END)
    assert tokenizer.eos_token == chatml.END
    assert (
        config["eos_token_id"] == read_config(out, "generation_config.json")["eos_token_id"] == end
    )
    assert config["vocab_size"] == len(tokenizer)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == chatml.render(CHAT)[0]

    pack(str(out), tmp_path / "packed", quant="q8")
    done = generate(
        tmp_path / "packed", prompt=CHAT[1]["content"], chat=True, max_tokens=30, threads=1
    )
    assert (done.text, done.finish) == ("Two boats.", "stop")


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_adapters_leave_the_new_tokens_to_be_learnt(
    recipe: Path, dense: Dense, tmp_path: Path, family: str
) -> None:
    """The llama's head is its embedding. Untrained the two new rows would stay the same."""
    pytest.importorskip("peft")
    fields = yaml.safe_load(recipe.read_text()) | {"model": str(dense(family)), "lora": {"rank": 4}}
    recipe.write_text(yaml.safe_dump(fields))
    trained = train(recipe, out=tmp_path / "out")
    assert trained.last_loss < trained.first_loss / 2
    before = load_file(dense(family) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    ids = chatml.tokens(load_tokenizer(tmp_path / "out"))
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & after.keys():
        table, old = after[name], before[name]
        assert sorted(ids) == [len(old), len(old) + 1]
        assert torch.equal(table[: len(old)], old), name
        assert (table[ids[0]] - table[ids[1]]).norm() > 0.05 * table[ids[0]].norm(), name


def test_a_tokenizer_of_another_model_is_still_refused(
    recipe: Path, dense: Dense, tmp_path: Path
) -> None:
    fields = yaml.safe_load(recipe.read_text())
    small = {"model_type": "mistral", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {
        "model": {**small, "max_position_embeddings": 64},
        "tokenizer": str(dense("mistral")),
    }
    recipe.write_text(yaml.safe_dump(fields))
    with pytest.raises(TurboSparseError, match="the tokenizer has 322 tokens, the model only 300"):
        train(recipe, out=tmp_path / "out")
