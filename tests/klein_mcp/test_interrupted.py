"""Calls that fail partway name the images they had made, and an edit at its own size keeps what it may."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from mcp import Client

from engine.contract import Aspect, InvalidJob, Job, KeepSource, Rgb8
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest, compose, edit, generate
from klein_mcp.jobs.service import Service
from tests.fakes import FakeExecutor, painted
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio


def fails_from(seed: int) -> Callable[[Job], Rgb8]:
    """Paint images below a seed, and refuse the others."""

    def paint(job: Job) -> Rgb8:
        if job.seed >= seed:
            raise InvalidJob("This seed is cursed.", hint="Take another.")
        return painted(job)

    return paint


async def test_batch_that_fails_names_what_it_saved(client: Client, painter: FakeExecutor) -> None:
    painter.paint = fails_from(12)
    message = await refused(client, "generate_image", prompt="a dot", count=4, seed=10)
    listed = [each["image"] for each in (await call(client, "list_images"))["images"]]
    assert len(listed) == 2
    assert message == f"This seed is cursed. Take another. Saved before that: {', '.join(reversed(listed))}."
    # The first alone failed: there is nothing to name.
    assert "Saved" not in await refused(client, "generate_image", prompt="a dot", count=2, seed=20)


async def test_chain_that_fails_returns_the_steps_before(client: Client, painter: FakeExecutor) -> None:
    start = await call(client, "generate_image", prompt="a dot")
    painter.paint = lambda job: painted(job) if job.prompt == "one" else fails_from(0)(job)
    facts = await call(client, "edit_image", image=start["image"], prompt=["one", "two", "three"], preserve="off")
    assert [step["image"] for step in facts["steps"]] == [facts["image"]]
    assert facts["warnings"][0] == "stopped before step 2 of 3: This seed is cursed. Take another."
    assert "cursed" in await refused(client, "edit_image", image=start["image"], prompt=["two", "one"])


async def test_replay_that_waits_gives_the_calls_that_remain(
    client: Client, painter: FakeExecutor, service: Service
) -> None:
    start = await call(client, "generate_image", prompt="a dot")
    first = await call(client, "edit_image", image=start["image"], prompt="make it red", preserve="off")
    hat = {"prompt": "add a hat", "region": [0, 0, 64, 64], "preserve": "off", "seed": "7", "model": "nano"}
    edited = await call(client, "edit_image", image=first["image"], **hat)
    both = {"prompt": "image 1 beside image 2", "aspect_ratio": "16:9", "seed": "8", "model": "nano"}
    composed = await call(client, "compose_references", images=[edited["image"], first["image"]], **both)
    other = await call(client, "generate_image", prompt="a line")
    service.settings = replace(service.settings, wait_budget=0)
    painter.seconds_per_step = 30.0
    facts = await call(client, "edit_image", image=other["image"], again=composed["image"])
    assert facts["remaining"] == [
        {"tool": "edit_image", "image": "<image of step 1>", **hat},
        {"tool": "compose_references", "images": ["<image of step 2>", "<image of step 1>"], **both},
    ]
    assert facts["next"] == (
        f'wait_for_job with job "{facts["job"]}", then go on with the calls in `remaining`, "<image of step 1>" being '
        "the image of that job, and so on"
    )
    painter.hurry()
    service.settings = replace(service.settings, wait_budget=60)
    one = (await call(client, "wait_for_job", job=facts["job"]))["image"]
    two = (await call(client, **{**facts["remaining"][0], "image": one}))["image"]
    await call(client, **{**facts["remaining"][1], "images": [two, one]})
    assert [(job.prompt, job.seed, job.size) for job in painter.jobs[-2:]] == [
        ("add a hat", 7, KeepSource()),
        ("image 1 beside image 2", 8, Aspect(16, 9)),
    ]


async def test_replay_that_waits_names_what_no_tool_takes(
    client: Client, painter: FakeExecutor, service: Service
) -> None:
    me = CallContext("openai")

    async def made(wanted: ImageRequest) -> str:
        return (await service.run(wanted, me)).images[0].handle

    start, other = await made(generate("a dot")), await made(generate("a line"))
    first = await made(edit(start, "make it red", preserve="off", steps=3))
    two = replace(edit(first, "add image 2", preserve="off", steps=2, guidance=1.5), images=(first, other))
    second = await made(two)
    third = await made(replace(compose([second, other], "image 1 beside image 2"), size=KeepSource()))
    last = await made(edit(third, "add a hat", preserve="off"))
    service.settings = replace(service.settings, wait_budget=0)
    painter.seconds_per_step = 30.0
    facts = await call(client, "edit_image", image=other, again=last)
    assert [one["tool"] for one in facts["remaining"]] == ["edit_image", "compose_references", "edit_image"]
    assert facts["warnings"] == [
        f"step 2: `remaining` lacks reference {other}, steps 2, guidance 1.5, which no tool takes",
        "step 3: `remaining` lacks the size of its first reference, which no tool takes",
    ]


async def test_own_size_of_an_image_is_no_new_size(client: Client, painter: FakeExecutor) -> None:
    start = await call(client, "generate_image", prompt="a dot", width=160, height=96)
    for more in ({}, {"region": [0, 0, 64, 64]}):
        facts = await call(client, "edit_image", image=start["image"], prompt="red", width=160, height=96, **more)
        assert isinstance(painter.jobs[-1].size, KeepSource)
        assert "changed" in facts
    assert "changed" not in await call(client, "edit_image", image="last", prompt="red", width=96, height=96)


async def test_small_change_of_a_large_image_is_a_change(client: Client, painter: FakeExecutor) -> None:
    """400 of 1024² pixels are an eye, which nobody would call nothing."""
    start = await call(client, "generate_image", prompt="a face", width=1024, height=1024)

    def eye(job: Job) -> Rgb8:
        image = job.references[0].copy()
        image[500:520, 300:320] = 255 - image[500:520, 300:320]
        return image

    painter.paint = eye
    facts = await call(client, "edit_image", image=start["image"], prompt=["one", "two"], preserve="off")
    assert len(facts["steps"]) == 2
    assert not any("nothing visible" in warning for warning in facts.get("warnings", ()))
    assert [step["changed"]["box"] for step in facts["steps"]] == [[300, 500, 20, 20]] * 2
    painter.paint = lambda job: np.where(np.indices(job.references[0].shape)[0] == 3, 0, job.references[0]).astype("u1")
    facts = await call(client, "edit_image", image=start["image"], prompt="a line of one pixel", preserve="off")
    assert (facts["warnings"][0], facts["changed"]["box"]) == ("nothing visible changed", None)
