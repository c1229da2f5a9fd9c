"""ChatML: conversations as ``<|im_start|>role`` newline, content, ``<|im_end|>`` newline.

Rows become token ids whose labels are the answers only; tokenizer and model get what they need to
speak the form: two tokens, the chat template, and the end of a turn as EOS.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

START, END = "<|im_start|>", "<|im_end|>"
IGNORED = -100  # the label of a token that the loss leaves out
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# ShareGPT and its relatives
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}

Messages = list[dict[str, str]]


def messages_of(row: Mapping[str, Any]) -> Messages:
    """The messages of a row that holds `messages` (role, content) or `conversations` (from, value).

    Raises:
        ValueError: the row holds neither, or nothing that an assistant says.
    """
    turns: Any = row.get("messages") or row.get("conversations")
    try:
        said = [(t.get("role") or t["from"], t.get("content", t.get("value"))) for t in turns]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"holds no conversation; the row has {', '.join(row)}") from error
    if not all(isinstance(part, str) for turn in said for part in turn):
        raise ValueError("holds a turn whose role or content is not text")
    found = [{"role": _ROLES.get(role, role), "content": text} for role, text in said]
    if not any(turn["role"] == "assistant" for turn in found):
        raise ValueError("holds no turn of the assistant")
    return found


def render(messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where in it the answers stand with their ``<|im_end|>``."""
    text, answers = "", []
    for message in messages:
        text += f"{START}{message['role']}\n"
        begin = len(text)
        text += message["content"] + END
        if message["role"] == "assistant":
            answers.append((begin, len(text)))
        text += "\n"
    return text, answers


def tokenise(messages: Messages, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids as ``apply_chat_template`` gives them, and labels.

    A token that reaches over the start of an answer belongs to what is given, not to the answer.
    """
    text, answers = render(messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    begins = [begin for begin, _ in answers]
    labels = []
    for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True):
        turn = bisect_right(begins, first) - 1
        labels.append(token if turn >= 0 and last <= answers[turn][1] else IGNORED)
    return ids, labels


def teach_tokenizer(tokenizer: Any) -> None:
    """Give a tokenizer the two tokens, the chat template and ``<|im_end|>`` as its EOS."""
    from tokenizers import AddedToken

    new = [token for token in (START, END) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True
    )
    tokenizer.eos_token = END
    tokenizer.chat_template = TEMPLATE


def tokens(tokenizer: Any) -> list[int]:
    """The ids of ``<|im_start|>`` and ``<|im_end|>``."""
    ids: list[int] = tokenizer.convert_tokens_to_ids([START, END])
    return ids


def teach_model(model: Any, tokenizer: Any) -> None:
    """Give a model rows for the new tokens, and the EOS."""
    grow(model, tokenizer)
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id


def grow(model: Any, tokenizer: Any) -> None:
    """Give a model rows for tokens that were added to its tokenizer, each the mean of the others.

    A tokenizer whose own vocabulary is larger belongs to another model, which is left as it is.
    """
    import torch

    old, new = model.config.vocab_size, set(tokenizer.get_added_vocab().values())
    if len(tokenizer) > old and new.issuperset(range(old, len(tokenizer))):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[old:] = table.weight[:old].mean(0)
