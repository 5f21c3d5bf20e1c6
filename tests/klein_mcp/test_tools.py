"""The contents of tools/list, and the errors of wrong calls."""

import json
from dataclasses import replace
from typing import Any

import pytest
from mcp import Client

from engine.contract import Aspect, Busy, Exact, InvalidJob, KeepSource, ModelNotFound, Native
from engine.families.klein.variants import EMBEDDED, VARIANTS
from klein_mcp.errors import RequestError
from klein_mcp.mcp_server.tools import TOOLS
from tests.embedded import SIDE
from tests.fakes import FakeExecutor
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio

PAINTING = ("generate_image", "edit_image", "compose_references")


@pytest.fixture
async def listed(client: Client) -> list[dict[str, Any]]:
    tools = (await client.list_tools()).tools
    return [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]


async def test_tools_list_fits_its_size_limit(listed: list[dict[str, Any]]):
    assert len(json.dumps(listed, separators=(",", ":"))) <= 10_000


async def test_schemas_are_flat_closed_and_compact(listed: list[dict[str, Any]]):
    for tool in listed:
        schema = tool["inputSchema"]
        assert schema["additionalProperties"] is False
        text = json.dumps(schema)
        for noise in ("anyOf", "$ref", "$defs", '"title"', "null"):
            assert noise not in text, (tool["name"], noise)
        for name, described in schema["properties"].items():
            assert described["description"], (tool["name"], name)


async def test_every_tool_has_all_four_annotations(listed: list[dict[str, Any]]):
    for tool in listed:
        assert set(tool["annotations"]) == {"readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint"}


async def test_no_tool_has_an_output_schema(listed: list[dict[str, Any]]):
    # Several clients drop the image where there is structured content.
    assert not [tool["name"] for tool in listed if "outputSchema" in tool]


async def test_offered_models_are_the_installed_ones(listed: list[dict[str, Any]]):
    for tool in listed:
        if tool["name"] in PAINTING:
            assert tool["inputSchema"]["properties"]["model"]["enum"] == ["auto", "nano"]


async def test_tools_list_is_the_same_in_both_eras(connect: Any):
    async with connect(mode="legacy") as old, connect() as new:
        assert (await old.list_tools()).tools == (await new.list_tools()).tools


async def test_unknown_argument_is_an_error_with_the_nearest_name(client: Client):
    message = await refused(client, "generate_image", prompt="a dot", aspectratio="1:1")
    assert 'no argument "aspectratio". Did you mean aspect_ratio?' in message


@pytest.mark.parametrize(
    ("tool", "argument", "instead"),
    [
        ("generate_image", "size", "Give width and height, as numbers."),
        ("generate_image", "n", "Did you mean count?"),
        ("generate_image", "negative_prompt", "there is no negative prompt"),
        ("edit_image", "instruction", "Did you mean prompt?"),
        ("edit_image", "strength", "an edit keeps what it can"),
        ("save_image", "filename", "Did you mean path?"),
        ("save_image", "size_", "Did you mean size?"),
        ("list_images", "query", "Did you mean search?"),
        ("list_images", "steps", "It takes limit, search, cursor, image."),
    ],
)
def test_argument_of_another_tool_is_answered_with_ours(tool: str, argument: str, instead: str):
    with pytest.raises(RequestError) as refusal:
        TOOLS[tool].parse({argument: 1})
    assert instead in str(refusal.value)


def test_wrong_item_is_shown_in_its_list_with_what_the_list_means():
    with pytest.raises(RequestError) as refusal:
        TOOLS["edit_image"].parse({"image": "last", "prompt": "x", "region": [0.25, 0.25, 0.5, 0.5]})
    rule = "it must be a list of 4 whole numbers. [x, y, width, height] in pixels of the image."
    assert str(refusal.value) == f"region is [0.25, 0.25, 0.5, 0.5]; {rule}"
    with pytest.raises(RequestError, match=r"image is null; it must be text, not empty. A handle \(k7f3q2\), last,"):
        TOOLS["view_image"].parse({"image": None})


@pytest.mark.parametrize("images", ["{{}}", "[{[1]: 2}]", f"[{'9' * 400} + 1j]", "{'last', 'last~1'}", "{1: 2}"])
def test_text_that_is_no_list_is_refused_as_an_argument(images: str):
    with pytest.raises(RequestError, match="it must be a list of 1 to"):
        TOOLS["compose_references"].parse({"images": images, "prompt": "x"})


async def test_unknown_tool_is_an_error_with_the_nearest_name(client: Client):
    assert "Did you mean generate_image?" in await refused(client, "generate_images")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": ""}, "prompt is missing; it must be text, not empty"),
        ({"prompt": "  \n "}, "not empty"),
        ({"prompt": "x" * 4001}, "prompt has 4001 characters; at most 4000"),
        ({"prompt": 7}, "prompt is 7; it must be text"),
        ({"prompt": "x", "width": 63, "height": 64}, "width is 63; it must be a whole number, 64 to 2048"),
        ({"prompt": "x", "width": 64, "height": 2049}, "height is 2049; it must be a whole number, 64 to 2048"),
        ({"prompt": "x", "width": 100}, "width came without height. Give both, or neither."),
        ({"prompt": "x", "height": 100}, "height came without width"),
        ({"prompt": "x", "width": "wide", "height": 64}, 'width is "wide"; it must be a whole number'),
        ({"prompt": "x", "count": 5}, "count is 5; it must be a whole number, 1 to 4"),
        ({"prompt": "x", "seed": -2}, "seed is -2; it must be a whole number, 0 to 9007199254740991"),
        ({"prompt": "x", "seed": 2**53}, "it must be a whole number, 0 to 9007199254740991"),
        ({"prompt": "x", "seed": str(2**63 - 1), "count": 2}, "leaves no room for 2"),
        ({"prompt": "x", "seed": 2**53 - 1, "count": 2}, "leaves no room for 2 images; at most 9007199254740990"),
        ({"prompt": "x", "seed": 2**53 - 3, "count": 4}, "leaves no room for 4 images; at most 9007199254740988"),
        ({"prompt": "x", "model": "klein4b"}, "Did you mean klein-4b?"),
        ({"prompt": "x", "aspect_ratio": "16-9"}, "Did you mean 16:9?"),
        ({"prompt": "x", "show": "yes"}, 'show is "yes"; it must be one of inline, link, none'),
    ],
)
async def test_wrong_argument_is_named_with_its_allowed_values(client: Client, arguments: dict[str, Any], message: str):
    assert message in await refused(client, "generate_image", **arguments)


@pytest.mark.parametrize("region", [[0, 0, 10], [0, 0, 0, 10], [-1, 0, 10, 10], [120, 0, 10, 10], "[0, 0, 999, 9]"])
async def test_region_outside_the_image_is_an_error(client: Client, region: Any):
    await call(client, "generate_image", prompt="a dot")
    message = await refused(client, "edit_image", image="last", prompt="x", region=region)
    assert "region" in message


async def test_loosely_typed_arguments_are_understood(client: Client, painter: FakeExecutor):
    """Numbers as text, lists as JSON text, null for what is left out."""
    await call(client, "generate_image", prompt="a dot", width="128", height="96", seed="5", count="1", show=None)
    await call(client, "edit_image", image="last", prompt="x", region="[0, 0, 32, 32]")
    assert (painter.jobs[0].size, painter.jobs[0].seed) == (Exact(128, 96), 5)
    # A list of one, an earlier result, the address of its link.
    seen = await call(client, "view_image", image=["last"])
    assert (await call(client, "view_image", image={"image": seen["image"], "seed": "5"}))["image"] == seen["image"]
    both = [{"uri": f"klein://images/{seen['image']}"}, ["last~1"]]
    await call(client, "compose_references", images=both, prompt="image 1 beside image 2")
    assert len(painter.jobs[-1].references) == 2


async def test_largest_seed_arrives_exactly(client: Client, painter: FakeExecutor):
    payload = await call(client, "generate_image", prompt="a dot", seed=str(2**63 - 1))
    assert painter.jobs[0].seed == 2**63 - 1
    assert payload["seed"] == "9223372036854775807"


async def test_every_seed_of_a_sheet_can_be_asked_for_again(client: Client, painter: FakeExecutor):
    for asked in (2**53 - 4, str(2**63 - 4)):
        made = await call(client, "generate_image", prompt="a dot", seed=asked, count=4)
        for image in made["images"]:
            seed = int(image["seed"]) if isinstance(asked, int) else image["seed"]
            assert (await call(client, "generate_image", prompt="a dot", seed=seed))["seed"] == image["seed"]


@pytest.mark.parametrize("reference", ["k7f3q2", "no such thing", "last", "last~3", "klein://images/k7f3q2"])
async def test_unknown_reference_names_list_images(client: Client, reference: str):
    message = await refused(client, "edit_image", image=reference, prompt="x")
    assert "list_images" in message


async def test_reference_limit_is_the_models(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(VARIANTS, EMBEDDED, replace(VARIANTS[EMBEDDED], max_references=3))
    await call(client, "generate_image", prompt="a dot")
    assert "nano takes at most 3" in await refused(client, "compose_references", images=["last"] * 4, prompt="x")
    message = await refused(client, "compose_references", images=["last"] * 5, prompt="x")
    assert "images is" in message
    assert "it must be a list of 1 to 4 image references." in message


async def test_engine_error_reaches_the_model_word_for_word(client: Client, painter: FakeExecutor):
    painter.error = ModelNotFound("Model klein-4b is not installed.", hint="Run: klein-mcp pull klein-4b")
    message = await refused(client, "generate_image", prompt="x", model="klein-4b")
    assert message == "Model klein-4b is not installed. Run: klein-mcp pull klein-4b"


async def test_full_queue_says_when_to_try_again(client: Client, painter: FakeExecutor):
    painter.error = Busy("32 jobs are waiting; at most 32.", retry_after=7.0)
    assert "Try again in 7 s." in await refused(client, "generate_image", prompt="x")


async def test_internal_error_is_one_line_and_the_next_call_works(client: Client, painter: FakeExecutor):
    painted, painter.paint = painter.paint, lambda job: 1 / 0  # type: ignore[assignment,return-value]
    message = await refused(client, "generate_image", prompt="x")
    assert "ZeroDivisionError" in message
    painter.paint = painted
    await call(client, "generate_image", prompt="x")


async def test_server_survives_every_kind_of_error(client: Client, painter: FakeExecutor):
    painter.error = InvalidJob("steps is 0; it must lie in 1 … 200.")
    await refused(client, "generate_image", prompt="x")
    painter.error = None
    await refused(client, "view_image", image="k7f3q2")
    assert (await call(client, "generate_image", prompt="x"))["image"]


async def test_status_is_text_and_needs_no_image(client: Client):
    payload = await call(client, "engine_status")
    assert payload["model_setting"] == "auto"
    assert payload["model_in_use"] is None
    assert payload["running"] is True


async def test_status_separates_model_in_use_from_setting(client: Client, painter: FakeExecutor):
    await call(client, "generate_image", prompt="x")
    painter.model = "klein-4b"
    payload = await call(client, "engine_status")
    assert (payload["model_setting"], payload["model_in_use"]) == ("auto", "klein-4b")


async def test_seconds_per_image_is_one_of_the_seconds_by_model(client: Client, connect: Any):
    await call(client, "generate_image", prompt="x", model="nano")
    async with connect() as another:  # it has made no image itself
        payload = await call(another, "engine_status")
    assert payload["seconds_per_image"] == payload["seconds"]["nano"][f"{SIDE}x{SIDE}"] > 0


PLACEHOLDERS = {"aspect_ratio": "", "width": 0, "height": "0", "seed": -1, "model": "null", "show": "None"}


async def test_placeholders_of_optional_arguments_mean_nothing(client: Client, painter: FakeExecutor):
    await call(client, "generate_image", prompt="a dot", **PLACEHOLDERS)
    assert painter.jobs[0].size == Native()
    await call(client, "edit_image", image="last", prompt="x", mask="", region=[], seed="-1", background="Auto")
    assert painter.jobs[1].size == KeepSource()


@pytest.mark.parametrize("region", [[0, 0, 0, 0], "0,0,0,0", [5, 5, 0, 10], {"x": 0, "y": 0, "width": 0, "height": 0}])
async def test_region_without_area_is_refused(client: Client, painter: FakeExecutor, region: Any):
    await call(client, "generate_image", prompt="a dot")
    for tool, more in (("edit_image", {"prompt": "x"}), ("view_image", {})):
        assert "has no area" in await refused(client, tool, image="last", region=region, **more)
    assert len(painter.jobs) == 1


async def test_arguments_that_clients_add_are_ignored_with_a_warning(client: Client):
    payload = await call(client, "generate_image", prompt="a dot", sessionId="s", toolCallId="t")
    assert "ignored: sessionId, toolCallId, which your client adds" in payload["warnings"]
    assert "warnings" in await call(client, "engine_status", sessionId="s")


async def test_common_spellings_are_understood(client: Client, painter: FakeExecutor):
    await call(client, "generate_image", prompt="a dot", aspect_ratio="16x9 ", model="Nano", show="Inline")
    assert painter.jobs[0].size == Aspect(16, 9)
    await call(client, "compose_references", images="last, last~0", prompt="x", aspect_ratio="auto", count="1")
    await call(client, "view_image", image="last", max_size="64 px")
    # As small models write a list: Python's, not JSON.
    chain = await call(client, "edit_image", image="last", prompt="['make it red', \"don't stop\"]")
    assert len(chain["steps"]) == 2
    assert len(painter.jobs[1].references) == 2
    await call(client, "edit_image", image="last", prompt="x", region={"x": 0, "y": 0, "width": 16, "height": 16})
    for prompt, message in (("x" * 4001, "prompt has 4001 characters"), (["x", " "], "prompt 2 is empty")):
        assert message in await refused(client, "edit_image", image="last", prompt=prompt)


async def test_schemas_are_small_enough_for_grammars_and_exact_numbers(listed: list[dict[str, Any]]):
    """llama.cpp refuses repetitions in the thousands, JSON readers round over 2^53."""

    def numbers(schema: Any) -> list[int]:
        if isinstance(schema, dict):
            limits = [value for key, value in schema.items() if key in ("maxLength", "maxItems", "minLength")]
            assert all(limit <= 300 for limit in limits), schema
            return [number for value in schema.values() for number in numbers(value)]
        return [schema] if isinstance(schema, int) else []

    assert max(number for tool in listed for number in numbers(tool["inputSchema"])) < 2**53


async def test_many_unknown_arguments_are_counted_not_described(client: Client):
    message = await refused(client, "generate_image", prompt="x", **{f"a{number}": 0 for number in range(100_000)})
    assert "And 99997 more." in message
    assert len(message) < 2000


@pytest.mark.parametrize("tool", ["generate_image", "edit_image", "save_image", "view_image"])
async def test_background_other_than_transparent_is_refused_by_that_word(client: Client, tool: str):
    fitting = {"generate_image": {"prompt": "x"}, "save_image": {"image": "last", "path": "a.png"}}
    arguments = fitting.get(tool, {"image": "last"})
    message = await refused(client, tool, background="transperent", **arguments)
    assert 'background is "transperent"; it must be "transparent". Did you mean transparent?' in message


@pytest.mark.parametrize("tool", TOOLS)
def test_every_argument_of_a_wrong_type_is_refused_in_words(tool: str):
    """A prompt that may be a list had ended in an internal error wherever it was wrong."""
    parse, properties = TOOLS[tool].parse, TOOLS[tool].schema()["properties"]
    for name in properties:
        for value in ({"a": 1}, [{"a": 1}], [[1]]):
            with pytest.raises(RequestError) as refusal:
                parse({name: value})
            assert f"{name} is " in str(refusal.value), (name, value)
    with pytest.raises(RequestError, match="prompt is 7; it must be text or a list of them"):
        TOOLS["edit_image"].parse({"image": "last", "prompt": 7})
