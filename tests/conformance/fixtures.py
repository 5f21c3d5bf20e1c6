"""Fixtures the conformance suite expects on a server, under the names it uses.

`python -m tests.conformance.fixtures` serves our own application with them and prints its address; the product knows
nothing of them.
Each name is what a scenario of the suite calls; what it must answer is message in the scenario's description.
"""

import base64
import io
import json
import socket
import wave
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.prompts.base import UserMessage
from mcp.shared.exceptions import MCPError
from mcp_types import (
    AudioContent,
    CreateMessageRequest,
    CreateMessageRequestParams,
    ElicitRequest,
    ElicitRequestFormParams,
    EmbeddedResource,
    ImageContent,
    InputRequest,
    InputRequiredResult,
    ListRootsRequest,
    SamplingMessage,
    TextContent,
    TextResourceContents,
)
from PIL import Image
from pydantic import BaseModel, Field

from klein_mcp.daemon.client import DaemonClient
from klein_mcp.http import app
from klein_mcp.jobs.service import Service
from klein_mcp.settings import Settings

MISSING_CAPABILITY = -32021


def _png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(out, "PNG")
    return out.getvalue()


def _wav() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(b"\x80\x80")
    return out.getvalue()


PNG = base64.b64encode(_png()).decode()
WAV = base64.b64encode(_wav()).decode()


def described(register: Any) -> Any:
    """Register with a description, which tools and prompts must have."""
    return lambda function: register(description=f"A fixture: {function.__name__}.")(function)


def text(words: str) -> TextContent:
    return TextContent(type="text", text=words)


def embedded(uri: str, words: str, mime: str = "text/plain") -> EmbeddedResource:
    return EmbeddedResource(type="resource", resource=TextResourceContents(uri=uri, mime_type=mime, text=words))


def elicit(message: str, **properties: Any) -> ElicitRequest:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def sample(words: str, tokens: int) -> CreateMessageRequest:
    messages = [SamplingMessage(role="user", content=text(words))]
    return CreateMessageRequest(params=CreateMessageRequestParams(messages=messages, max_tokens=tokens))


NAME = elicit("What is your name?", name={"type": "string"})


class Answer(BaseModel):
    response: str = Field(description="The answer")


class Defaults(BaseModel):
    """One property of each primitive type, each with a default."""

    name: str = Field(default="John Doe")
    age: int = Field(default=30)
    score: float = Field(default=95.5)
    status: str = Field(default="active", json_schema_extra={"enum": ["active", "inactive", "pending"]})
    verified: bool = Field(default=True)


def _titled(**titles: str) -> list[Any]:
    return [{"const": value, "title": title} for value, title in titles.items()]


class Enums(BaseModel):
    """Each way in which a choice can be written."""

    untitledSingle: str = Field(json_schema_extra={"enum": ["one", "two", "three"]})
    titledSingle: str = Field(json_schema_extra={"oneOf": _titled(one="First", two="Second", three="Third")})
    untitledMulti: list[str] = Field(json_schema_extra={"items": {"type": "string", "enum": ["one", "two", "three"]}})
    titledMulti: list[str] = Field(json_schema_extra={"items": {"anyOf": _titled(one="First", two="Second")}})
    legacyEnum: str = Field(json_schema_extra={"enum": ["one", "two"], "enumNames": ["First", "Second"]})


def add(server: MCPServer) -> None:
    """Every fixture of the scenarios that both revisions score."""
    _contents(server)
    _notifications(server)
    _questions(server)
    _input_required(server)
    _resources(server)
    _prompts(server)


def _contents(server: MCPServer) -> None:
    @described(server.tool)
    def test_simple_text() -> str:
        return "Some text."

    @described(server.tool)
    def test_image_content() -> list[ImageContent]:
        return [ImageContent(type="image", data=PNG, mime_type="image/png")]

    @described(server.tool)
    def test_audio_content() -> list[AudioContent]:
        return [AudioContent(type="audio", data=WAV, mime_type="audio/wav")]

    @described(server.tool)
    def test_embedded_resource() -> list[EmbeddedResource]:
        return [embedded("test://embedded-resource", "Some resource.")]

    @described(server.tool)
    def test_multiple_content_types() -> list[TextContent | ImageContent | EmbeddedResource]:
        image = ImageContent(type="image", data=PNG, mime_type="image/png")
        mixed = embedded("test://mixed-content-resource", '{"some": "data"}', "application/json")
        return [text("Three kinds."), image, mixed]

    @described(server.tool)
    def test_error_handling() -> str:
        raise RuntimeError("as the scenario wants it")


def _notifications(server: MCPServer) -> None:
    @described(server.tool)
    async def test_tool_with_logging(context: Context) -> str:
        for words in ("begun", "half way", "done"):
            await context.info(words)
            await anyio.sleep(0.05)
        return "Logged three times."

    @described(server.tool)
    async def test_logging_tool(context: Context) -> str:
        await context.info("only to whoever asked for it")
        return "Logged."

    @described(server.tool)
    async def test_tool_with_progress(context: Context) -> str:
        for done in (0, 50, 100):
            await context.report_progress(done, 100)
            await anyio.sleep(0.05)
        return "Three reports."

    @described(server.tool)
    async def test_trigger_tool_change(context: Context) -> str:
        await context.notify_tools_changed()
        return "Payload."

    @described(server.tool)
    async def test_trigger_prompt_change(context: Context) -> str:
        await context.notify_prompts_changed()
        return "Payload."


def _questions(server: MCPServer) -> None:
    @described(server.tool)
    async def test_sampling(prompt: str, context: Context) -> str:
        messages = [SamplingMessage(role="user", content=text(prompt))]
        answer = await context.session.create_message(messages=messages, max_tokens=100)
        return f"The model message: {answer.content.text}"  # type: ignore[union-attr]

    @described(server.tool)
    async def test_elicitation(message: str, context: Context) -> str:
        return str(await context.elicit(message, Answer))

    @described(server.tool)
    async def test_elicitation_sep1034_defaults(context: Context) -> str:
        return str(await context.elicit("Who are you?", Defaults))

    @described(server.tool)
    async def test_elicitation_sep1330_enums(context: Context) -> str:
        return str(await context.elicit("Choose.", Enums))

    @described(server.tool)
    def test_missing_capability() -> str:
        raise MCPError(MISSING_CAPABILITY, "This tool samples.", {"requiredCapabilities": {"sampling": {}}})


Asked = InputRequiredResult


def _input_required(server: MCPServer) -> None:
    @described(server.tool)
    def test_input_required_result_elicitation(context: Context) -> str | Asked:
        answers = context.input_responses
        return (
            f"Hello, {answers['user_name']}!"
            if answers and "user_name" in answers
            else Asked(input_requests={"user_name": NAME})
        )

    @described(server.tool)
    async def test_streaming_elicitation(context: Context) -> str | Asked:
        await context.report_progress(0, 1)
        return Asked(input_requests={"user_name": NAME})

    @described(server.tool)
    def test_input_required_result_sampling(context: Context) -> str | Asked:
        question = sample("What is the capital of France?", 100)
        return _once(context, "capital_question", question)

    @described(server.tool)
    def test_input_required_result_list_roots(context: Context) -> str | Asked:
        return _once(context, "client_roots", ListRootsRequest())

    @described(server.tool)
    def test_input_required_result_request_state(context: Context) -> str | Asked:
        if context.input_responses and context.request_state == "ours":
            return "state-ok"
        return Asked(input_requests={"confirm": elicit("Please confirm", ok={"type": "boolean"})}, request_state="ours")

    @described(server.tool)
    def test_input_required_result_tampered_state(context: Context) -> str | Asked:
        if context.input_responses:
            return "confirmed"
        return Asked(input_requests={"confirm": elicit("Please confirm", ok={"type": "boolean"})}, request_state="ours")

    @described(server.tool)
    def test_input_required_result_multiple_inputs(context: Context) -> str | Asked:
        wanted: dict[str, InputRequest] = {
            "user_name": NAME,
            "greeting": sample("Generate a greeting", 50),
            "client_roots": ListRootsRequest(),
        }
        if context.input_responses and wanted.keys() <= context.input_responses.keys():
            return "All three."
        return Asked(input_requests=wanted, request_state="all")

    @described(server.tool)
    def test_input_required_result_multi_round(context: Context) -> str | Asked:
        answers = context.input_responses or {}
        if "step2" in answers and context.request_state == "second":
            return "Both."
        if "step1" in answers and context.request_state == "first":
            colour = elicit("Step 2: What is your favorite color?", color={"type": "string"})
            return Asked(input_requests={"step2": colour}, request_state="second")
        name = elicit("Step 1: What is your name?", name={"type": "string"})
        return Asked(input_requests={"step1": name}, request_state="first")

    @described(server.tool)
    def test_input_required_result_capabilities(context: Context) -> str | Asked:
        declared = context.client_capabilities
        wanted: dict[str, InputRequest] = {}
        if declared and declared.elicitation is not None:
            wanted["user_name"] = NAME
        if declared and declared.sampling is not None:
            wanted["greeting"] = sample("Generate a greeting", 50)
        return Asked(input_requests=wanted) if wanted and not context.input_responses else "Nothing to ask."


def _once(context: Context, key: str, question: InputRequest) -> str | Asked:
    """Ask, and tell the answer."""
    answers = context.input_responses
    return str(answers[key]) if answers and key in answers else Asked(input_requests={key: question})


def _resources(server: MCPServer) -> None:
    @server.resource("test://static-text", mime_type="text/plain")
    def static_text() -> str:
        return "Some text."

    @server.resource("test://static-binary", mime_type="image/png")
    def static_binary() -> bytes:
        return base64.b64decode(PNG)

    @server.resource("test://template/{id}/data", mime_type="application/json")
    def template(id: str) -> str:
        return json.dumps({"id": id})

    @server.resource("test://watched-resource", mime_type="text/plain")
    def watched() -> str:
        return "Some text that could change."


def _prompts(server: MCPServer) -> None:
    @described(server.prompt)
    def test_simple_prompt() -> list[UserMessage]:
        return [UserMessage(content=text("Some words."))]

    @described(server.prompt)
    def test_prompt_with_arguments(arg1: str, arg2: str) -> list[UserMessage]:
        return [UserMessage(content=text(f"{arg1} and {arg2}"))]

    @described(server.prompt)
    def test_prompt_with_embedded_resource(resourceUri: str) -> list[UserMessage]:
        return [UserMessage(content=embedded(resourceUri, "Some resource.")), UserMessage(content=text("Read it."))]

    @described(server.prompt)
    def test_prompt_with_image() -> list[UserMessage]:
        image = ImageContent(type="image", data=PNG, mime_type="image/png")
        return [UserMessage(content=image), UserMessage(content=text("Look at it."))]

    @described(server.prompt)
    def test_input_required_result_prompt(context: Context) -> list[UserMessage] | Asked:
        question = elicit("What context should the prompt use?", context={"type": "string"})
        answers = context.input_responses
        if answers and "user_context" in answers:
            return [UserMessage(content=text(str(answers["user_context"])))]
        return Asked(input_requests={"user_context": question})


def main() -> None:
    settings = Settings.load()
    service = Service(settings, DaemonClient(settings))
    context = app.make_context(service)
    add(context.server)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app.application(context), log_config=None)).run([listener])


if __name__ == "__main__":
    main()
