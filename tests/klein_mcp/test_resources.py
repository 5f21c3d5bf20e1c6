"""Images as resources: listed, read within a message's limit, completed, and announced in both eras."""

import base64
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp.server.subscriptions import InMemorySubscriptionBus
from mcp.shared.exceptions import MCPError
from mcp_types import ResourceTemplateReference, SubscribeRequestParams

from engine.contract import Job, Rgb8
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import resources
from tests.fakes import FakeExecutor
from tests.images import file, noise, pixels, scene
from tests.tool_calls import call, refused
from tests.waiting import until

pytestmark = pytest.mark.anyio

ALL = "klein://images"
LISTED, UPDATED = "ResourceListChangedNotification", "ResourceUpdatedNotification"


async def read(client: Client, uri: str) -> Any:
    return (await client.read_resource(uri)).contents


async def test_each_image_is_listed_and_read_exactly(client: Client, painter: FakeExecutor):
    payload = await call(client, "generate_image", prompt="a red dot")
    listed = {resource.uri: resource for resource in (await client.list_resources()).resources}
    assert listed[f"klein://images/{payload['image']}"].title == "a red dot"
    (content,) = await read(client, f"klein://images/{payload['image']}")
    assert content.mime_type == "image/png"
    assert (pixels(base64.b64decode(content.blob)) == painter.paint(painter.jobs[0])).all()


async def test_preview_and_recipe_are_resources_of_their_own(client: Client):
    first = await call(client, "generate_image", prompt="a dot", seed=7)
    payload = await call(client, "edit_image", image="last", prompt="blue", seed=8)
    (content,) = await read(client, f"klein://images/{payload['image']}/preview")
    assert (content.mime_type, base64.b64decode(content.blob)[:2]) == ("image/jpeg", b"\xff\xd8")
    (content,) = await read(client, f"klein://images/{payload['image']}/recipe")
    recipe = json.loads(content.text)
    assert (recipe["seed"], recipe["parents"], recipe["request"]["prompt"]) == ("8", [first["image"]], "blue")
    (content,) = await read(client, ALL)
    assert [one["image"] for one in json.loads(content.text)] == [payload["image"], first["image"]]


async def test_small_rendition_is_made_once(client: Client, service: Service):
    uri = f"klein://images/{(await call(client, 'generate_image', prompt='a dot'))['image']}/thumb"
    (first,) = await read(client, uri)
    for path in service.settings.library.rglob("*.png"):
        path.unlink()
    assert await read(client, uri) == [first]


async def test_templates_name_every_readable_resource(client: Client):
    templates = {template.uri_template for template in (await client.list_resource_templates()).resource_templates}
    assert templates >= {f"{ALL}/{{handle}}", f"{ALL}/{{handle}}/preview", f"{ALL}/{{handle}}/recipe"}


async def test_image_too_large_for_a_message_is_read_smaller(client: Client, painter: FakeExecutor):
    def worst(job: Job) -> Rgb8:
        return noise(2048, 2048)

    painter.paint = worst
    payload = await call(client, "generate_image", prompt="noise", width=2048, height=2048)
    result = await client.read_resource(f"klein://images/{payload['image']}")
    assert len(result.model_dump_json(by_alias=True)) < 1_000_000
    smaller, exact = result.contents
    assert smaller.mime_type == "image/jpeg"
    assert json.loads(exact.text)["path"] == payload["path"]  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["zzzzzz", "zzzzzz/preview", "", "../secret", "{handle}"])
async def test_unknown_resource_is_a_protocol_error(client: Client, path: str):
    with pytest.raises(MCPError) as caught:
        await client.read_resource(f"{ALL}/{path}")
    assert caught.value.error.code == -32602


async def test_handles_are_completed_newest_first(client: Client):
    handles = [(await call(client, "generate_image", prompt=str(n)))["image"] for n in range(3)]
    reference = ResourceTemplateReference(type="ref/resource", uri=f"{ALL}/{{handle}}")
    found = await client.complete(reference, {"name": "handle", "value": ""})
    assert found.completion.values == handles[::-1]
    found = await client.complete(reference, {"name": "handle", "value": handles[1][:4]})
    assert handles[1] in found.completion.values
    assert all(value.startswith(handles[1][:4]) for value in found.completion.values)


async def test_legacy_client_is_notified_of_a_new_image(connect: Any):
    heard: list[str] = []

    async def hear(message: Any) -> None:
        heard.append(type(message).__name__)

    async with connect(mode="legacy", message_handler=hear) as client:
        assert client.server_capabilities.resources.list_changed
        assert client.server_capabilities.resources.subscribe
        await subscribe(client)
        for _ in range(2):
            await call(client, "generate_image", prompt="a dot")
        await until(lambda: len(heard) >= 4)
        assert heard == [LISTED, UPDATED] * 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            await client.unsubscribe_resource(ALL)
        heard.clear()
        for _ in range(2):  # whatever the first one brings too much comes before the second
            await call(client, "generate_image", prompt="a dot")
        await until(lambda: heard.count(LISTED) >= 2)
        assert heard == [LISTED] * 2


async def subscribe(client: Client) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, as all of the older protocol's subscriptions
        await client.subscribe_resource(ALL)


async def test_modern_client_is_notified_of_a_new_image(connect: Any):
    async with connect() as client:
        assert client.server_capabilities.resources.list_changed
        heard: list[str] = []
        async with client.listen(resources_list_changed=True, resource_subscriptions=[ALL]) as events:
            await call(client, "generate_image", prompt="a dot")
            with anyio.fail_after(120):
                async for event in events:
                    heard.append(type(event).__name__)
                    if len(heard) == 2:
                        break
    assert heard == ["ResourcesListChanged", "ResourceUpdated"]


async def test_imported_image_is_announced_once(connect: Any, tmp_path: Path):
    (tmp_path / "photo.png").write_bytes(file(scene(64, 48)))
    heard: list[str] = []

    async def hear(message: Any) -> None:
        heard.append(type(message).__name__)

    async with connect(mode="legacy", message_handler=hear) as client:
        for _ in range(2):
            await call(client, "view_image", image=str(tmp_path / "photo.png"))
        await subscribe(client)  # only notifications of the next image follow
        await call(client, "generate_image", prompt="a dot")
        await until(lambda: UPDATED in heard)
    assert heard == [LISTED, LISTED, UPDATED]


async def test_stuck_client_does_not_delay_notifications(monkeypatch: pytest.MonkeyPatch):
    class Connection:
        def __init__(self, reads: bool) -> None:
            self.reads = reads
            self.heard = 0

        async def send_resource_list_changed(self) -> None:
            if not self.reads:
                await anyio.sleep_forever()
            self.heard += 1

    monkeypatch.setattr(resources, "NOTIFY_TIMEOUT", 0.05)
    subscriptions = resources.ResourceSubscriptions(InMemorySubscriptionBus())
    stuck, other = Connection(reads=False), Connection(reads=True)
    for connection in (stuck, other):
        await subscriptions.subscribe(context_of(connection), SubscribeRequestParams(uri="klein://images/none"))
    with anyio.fail_after(120):
        await subscriptions.image_added("klein://images/k7f3q2")
    assert other.heard == 1


def context_of(connection: Any) -> Any:
    return SimpleNamespace(session=SimpleNamespace(_connection=connection))


async def test_deleted_image_says_when_it_was_deleted(client: Client, service: Service):
    payload = await call(client, "generate_image", prompt="a dot")
    service.store.delete([payload["image"]])
    assert "was deleted on" in await refused(client, "view_image", image=payload["image"])
    with pytest.raises(MCPError, match="was deleted on"):
        await client.read_resource(f"klein://images/{payload['image']}")
