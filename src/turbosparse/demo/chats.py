"""Conversations that a chat model writes itself: training text for its sparse twin, offline."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from turbosparse.base.progress import track
from turbosparse.engine.api import Model
from turbosparse.training import chatml

_ASKS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "Give three tips about {}.",
    "What should everybody know about {}?",
    "Write a polite email about {}.",
    "What mistakes do people make with {}?",
    "Describe {} in one paragraph.",
    "What is the history of {}?",
    "Write a short poem about {}.",
    "Ask me three questions about {}.",
)
_TOPICS = (
    *("a lost key", "an old clock", "a friendly robot", "a new neighbour", "a first job"),
    *("bees", "bicycles", "birds", "bread", "bridges", "chess", "computers", "cooking rice"),
    *("friendship", "gardens", "glass", "good sleep", "ice", "kites", "languages", "libraries"),
    *("maps", "money", "mountains", "music", "numbers", "painting", "paper", "patience"),
    *("photographs", "rain", "rivers", "running", "science", "ships", "shoes", "swimming"),
    *("tea", "teachers", "the moon", "the sea", "time zones", "trains", "trees", "vaccines"),
    *("volcanoes", "weather", "whales", "winter", "writing"),
)
_TOGETHER = 16  # conversations decoded in one batch


def questions(count: int, seed: int = 0) -> list[str]:
    """Different questions in random order; at most 500."""
    every = [ask.format(topic) for ask, topic in itertools.product(_ASKS, _TOPICS)]
    random.Random(seed).shuffle(every)
    assert count <= len(every)
    return every[:count]


def write_chats(model: Model, asked: list[str], out: Path, *, tokens: int) -> None:
    """Let a model answer, drawn at temperature 1, and write the conversations as JSON lines.

    A row has the conversation as ``messages``, and as ``text`` in ChatML.
    """
    parts = [asked[at : at + _TOGETHER] for at in range(0, len(asked), _TOGETHER)]
    with out.open("w", encoding="utf-8") as file:
        for number, part in enumerate(track(parts, "writing conversations", total=len(parts))):
            prompts = [[{"role": "user", "content": question}] for question in part]
            answers = model.generate(
                prompts, max_tokens=tokens, temperature=1.0, top_p=0.95, seed=number
            )
            for prompt, answer in zip(prompts, answers, strict=True):
                messages = [*prompt, {"role": "assistant", "content": answer.strip()}]
                row = {"messages": messages, "text": chatml.render(messages)[0]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
