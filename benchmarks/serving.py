"""Measure a running server: throughput, waiting times, and a soak that checks every text.

    turbosparse serve packed --parallel 16 &
    python benchmarks/serving.py throughput
    python benchmarks/serving.py latency
    python benchmarks/serving.py soak --seconds 300 --clients 64 --pid $!

The soak first asks for each text alone, greedily, and then compares what many clients get, of which
a third hang up at random and some send what must be refused; with --key also wrong keys.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2 as httpx

WORDS = re.findall(
    r"\w+",
    "Once upon a time there was a small boat that went over the sea to find an island where "
    "nobody had been before and where all of the birds could speak of what they had seen",
)


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def body(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}


class Client:
    """What is asked of one server."""

    def __init__(self, address: str, key: str | None):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(
            base_url=address, headers=headers, timeout=600, limits=limits
        )

    async def post(self, given: dict[str, Any], path: str = "completions", **more: Any) -> Any:
        return await self._http.post(f"/v1/{path}", json=given, **more)

    async def send(self, content: bytes, headers: dict[str, str]) -> Any:
        return await self._http.post("/v1/completions", content=content, headers=headers)

    async def metric(self, name: str) -> float:
        lines = (await self._http.get("/metrics")).text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    async def first_token(self, given: dict[str, Any], path: str = "completions") -> float:
        """Seconds to the first token; the connection then ends."""
        began = time.perf_counter()
        stream = self._http.stream("POST", f"/v1/{path}", json=given | {"stream": True})
        async with stream as answer:
            async for line in answer.aiter_lines():
                if '"turbosparse"' in line:
                    return time.perf_counter() - began
        raise RuntimeError(f"no token came: {answer.status_code}")


async def throughput(client: Client, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of 1, 4, 8 and 16 clients, each with a prompt of its own."""
    found = {}
    for clients in (1, 4, 8, 16):
        rates = []
        for round_ in range(args.rounds):
            given = [body(text(12, 100 * round_ + n), 64) for n in range(clients)]
            began = time.perf_counter()
            answers = await asyncio.gather(*(client.post(one) for one in given))
            tokens = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
            rates.append(tokens / (time.perf_counter() - began))
        found[f"{clients} clients, tokens/s"] = round(statistics.median(rates), 1)
    return found


async def latency(client: Client, args: argparse.Namespace) -> dict[str, Any]:
    """First token of a short request, alone and beside a long prompt; second turns of chats."""
    shorts: dict[str, list[float]] = {"alone": [], "beside a long prompt": []}
    longs, gaps = [], []
    for round_ in range(args.rounds):
        shorts["alone"].append(await client.first_token(body(text(8, round_), 8)))
        long = body(text(args.words, 1000 + round_), 1)
        reading = asyncio.create_task(client.first_token(long))
        streaming = asyncio.create_task(largest_gap(client, body(text(8, 2000 + round_), 64)))
        await asyncio.sleep(0.3)
        shorts["beside a long prompt"].append(
            await client.first_token(body(text(8, 3000 + round_), 8))
        )
        longs.append(await reading)
        gaps.append(await streaming)
    found = {f"short request {name}, s": median(values) for name, values in shorts.items()}
    found[f"long prompt of {args.words} words, s"] = median(longs)
    found["largest pause of a stream beside it, s"] = median(gaps)
    for words in (50, 500, args.words // 2):
        firsts, seconds = [], []
        for round_ in range(args.rounds):
            turns = [{"role": "user", "content": text(words, 5000 + 10 * words + round_)}]
            given = {"messages": turns, "max_tokens": 16, "temperature": 0}
            firsts.append(await client.first_token(given, "chat/completions"))
            answer = (await client.post(given, "chat/completions")).json()
            turns.append(answer["choices"][0]["message"])
            turns.append({"role": "user", "content": "Tell me more."})
            seconds.append(await client.first_token(given, "chat/completions"))
        found[f"chat of {words} words: first turn, s"] = median(firsts)
        found[f"chat of {words} words: second turn, s"] = median(seconds)
    return found


def median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


async def largest_gap(client: Client, given: dict[str, Any]) -> float:
    """Seconds between two tokens of a stream, at most."""
    times = []
    stream = client._http.stream("POST", "/v1/completions", json=given | {"stream": True})
    async with stream as answer:
        async for line in answer.aiter_lines():
            if '"turbosparse"' in line:
                times.append(time.perf_counter())
    return max(b - a for a, b in itertools.pairwise(times))


async def soak(client: Client, args: argparse.Namespace) -> dict[str, Any]:
    """Many clients for some minutes, against what each text is alone."""
    prompts = [text(random.Random(n).choice((3, 10, 40, 200)), n) for n in range(args.texts)]
    alone = [
        (await client.post(body(prompt, 32))).json()["choices"][0]["text"] for prompt in prompts
    ]
    end = time.monotonic() + args.seconds
    codes, wrong, memory, queue = Counter[str](), [], [resident(args.pid)], 0.0

    async def one(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            at = draw.randrange(len(prompts))
            kind = draw.choices(("whole", "leaves", "bad"), (57, 33, 10))[0]
            if kind == "whole":
                answer = await client.post(body(prompts[at], 32))
                codes[str(answer.status_code)] += 1
                assert answer.status_code in (200, 429), answer.text
                if answer.status_code == 200:
                    found = answer.json()["choices"][0]["text"]
                    wrong.extend([prompts[at]] * (found != alone[at]))
                else:
                    await asyncio.sleep(draw.random())
            elif kind == "leaves":
                codes["left"] += 1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(client.post(body(prompts[at], 32)), 2 * draw.random())
            else:
                content, headers, expected = draw.choice(BAD if args.key else BAD[:-1])
                answer = await client.send(content, headers)
                codes[f"bad {answer.status_code}"] += 1
                assert answer.status_code == expected, (content[:50], answer.text)

    async def watch() -> None:
        nonlocal queue
        minutes = 0
        while (now := time.monotonic()) < end:
            queue = max(queue, await client.metric("turbosparse_waiting"))
            if args.seconds - (end - now) >= 60 * (minutes + 1):
                minutes += 1
                memory.append(resident(args.pid))
                print(f"minute {minutes}: {dict(codes)}, {memory[-1]} MB", flush=True)
            await asyncio.sleep(0.5)
        memory.append(resident(args.pid))

    await asyncio.gather(watch(), *(one(number) for number in range(args.clients)))
    found = {"answers": dict(codes), "wrong texts": len(wrong), "most in the queue": queue}
    return found | {"resident MB, by the minute": memory}


JSON = {"Content-Type": "application/json"}
BAD: list[tuple[bytes, dict[str, str], int]] = [
    (b"{", JSON, 400),
    (b'{"prompt": "x", "unknown": 1}', JSON, 400),
    (json.dumps({"prompt": [5] * 100_000}).encode(), JSON, 400),
    (b" " * (9 << 20), JSON, 413),
    (b'{"prompt": "x", "model": "/etc/passwd"}', JSON, 404),
    (b'{"prompt": "x"}', JSON | {"Authorization": "Bearer wrong"}, 401),
]


def resident(pid: int | None) -> int:
    """Megabytes of a process, without the weights that it maps."""
    if pid is None:
        return 0
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    measures = {measure.__name__: measure for measure in (throughput, latency, soak)}
    parser.add_argument("measure", choices=measures)
    parser.add_argument("--address", default="http://127.0.0.1:8080")
    parser.add_argument("--key")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=3500, help="of the long prompt")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    args = parser.parse_args()
    found = asyncio.run(measures[args.measure](Client(args.address, args.key), args))
    for name, value in found.items():
        print(f"{name}: {value}")
    print(json.dumps({"measure": args.measure, **found}))


if __name__ == "__main__":
    main()
