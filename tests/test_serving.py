"""The server, by the official client of the API that it offers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from conftest import CONTEXT
from serving import serving

import turbosparse
from turbosparse.engine.engine import Engine
from turbosparse.engine.text import CALL_MARKERS, Tokenizer
from turbosparse.pack import pack
from turbosparse.serving.tools import ToolText

PROMPTS = ["The small boats", "You may not", "a", "Licensed under the Apache License", "[x] 1 2 3"]


@pytest.fixture(scope="module")
def packed(sparse: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "toy"
    pack(str(sparse("mistral")), folder, quant="q4")
    return folder


@pytest.fixture(scope="module")
def address(packed: Path) -> Iterator[str]:
    with serving(packed) as running:
        yield running.address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(packed: Path) -> dict[str, str]:
    """What each prompt gives without a server."""
    model = turbosparse.load(packed, threads=1)
    return {prompt: model.generate(prompt, max_tokens=30) for prompt in PROMPTS}


def complete(client: openai.OpenAI, prompt: str, **settings: Any) -> str:
    given = {"temperature": 0, "max_tokens": 30, **settings}
    return client.completions.create(model="toy", prompt=prompt, **given).choices[0].text


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# --- the API --------------------------------------------------------------------------------------


def test_a_completion_is_what_the_engine_says(client: openai.OpenAI, alone: dict[str, str]) -> None:
    for prompt in PROMPTS:
        assert complete(client, prompt) == alone[prompt]


def test_chunks_make_the_whole_and_show_the_sparsity(
    client: openai.OpenAI, packed: Path, alone: dict[str, str]
) -> None:
    chunks = list(
        client.completions.create(
            model="toy", prompt=PROMPTS[0], temperature=0, max_tokens=30, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == alone[PROMPTS[0]]
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.completion_tokens, chunks[-1].choices) == (30, [])
    assert chunks[-2].choices[0].finish_reason == "length"
    config = Engine(packed, threads=1).config
    rows = 3 * config.intermediate_size * config.num_hidden_layers
    for chunk in chunks[1:-1]:
        figures = chunk.model_dump()["turbosparse"]
        assert 0 < figures["active"] < 1
        assert len(figures["layers"]) == config.num_hidden_layers
        assert figures["active"] == pytest.approx(
            sum(figures["layers"]) / len(figures["layers"]), abs=1e-3
        )
        assert figures["rows_read"] + figures["rows_skipped"] == rows
        assert figures["rows_read"] < rows


def test_a_chat_goes_through_the_template_and_counts_its_tokens(
    client: openai.OpenAI, packed: Path
) -> None:
    model = turbosparse.load(packed, threads=1)
    turns = [{"role": "system", "content": "Be brief."}, *user("Hello")]
    expected = "".join(token.text for token in model.stream(turns, max_tokens=20))
    reply = client.chat.completions.create(
        model="toy", messages=turns, temperature=0, max_completion_tokens=20
    )
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(model.tokenizer.chat(turns))
    parts = [{"type": "text", "text": "Hell"}, {"type": "text", "text": "o"}]
    stream = client.chat.completions.create(
        model="toy",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
        ],
        temperature=0,
        max_tokens=20,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_a_response_is_a_chat_in_another_form(client: openai.OpenAI, packed: Path) -> None:
    model = turbosparse.load(packed, threads=1)
    turns = [{"role": "system", "content": "Be brief."}, *user("Hello")]
    expected = "".join(token.text for token in model.stream(turns, max_tokens=20))
    given: Any = {"model": "toy", "temperature": 0, "instructions": "Be brief."}
    made = client.responses.create(input="Hello", max_output_tokens=20, **given)
    assert made.output_text == expected
    assert (made.status, made.usage and made.usage.output_tokens) == ("incomplete", 20)
    assert made.usage is not None
    assert made.usage.input_tokens == len(model.tokenizer.chat(turns))
    with client.responses.stream(input=user("Hello"), max_output_tokens=20, **given) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected
    final = events[-1]
    assert final.type == "response.incomplete"
    assert final.response.output_text == expected
    more = [*user("Hello"), *final.response.output, *user("On.")]  # an answer can be sent back
    assert client.responses.create(input=more, max_output_tokens=3, **given).output_text
    for refused in ("tools", "previous_response_id", "text", "reasoning"):
        with pytest.raises(openai.BadRequestError, match=f"{refused}: is not a parameter here"):
            client.responses.create(input="Hello", extra_body={refused: {}}, **given)


def test_texts_of_one_request_differ_by_seed_and_repeat(client: openai.OpenAI) -> None:
    def texts(**settings: Any) -> list[str]:
        made = client.completions.create(
            model="toy", prompt=PROMPTS[:2], n=3, max_tokens=12, temperature=1.5, **settings
        )
        assert [choice.index for choice in made.choices] == list(range(6))
        return [choice.text for choice in made.choices]

    first = texts(seed=1)
    assert texts(seed=1) == first
    assert len(set(first)) == 6
    assert texts(seed=2) != first


def test_token_prompts_echo_and_stop_strings(
    client: openai.OpenAI, packed: Path, alone: dict[str, str]
) -> None:
    prompt, whole = PROMPTS[0], alone[PROMPTS[0]]
    tokens = Tokenizer(packed).encode(prompt)
    made = client.completions.create(
        model="toy", prompt=tokens, temperature=0, max_tokens=30, echo=True
    )
    assert made.choices[0].text == prompt + whole
    stop = whole[7:10]  # it may begin and end within tokens
    reply = client.completions.create(
        model="toy", prompt=prompt, temperature=0, max_tokens=30, stop=["never", stop]
    )
    assert reply.choices[0].text == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_penalties_and_biases_change_the_text(
    client: openai.OpenAI, packed: Path, alone: dict[str, str]
) -> None:
    model = turbosparse.load(packed, threads=1)
    prompt = PROMPTS[0]
    for settings in (
        {"presence_penalty": 1.5, "frequency_penalty": 1.0},
        {"logit_bias": {"70": 100}},
    ):
        plain = {k: {70: 100.0} if k == "logit_bias" else v for k, v in settings.items()}
        expected = model.generate(prompt, max_tokens=30, **plain)
        assert complete(client, prompt, **settings) == expected != alone[prompt]
    ours = {"repetition_penalty": 1.5, "top_k": 1, "min_p": 0.5}
    expected = model.generate(prompt, max_tokens=30, repetition_penalty=1.5)
    assert complete(client, prompt, temperature=1, extra_body=ours) == expected


def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI, packed: Path) -> None:
    model = turbosparse.load(packed, threads=1)
    reply = client.chat.completions.create(
        model="toy", messages=user("Hello"), temperature=0, max_tokens=8, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    prompt = model.tokenizer.chat(user("Hello"))
    ids = [t.id for t in model.stream(user("Hello"), max_tokens=8)]
    expected = model.score([*prompt, *ids])[-8:]
    scores = reply.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert [one.logprob for one in scores.content] == pytest.approx(expected.tolist(), abs=1e-3)
    for one in scores.content:
        assert [top.logprob for top in one.top_logprobs] == sorted(
            (top.logprob for top in one.top_logprobs), reverse=True
        )
        assert one.top_logprobs[0].token == one.token
    made = client.completions.create(
        model="toy", prompt="The", temperature=0, max_tokens=4, logprobs=2
    ).choices[0]
    assert made.logprobs is not None
    assert made.logprobs.tokens is not None
    assert "".join(made.logprobs.tokens) == made.text
    assert made.logprobs.text_offset == [len("".join(made.logprobs.tokens[:n])) for n in range(4)]


def test_a_schema_and_a_grammar_are_followed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
        "required": ["colour", "sure"],
        "additionalProperties": False,
    }
    for temperature, seed in ((0, 0), (2, 1), (2, 2)):
        reply = client.chat.completions.create(
            model="toy",
            messages=user("A colour?"),
            temperature=temperature,
            seed=seed,
            max_tokens=60,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema},
            },
        )
        found = json.loads(reply.choices[0].message.content or "")
        assert found["colour"] in ("red", "blue")
        assert found["sure"] in (True, False)
        assert reply.choices[0].finish_reason == "stop"
    lark = {"grammar": 'start: "yes" | "no" | /[0-9]{3}/'}
    for seed in range(5):
        text = complete(client, "Well,", temperature=3, seed=seed, extra_body=lark)
        assert text in ("yes", "no") or (len(text) == 3 and text.isdecimal())
    text = client.chat.completions.create(
        model="toy", messages=user("An object?"), temperature=0, max_tokens=40,
        response_format={"type": "json_object"},
    ).choices[0].message.content  # fmt: skip
    assert (text or "").startswith("{")


CALL = '{"name": "weather", "arguments": {"place": "Rome"}}'
NEW = 'weather[ARGS]{"place": "Rome"}'


def tool(name: str, **properties: Any) -> Any:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS: list[Any] = [tool("weather", place={"enum": ["Rome", "Oslo"]}), tool("stop")]


@pytest.mark.parametrize(
    ("text", "shown", "names"),
    [
        (f"Look: <tool_call>\n{CALL}\n</tool_call>", "Look: ", ["weather"]),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", ["weather"] * 2),
        (f"<tool_call>{CALL}", "", ["weather"]),  # the end tag may be what stopped it
        (CALL.replace("arguments", "parameters"), "", ["weather"]),  # Llama 3
        (f"<|python_tag|>{CALL}", "", ["weather"]),
        (f"[TOOL_CALLS] [{CALL}, {CALL}]", "", ["weather"] * 2),  # Mistral
        (f" [{CALL}]", "", ["weather"]),
        (f"So: [TOOL_CALLS]{NEW}[TOOL_CALLS]{NEW}", "So: ", ["weather"] * 2),  # Mistral since 2025
        ("[TOOL_CALLS] is a token", "[TOOL_CALLS] is a token", []),
        ("A <tool and a {brace}", "A <tool and a {brace}", []),
        ("{} and [1]", "{} and [1]", []),
        ("[1, 2]", "[1, 2]", []),
        (CALL.replace("weather", "other"), CALL.replace("weather", "other"), []),
        ("<tool_call>{</tool_call>", "<tool_call>{</tool_call>", []),
        ("", "", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_in_text(text: str, shown: str, names: list[str], size: int) -> None:
    tools = ToolText({"weather"})
    pieces = [tools.step(text[at : at + size]) for at in range(0, len(text), size)]
    rest, calls = tools.finish()
    assert "".join(pieces) + rest == shown
    assert [call["function"]["name"] for call in calls] == names
    for call in calls:
        assert json.loads(call["function"]["arguments"]) == {"place": "Rome"}
    assert len({call["id"] for call in calls}) == len(calls)
    one = ToolText({"weather"}, several=False)
    one.step(text)
    assert len(one.finish()[1]) == min(1, len(names))


def test_a_model_calls_a_tool_and_gets_the_result(client: openai.OpenAI) -> None:
    says = {"grammar": "start: " + json.dumps(f"Yes. <tool_call>{CALL}</tool_call>")}
    given: Any = {"model": "toy", "temperature": 0, "tools": TOOLS, "extra_body": says}
    turns: list[Any] = user("Rain?")
    reply = client.chat.completions.create(messages=turns, **given).choices[0]
    assert (reply.finish_reason, reply.message.content) == ("tool_calls", "Yes. ")
    calls = reply.message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert json.loads(calls[0].function.arguments) == {"place": "Rome"}
    turns += [reply.message, {"role": "tool", "tool_call_id": calls[0].id, "content": "No."}]
    assert client.chat.completions.create(messages=turns, model="toy", max_tokens=3).choices

    with client.chat.completions.stream(messages=user("Rain?"), **given) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content) == ("tool_calls", "Yes. ")
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.name == "weather"
    plain = client.chat.completions.create(messages=user("Rain?"), tool_choice="none", **given)
    assert plain.choices[0].finish_reason == "stop"
    assert CALL in (plain.choices[0].message.content or "")


@pytest.mark.parametrize(
    ("hint", "hidden", "begins"),
    [
        ("[TOOL_CALLS] [ARGS]", False, "[TOOL_CALLS]weather[ARGS]{"),
        ("[TOOL_CALLS] [ARGS]", True, "[TOOL_CALLS]weather[ARGS]{"),
        ("[TOOL_CALLS]", True, '[TOOL_CALLS][{"name": "weather", "arguments": {'),
        ("<tool_call>", True, '<tool_call>\n{"name": "weather", "arguments": {'),
        ("", False, '{"name": "weather", "parameters": {'),
    ],
)
def test_a_call_can_be_asked_for_in_the_form_of_the_model(
    packed: Path, tmp_path: Path, hint: str, hidden: bool, begins: str
) -> None:
    """The form is that of the chat template, and its markers are tokens where the model has any."""
    folder = tmp_path / "toy"
    shutil.copytree(packed, folder)
    (folder / "chat_template.jinja").write_text("{# " + hint + " #}{{ messages[-1].content }}")
    if hidden:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        names = tokenizer["model"]["vocab"]
        longest = sorted(names, key=len)[-len(CALL_MARKERS) :]
        for name, marker in zip(longest, CALL_MARKERS, strict=True):  # takes the token's place
            names[marker] = names.pop(name)
            added = dict(tokenizer["added_tokens"][0], id=names[marker], content=marker)
            tokenizer["added_tokens"].append(added)
        tokenizer["model"]["merges"] = []
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with serving(folder) as running:
        client = openai.OpenAI(base_url=f"{running.address}/v1", api_key="none")
        named = {"type": "function", "function": {"name": "weather"}}
        given: Any = {"model": "toy", "messages": user("Rain?"), "tools": TOOLS, "temperature": 2}
        for choice, seed in (("required", 1), ("required", 2), (named, 3)):
            reply = client.chat.completions.create(
                tool_choice=choice, seed=seed, logprobs=True, **given
            ).choices[0]
            assert reply.finish_reason == "tool_calls"
            assert not reply.message.content
            assert reply.message.tool_calls is not None
            (call,) = reply.message.tool_calls
            assert call.type == "function"
            if choice == named:
                assert call.function.name == "weather"
                assert json.loads(call.function.arguments)["place"] in ("Rome", "Oslo")
                assert reply.logprobs is not None
                tokens = [one.token for one in reply.logprobs.content or ()]
                assert "".join(tokens).startswith(begins)
                assert (tokens[0] in CALL_MARKERS) == hidden


def test_the_asynchronous_client(address: str, alone: dict[str, str]) -> None:
    async def texts() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:

            async def one(prompt: str) -> str:
                chunks = await client.completions.create(
                    model="toy", prompt=prompt, temperature=0, max_tokens=30, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in chunks])

            return await asyncio.gather(*map(one, PROMPTS))

    assert asyncio.run(texts()) == [alone[prompt] for prompt in PROMPTS]


def test_tokens_models_health_and_metrics(
    address: str, client: openai.OpenAI, packed: Path
) -> None:
    tokens = Tokenizer(packed).encode("The boats", special=False)
    made = httpx.post(f"{address}/tokenize", json={"content": "The boats"}).json()
    assert made == {"tokens": tokens, "count": len(tokens)}
    text = httpx.post(f"{address}/detokenize", json={"tokens": tokens}).json()
    assert text == {"content": "The boats"}
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "turbosparse"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    complete(client, "The", max_tokens=5)
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(counts["turbosparse_generated_tokens_total"]) >= 5
    assert float(counts['turbosparse_requests_total{end="finished"}']) >= 1


# --- what is refused ------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"best_of": 2}, 400, "best_of: is not a parameter here"),
    ({"temperature": -1}, 400, "temperature is -1"),
    ({"top_p": 0}, 400, "top-p is 0"),
    ({"n": 0}, 400, "n: "),
    ({"max_tokens": 0}, 400, "max_tokens: "),
    ({"max_tokens": "many"}, 400, "max_tokens: "),
    ({"logprobs": 21}, 400, "logprobs: "),
    ({"stop": [""]}, 400, "stop"),
    ({"logit_bias": {"320": 1}}, 400, "token 320 is outside"),
    ({"logit_bias": {"3": 101}}, 400, "logit_bias"),
    ({"echo": True, "logprobs": 1}, 400, "echo and logprobs exclude each other"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options belongs to stream"),
    ({"prompt": ""}, 200, ""),
    ({"prompt": []}, 400, "the prompt holds no token"),
    ({"prompt": [1, 320]}, 400, "token 320 is outside"),
    ({"prompt": [1] * CONTEXT}, 400, f"the prompt has {CONTEXT} tokens"),
    ({"model": "other"}, 404, "model 'other' does not exist; use toy"),
    ({"model": "../toy"}, 404, "does not exist"),
    ({"grammar": "start: nothing"}, 400, "grammar cannot be used"),
    ({"response_format": {"type": "json_schema"}}, 400, "json_schema belongs to"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, 400,
     "response_format cannot be used"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "status", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(
    address: str, change: dict[str, Any], status: int, message: str
) -> None:
    body = {"model": "toy", "prompt": "The", "max_tokens": 3, **change}
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert message in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs belongs to logprobs"),
        ({"tool_choice": "required"}, "tool_choice asks for a function that is not among"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": TOOLS},
         "tool_choice asks for a function that is not among"),
        ({"tool_choice": "required", "tools": TOOLS, "grammar": "start: \"x\""},
         "tool_choice, grammar and response_format exclude each other"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {
            "name": "x", "parameters": {"type": "y"}}}]}, "tools cannot be used"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.0.content"),
        ({"audio": {}}, "audio: is not a parameter here"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_done_is_refused(
    address: str, change: dict[str, Any], message: str
) -> None:
    body = {"messages": user("Hello"), **change}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_bodies_that_are_no_requests(address: str) -> None:
    url = f"{address}/v1/completions"
    kind = {"Content-Type": "application/json"}
    for content in (b"{", b"[]", b"\xff", b'"x"', b""):
        answer = httpx.post(url, content=content, headers=kind)
        assert answer.status_code == 400, content
        assert answer.json()["error"]["message"]
    big = b" " * (9 << 20)
    assert httpx.post(url, content=big, headers=kind).status_code == 413
    chunks = (big[:100_000] for _ in range(90))  # no length is announced
    assert httpx.post(url, content=chunks, headers=kind).status_code == 413
    assert httpx.get(f"{address}/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(url).status_code == 405
