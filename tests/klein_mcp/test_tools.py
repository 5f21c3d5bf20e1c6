"""What a client reads in tools/list, and what it is told when it calls a tool wrongly."""

import json
from typing import Any

import pytest
from mcp import Client

from engine.contract import Busy, InvalidJob, ModelNotFound
from engine.families.klein.variants import VARIANTS
from tests.fakes import FakePainter
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio

PAINTING = ("generate_image", "edit_image", "compose_references")


@pytest.fixture
async def listed(client: Client) -> list[dict[str, Any]]:
    tools = (await client.list_tools()).tools
    return [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]


async def test_the_whole_list_is_short(listed: list[dict[str, Any]]):
    assert len(json.dumps(listed, separators=(",", ":"))) <= 10_000


async def test_schemas_are_flat_closed_and_without_noise(listed: list[dict[str, Any]]):
    for tool in listed:
        schema = tool["inputSchema"]
        assert schema["additionalProperties"] is False
        text = json.dumps(schema)
        for noise in ("anyOf", "$ref", "$defs", '"title"', "null"):
            assert noise not in text, (tool["name"], noise)
        for name, described in schema["properties"].items():
            assert described["description"], (tool["name"], name)


async def test_every_tool_says_all_four_annotations(listed: list[dict[str, Any]]):
    for tool in listed:
        assert set(tool["annotations"]) == {"readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint"}


async def test_no_tool_has_an_output_schema(listed: list[dict[str, Any]]):
    # Several clients drop the picture where there is structured content.
    assert not [tool["name"] for tool in listed if "outputSchema" in tool]


async def test_the_models_offered_are_the_variants(listed: list[dict[str, Any]]):
    for tool in listed:
        if tool["name"] in PAINTING:
            assert tool["inputSchema"]["properties"]["model"]["enum"] == ["auto", *VARIANTS]


async def test_the_list_is_the_same_in_both_eras(connect: Any):
    async with connect(mode="legacy") as old, connect() as new:
        assert (await old.list_tools()).tools == (await new.list_tools()).tools


async def test_an_unknown_argument_is_an_error_with_the_nearest_one(client: Client):
    said = await refused(client, "generate_image", prompt="a dot", aspectratio="1:1")
    assert 'no argument "aspectratio". Did you mean aspect_ratio?' in said


async def test_an_unknown_tool_is_an_error_with_the_nearest_one(client: Client):
    assert "Did you mean generate_image?" in await refused(client, "generate_images")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "prompt is missing"),
        ({"prompt": ""}, 'prompt is ""; it must be text of 1 to 4000 characters'),
        ({"prompt": "  \n "}, "1 to 4000 characters"),
        ({"prompt": "x" * 4001}, "1 to 4000 characters"),
        ({"prompt": 7}, "prompt is 7; it must be text"),
        ({"prompt": "x", "width": 63, "height": 64}, "width is 63; it must be a whole number, 64 to 2048"),
        ({"prompt": "x", "width": 64, "height": 2049}, "height is 2049; it must be a whole number, 64 to 2048"),
        ({"prompt": "x", "width": 100}, "width came without height. Give both, or neither."),
        ({"prompt": "x", "height": 100}, "height came without width"),
        ({"prompt": "x", "width": "wide", "height": 64}, 'width is "wide"; it must be a whole number'),
        ({"prompt": "x", "count": 5}, "count is 5; it must be a whole number, 1 to 4"),
        ({"prompt": "x", "seed": -1}, "seed is -1; it must be a whole number, 0 to 9223372036854775807"),
        ({"prompt": "x", "seed": 2**63 - 1, "count": 2}, "leaves no room for 2 pictures"),
        ({"prompt": "x", "model": "klein4b"}, "Did you mean klein-4b?"),
        ({"prompt": "x", "aspect_ratio": "16-9"}, "Did you mean 16:9?"),
        ({"prompt": "x", "show": "yes"}, 'show is "yes"; it must be one of inline, link, none'),
    ],
)
async def test_a_wrong_argument_is_named_with_what_is_allowed(client: Client, arguments: dict[str, Any], said: str):
    assert said in await refused(client, "generate_image", **arguments)


@pytest.mark.parametrize("region", [[0, 0, 10], [0, 0, 0, 10], [-1, 0, 10, 10], [120, 0, 10, 10], "[0, 0, 999, 9]"])
async def test_a_region_that_does_not_fit_is_an_error(client: Client, region: Any):
    await call(client, "generate_image", prompt="a dot")
    said = await refused(client, "edit_image", image="last", prompt="x", region=region)
    assert "region" in said


async def test_what_clients_send_in_other_clothes_is_understood(client: Client, painter: FakePainter):
    """Numbers as text, lists as JSON text, null for what is left out."""
    await call(client, "generate_image", prompt="a dot", width="128", height="96", seed="5", count="1", show=None)
    await call(client, "edit_image", image="last", prompt="x", region="[0, 0, 32, 32]")
    assert (painter.jobs[0].width, painter.jobs[0].height, painter.jobs[0].seed) == (128, 96, 5)


async def test_a_seed_as_large_as_can_be_arrives_exactly(client: Client, painter: FakePainter):
    told = await call(client, "generate_image", prompt="a dot", seed=2**63 - 1)
    assert painter.jobs[0].seed == 2**63 - 1
    assert told["seed"] == "9223372036854775807"


@pytest.mark.parametrize("reference", ["k7f3q2", "no such thing", "last", "last~3", "klein://images/k7f3q2"])
async def test_a_reference_to_nothing_says_how_to_find_something(client: Client, reference: str):
    said = await refused(client, "edit_image", image=reference, prompt="x")
    assert "list_images" in said


async def test_too_many_references_are_refused_by_the_limit_of_the_model(client: Client):
    await call(client, "generate_image", prompt="a dot")
    assert "nano takes at most 3" in await refused(client, "compose_references", images=["last"] * 4, prompt="x")
    said = await refused(client, "compose_references", images=["last"] * 5, prompt="x")
    assert "images is" in said
    assert "it must be a list of 1 to 4 image references." in said


async def test_what_the_engine_says_reaches_the_model_word_for_word(client: Client, painter: FakePainter):
    painter.error = ModelNotFound("Model klein-4b is not installed.", hint="Run: klein-mcp pull klein-4b")
    said = await refused(client, "generate_image", prompt="x", model="klein-4b")
    assert said == "Model klein-4b is not installed. Run: klein-mcp pull klein-4b"


async def test_a_full_queue_says_when_to_try_again(client: Client, painter: FakePainter):
    painter.error = Busy("32 jobs are waiting; at most 32.", retry_after=7.0)
    assert "Try again in 7 s." in await refused(client, "generate_image", prompt="x")


async def test_a_bug_is_one_line_and_the_next_call_works(client: Client, painter: FakePainter):
    painted, painter.paint = painter.paint, lambda job: 1 / 0  # type: ignore[assignment,return-value]
    said = await refused(client, "generate_image", prompt="x")
    assert "ZeroDivisionError" in said
    painter.paint = painted
    await call(client, "generate_image", prompt="x")


async def test_after_every_kind_of_error_the_server_lives_on(client: Client, painter: FakePainter):
    painter.error = InvalidJob("steps is 0; it must lie in 1 … 200.")
    await refused(client, "generate_image", prompt="x")
    painter.error = None
    await refused(client, "view_image", image="k7f3q2")
    assert (await call(client, "generate_image", prompt="x"))["image"]


async def test_status_is_text_and_needs_no_picture(client: Client):
    told = await call(client, "engine_status")
    assert told["model_setting"] == "auto"
    assert told["model_in_use"] is None
    assert told["running"] is True


async def test_status_tells_the_model_in_use_apart_from_the_setting(
    client: Client, painter: FakePainter, monkeypatch: pytest.MonkeyPatch
):
    async def status() -> dict[str, Any]:
        return {"running": True, "engine": {"loaded": "klein-4b"}}

    monkeypatch.setattr(painter, "status", status)
    told = await call(client, "engine_status")
    assert (told["model_setting"], told["model_in_use"]) == ("auto", "klein-4b")
