"""The server under load: who joins, who leaves, who is refused, and how it ends."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from serving import Running, serving

import turbosparse
from turbosparse.pack import pack

WORDS = ("The small boats and the gulls went home", "you may not use", "this file", "before")


@pytest.fixture(scope="module")
def packed(sparse: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "toy"
    pack(str(sparse("mistral")), folder, quant="q4")
    return folder


def body(prompt: str | list[int], tokens: int = 30, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}


def post(running: Running, prompt: str | list[int], tokens: int = 30, **more: Any) -> Any:
    return httpx.post(f"{running.address}/v1/completions", json=body(prompt, tokens, **more))


def until(what: Callable[[], bool]) -> None:
    """Wait for something that must happen soon."""
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def idle(running: Running) -> bool:
    scheduler = running.server.scheduler
    return not scheduler._running and not scheduler._waiting


def test_a_text_does_not_depend_on_who_else_is_served(packed: Path) -> None:
    """Byte for byte: prompts of all lengths, sampled and greedy, and a third hang up at random."""
    draw = random.Random(3)
    prompts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 6))) for _ in range(60)]
    settings = [
        {"temperature": draw.choice([0, 0, 1.2]), "seed": n, "logprobs": 0} for n in range(60)
    ]
    with serving(packed, parallel=1) as running:
        alone = [
            post(running, prompt, 25, **more).json()["choices"]
            for prompt, more in zip(prompts, settings, strict=True)
        ]

    async def one(client: httpx.AsyncClient, number: int) -> Any:
        given = body(prompts[number], 25, **settings[number])
        if number % 3:
            answer = await client.post("/v1/completions", json=given)
            return answer.json()["choices"]
        async with client.stream("POST", "/v1/completions", json=given | {"stream": True}) as got:
            leave = random.Random(number).randrange(20)
            async for line in got.aiter_lines():
                leave -= bool(line)
                if leave < 0:
                    return None
        return None

    async def all_together(address: str) -> list[Any]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            return await asyncio.gather(*(one(client, number) for number in range(60)))

    with serving(packed, parallel=7, queue=100, kv_bytes=300_000) as running:
        together = asyncio.run(all_together(running.address))
        assert running.count("preempted_total") > 0  # the budget does not hold seven long texts
        until(lambda: idle(running))
    for number, choices in enumerate(together):
        if choices is not None:
            assert choices == alone[number], prompts[number]


def test_a_text_that_is_not_wanted_any_more_leaves_the_batch(packed: Path) -> None:
    with serving(packed) as running:
        running.slow_down(0.02)
        client = openai.OpenAI(base_url=f"{running.address}/v1", api_key="none")
        stream = client.completions.create(
            model="toy", prompt="The", max_tokens=150, temperature=0, stream=True
        )
        for _ in range(3):
            next(stream)
        stream.close()
        until(lambda: running.count("requests_total", end="cancelled") == 1)
        assert running.count("generated_tokens_total") < 20
        with pytest.raises(httpx.TimeoutException):  # not streamed
            httpx.post(f"{running.address}/v1/completions", json=body("The", 150), timeout=0.2)
        until(lambda: running.count("requests_total", end="cancelled") == 2)
        assert running.server.models.open[0].users == 0


def test_a_full_queue_is_refused_and_the_rest_is_served(packed: Path) -> None:
    with serving(packed, parallel=2, queue=2) as running:
        running.slow_down(0.02)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: post(running, "The", 20), range(8)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200] * 4 + [429] * 4
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
        assert post(running, "The", 3).status_code == 200


def test_one_client_does_not_hold_up_another(packed: Path) -> None:
    """Ten texts of one client wait; the only one of another goes before them."""
    with serving(packed, parallel=1) as running, ThreadPoolExecutor(11) as pool:
        open_ = threading.Event()
        with running.server.models.using(None) as served:
            advance = served.engine.advance

            def when_open(*given: Any) -> Any:
                open_.wait()
                return advance(*given)

            served.engine.advance = when_open  # type: ignore[method-assign]
        order: list[str] = []

        def ask(user: str) -> None:
            post(running, "The", 40, user=user)
            order.append(user)

        many = [pool.submit(ask, "one") for _ in range(10)]
        until(lambda: len(running.server.scheduler._waiting) == 9)
        other = pool.submit(ask, "other")
        until(lambda: len(running.server.scheduler._waiting) == 10)
        open_.set()
        for each in [*many, other]:
            each.result()
        assert order.index("other") <= 3  # second, but for how threads wake up


def test_a_long_prompt_is_read_while_others_go_on(packed: Path) -> None:
    with serving(packed) as running, ThreadPoolExecutor(1) as pool:
        running.slow_down(0.02)
        batches = []
        with running.server.models.using(None) as served:
            advance = served.engine.advance

            def seen(sequences: Any, counts: list[int]) -> Any:
                batches.append(list(counts))
                return advance(sequences, counts)

            served.engine.advance = seen  # type: ignore[method-assign]
        short = pool.submit(post, running, "The", 60)
        until(lambda: running.count("generated_tokens_total") > 2)
        long = [n % 300 + 2 for n in range(140)]
        assert post(running, long, 3).status_code == 200
        assert short.result().status_code == 200
        together = [sorted(counts) for counts in batches if len(counts) == 2]
        reading = [counts for counts in together if counts[1] > 1]
        assert len(reading) > 1  # in several passes,
        assert all(counts[0] == 1 for counts in reading)  # in which the other goes on
        assert sum(counts[1] for counts in reading) == 140


def test_the_second_turn_of_a_chat_reads_only_what_is_new(packed: Path) -> None:
    model = turbosparse.load(packed, threads=1)
    with serving(packed) as running:
        client = openai.OpenAI(base_url=f"{running.address}/v1", api_key="none")
        turns: list[Any] = [{"role": "user", "content": "Tell me of boats."}]
        for turn in range(3):
            reply = client.chat.completions.create(
                model="toy", messages=turns, temperature=0, max_tokens=8
            )
            answer = reply.choices[0].message.content
            expected = model.stream(turns, max_tokens=8)
            assert answer == "".join(token.text for token in expected)
            assert reply.usage is not None
            details = reply.usage.prompt_tokens_details
            assert details is not None
            before = turn and len(model.tokenizer.chat(turns[:-2]))
            assert before <= (details.cached_tokens or 0) < reply.usage.prompt_tokens
            turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "On."}]


def test_texts_with_the_same_beginning_share_it(packed: Path) -> None:
    with serving(packed) as running:
        tokens = [n % 300 + 2 for n in range(100)]
        first = post(running, tokens, 20).json()
        for tail in ([5], [6, 7]):
            usage = post(running, [*tokens, *tail], 3).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 100
        usage = post(running, [*tokens, 5], 3, n=4).json()["usage"]
        assert usage["completion_tokens"] == 12
        again = post(running, tokens, 20).json()
        assert again["choices"] == first["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 99


def test_kept_texts_give_way(packed: Path) -> None:
    with serving(packed, kv_bytes=300_000) as running:
        texts = [[n % 300 + 2 for n in range(begin, begin + 70)] for begin in range(20)]
        for tokens in texts:
            assert post(running, tokens, 5).status_code == 200
        until(lambda: idle(running))
        served = running.server.models.open[0]
        assert 0 < len(served.prefixes) < 20
        assert served.engine.budget.used == served.prefixes.bytes <= 300_000
        usage = post(running, texts[0], 5).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0  # the oldest is gone
        usage = post(running, texts[-1], 5).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 69


def test_a_text_larger_than_the_budget_is_refused(packed: Path) -> None:
    with serving(packed, kv_bytes=40_000) as running:
        answer = post(running, [5] * 130, 5)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        choice = post(running, "The", 150).json()["choices"][0]
        assert choice["finish_reason"] == "length"


def test_an_answer_in_the_making_keeps_no_logits(packed: Path) -> None:
    with serving(packed) as running:
        passes: list[weakref.ref[Any]] = []
        alive = []
        with running.server.models.using(None) as served:
            step = served.engine.decoder.step

            def seen(*given: Any, **more: Any) -> Any:
                alive.append(sum(one() is not None for one in passes))
                logits, used = step(*given, **more)
                passes.append(weakref.ref(logits))
                return logits, used

            served.engine.decoder.step = seen
            served.draft = None  # so that each pass gives one token
        assert post(running, "The", 30).status_code == 200
        assert len(alive) == 30
        assert max(alive) <= 2


def test_a_late_request_is_ended(packed: Path) -> None:
    with serving(packed, seconds=0.3) as running:
        running.slow_down(0.05)
        answer = post(running, "The", 150)
        assert answer.status_code == 504
        assert "no end within 0.3 s" in answer.json()["error"]["message"]
        events = post(running, "The", 150, stream=True).text.split("\n\n")
        assert "no end within" in json.loads(events[-3].removeprefix("data: "))["error"]["message"]


def test_a_fault_ends_its_requests_and_not_the_server(packed: Path) -> None:
    with serving(packed) as running:
        with running.server.models.using(None) as served:
            advance = served.engine.advance

            def fails(*_: Any) -> Any:
                served.engine.advance = advance  # type: ignore[method-assign]
                raise RuntimeError("secret")

            served.engine.advance = fails  # type: ignore[method-assign]
        answer = post(running, "The", 5)
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert post(running, "The", 5).status_code == 200


def test_a_key_is_asked_for_and_a_strange_host_refused(packed: Path) -> None:
    with serving(packed, key="sesame") as running:
        for key, code in ((None, 401), ("Bearer wrong", 401), ("Bearer sesame", 200)):
            headers = {"Authorization": key} if key else {}
            for path in ("/v1/models", "/metrics"):
                answer = httpx.get(running.address + path, headers=headers)
                assert answer.status_code == code, (path, key)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
        assert httpx.get(f"{running.address}/health").status_code == 200
        bad = httpx.post(f"{running.address}/v1/completions", content=b"{")
        assert bad.status_code == 401
        wrong = httpx.get(f"{running.address}/health", headers={"Host": "evil.example:80"})
        assert wrong.status_code == 403
        plain = httpx.post(
            f"{running.address}/v1/completions",
            content=json.dumps(body("The")),
            headers={"Content-Type": "text/plain", "Authorization": "Bearer sesame"},
        )
        assert plain.status_code == 400  # what a page of another origin could send unasked


def test_several_models_take_turns_in_memory(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(packed)
    size = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    other = tmp_path / "copy"
    subprocess.run(["cp", "-r", packed, other], check=True)
    with serving(packed, other, memory=int(1.5 * size)) as running:
        texts = []
        for name in ("toy", "copy", "toy"):
            answer = post(running, "The boats", 10, model=name).json()
            assert answer["model"] == name
            assert [served.name for served in running.server.models.open] == [name]
            texts.append(answer["choices"][0]["text"])
        assert len(set(texts)) == 1
        with running.server.models.using("toy"):
            assert post(running, "The", 5, model="copy").status_code == 503


def test_a_signal_under_load_ends_every_client_and_the_process(packed: Path) -> None:
    command = [sys.executable, "-m", "turbosparse", "serve", packed, "--port", "0"]
    settings = ["--grace", "0.5", "--threads", "1", "--parallel", "2", "--queue", "200"]
    process = subprocess.Popen([*command, *settings], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(2)]
    address = lines[1].split()[-1]
    running = Running(None, address)  # type: ignore[arg-type]

    def ask(number: int) -> str:
        try:
            return str(post(running, "The", 150, n=8, stream=bool(number % 2)).text)
        except httpx.HTTPError as error:  # it came after the end
            return type(error).__name__

    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, number) for number in range(12)]
        until(lambda: sum(each.done() for each in asked) >= 2)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        answers = [each.result(timeout=20) for each in asked]
        assert process.wait(timeout=20) == 0
        process.stderr.close()
        assert time.monotonic() - began < 10
    for answer in answers:
        whole = '"finish_reason":"length"' in answer
        assert whole or "shutting down" in answer or answer in ("ConnectError", "ReadError")
