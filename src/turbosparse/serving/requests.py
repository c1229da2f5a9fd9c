"""What a client may ask for: one schema for each endpoint. What is not in it is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from turbosparse.engine.sampling import Sampling

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[int], Field(max_length=1 << 20)]


class Strict(BaseModel):
    """Unknown fields are an error; null is the same as absent, as clients send it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class StreamOptions(Strict):
    include_usage: bool = False


class Schema(Strict):
    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and only to it")
        return self


class Generate(Strict):
    """What chats and completions have in common."""

    model: str | None = None
    n: int = Field(1, ge=1, le=64)
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=1024
    )
    stop: Text | Annotated[list[Text], Field(max_length=16)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    user: str = ""

    @model_validator(mode="after")
    def _fits_together(self) -> Generate:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options belongs to stream: true")
        if self.grammar and self.response_format and self.response_format.type != "text":
            raise ValueError("grammar and response_format exclude each other")
        return self

    @property
    def usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, index: int) -> Sampling:
        """Of text number `index`; each draws from a random state of its own."""
        values = {
            name: getattr(self, name) for name in Sampling.__dataclass_fields__ if name != "seed"
        }
        return Sampling(**values, seed=None if self.seed is None else self.seed + index)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str = "{}"


class ToolCall(Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Strict):
    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object"})
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class Named(Strict):
    name: str


class ToolChoice(Strict):
    type: Literal["function"]
    function: Named


class ChatRequest(Generate):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _logprobs_fit(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs belongs to logprobs: true")
        return self

    @model_validator(mode="after")
    def _call_fits(self) -> ChatRequest:
        if self.tool_choice in ("none", "auto"):
            return self
        if not self.forced:
            raise ValueError("tool_choice asks for a function that is not among the tools")
        if self.grammar or (self.response_format and self.response_format.type != "text"):
            raise ValueError("tool_choice, grammar and response_format exclude each other")
        return self

    @property
    def forced(self) -> dict[str, dict[str, Any]]:
        """The functions of which one must be called, and the schemas of their arguments."""
        if self.tool_choice in ("none", "auto"):
            return {}
        only = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        functions = [tool.function for tool in self.tools]
        return {one.name: one.parameters for one in functions if only in (None, one.name)}


class CompletionRequest(Generate):
    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(max_length=64)]
        | Annotated[list[Tokens], Field(max_length=64)]
    )
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @model_validator(mode="after")
    def _echo_fits(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs exclude each other: prompts are not scored")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and not all(
            isinstance(item, int) for item in self.prompt
        )
        return list(self.prompt) if several else [self.prompt]  # type: ignore[arg-type, list-item]


class TokenizeRequest(Strict):
    model: str | None = None
    content: str
    add_special: bool = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Tokens
