"""Jobs of front ends in the engine's process: shared, heard, left, cancelled."""

import asyncio
import json
import subprocess
import sys
from contextlib import aclosing
from dataclasses import asdict, replace

import pytest

from engine.contract import Busy, InvalidJob, Loading, Queued, Stage, Step
from klein_mcp.jobs.events import Done, ImageSaved, Listen, Progressed, Saving, Submitted, from_json
from klein_mcp.jobs.request import generate
from tests.klein_mcp.daemons import connection, daemons, gone, inner, run

pytestmark = pytest.mark.anyio


async def test_first_job_starts_the_daemon_and_passes_every_stage(front_end, tmp_path):
    events = await run(front_end)
    assert isinstance(inner(events[0]), Loading)
    kinds = [type(inner(event)) for event in events if not isinstance(inner(event), Loading)]
    assert kinds == [Submitted, Queued, Stage, Stage, Step, Step, Step, Step, Stage, Saving, ImageSaved, Done]
    assert len(daemons(tmp_path)) == 1


async def test_daemon_answers_while_it_loads_and_says_how_far_it_is(front_end):
    loading = []
    async with aclosing(front_end.run(generate("load=1.5"), client="me")) as events:
        async for event in events:
            seen = inner(event)
            if isinstance(seen, Loading) and seen.fraction:
                loading.append(seen.fraction)
                status = await front_end.status()
                assert status.queue.running
                assert not status.engine.loaded
            elif loading:
                break
    assert loading[0] == 0.5


async def test_full_queue_is_busy_with_seconds_to_retry(tmp_path, monkeypatch):
    monkeypatch.setenv("KLEIN_QUEUE_SIZE", "1")
    async with connection(tmp_path) as front_end:
        async with aclosing(front_end.run(generate("pause=0.2 steps=1000"), client="a")) as running:
            async for event in running:
                if isinstance(inner(event), Step):
                    break
            async with aclosing(front_end.run(generate("waits"), client="b")) as waiting:
                while not isinstance(event := inner(await anext(waiting)), Queued):
                    pass
                assert event == Queued(1)
                with pytest.raises(Busy, match="The queue is full: 1 images") as full:
                    await run(front_end, client="c")
                assert full.value.retry_after >= 1
        await front_end.stop()
        await gone(tmp_path)


async def test_second_job_finds_it_warm(front_end):
    await run(front_end)
    assert not [event for event in await run(front_end) if isinstance(inner(event), Loading)]


async def test_engine_error_arrives_in_its_own_words(front_end):
    with pytest.raises(InvalidJob, match=r"^You asked me to fail\. Ask for something else\.$"):
        await run(front_end, "fail")
    assert isinstance((await run(front_end))[-1], Done)


async def test_daemon_that_fails_to_make_its_engine_blocks_no_front_end(front_end, monkeypatch):
    monkeypatch.setenv("KLEIN_DEVICE", "broken")
    with pytest.raises(InvalidJob, match="no such device"):
        await run(front_end)
    monkeypatch.delenv("KLEIN_DEVICE")
    assert isinstance((await run(front_end))[-1], Done)


async def test_last_listener_to_leave_cancels_within_a_step(front_end):
    await run(front_end)
    async with aclosing(front_end.run(generate("pause=0.2 steps=1000"), client="me")) as events:
        async for event in events:
            if isinstance(inner(event), Step):
                break
    assert isinstance((await run(front_end))[-1], Done)
    assert [job.state for job in await front_end.list()] == ["done", "cancelled", "done"]
    assert (await front_end.status()).queue.done == 2


async def test_job_goes_on_while_one_of_two_listeners_is_left(front_end):
    await run(front_end)
    request = replace(generate("pause=0.05 steps=20"), partials=20)
    async with aclosing(front_end.run(request, client="me")) as first:
        submitted = await anext(first)
        async with aclosing(front_end.events(submitted.job, Listen(steps=True, partials=True))) as second:
            async for event in second:
                if isinstance(event, Progressed) and event.preview and event.partial:
                    break
            await first.aclose()
            assert isinstance([event async for event in second][-1], Done)


async def test_cancel_ends_a_job_for_every_listener(front_end):
    await run(front_end)
    async with aclosing(front_end.run(generate("pause=0.1 steps=1000"), client="me")) as events:
        submitted = await anext(events)
        await front_end.cancel(submitted.job)
        assert type([event async for event in events][-1]).__name__ == "Cancelled"
    assert (await front_end.job(submitted.job)).state == "cancelled"


async def test_submitted_job_that_nobody_hears_is_listened_to_later(front_end):
    job = await front_end.submit(generate("pause=0.1 steps=4"), client="me")
    assert isinstance([event async for event in front_end.events(job)][-1], Done)
    assert [each.job for each in await front_end.list()] == [job]


async def test_daemon_and_front_end_of_an_older_build_understand_how_to_listen(front_end):
    """An older daemon reads `preview`, `each` and `steps` alone, and an older front end sends nothing else."""
    sent = []

    async def remember(request):
        sent.append(request)

    front_end._client().event_hooks = {"request": [remember]}
    job = await front_end.submit(generate("a"), client="me")
    listen = Listen(preview=32, each=16, steps=True)
    now = [event async for event in front_end.events(job, listen)]
    request = sent[-1]
    old = {"preview": "32", "each": "16", "steps": "1"}
    assert {**request.url.params} == {"listen": json.dumps(asdict(listen)), **old}
    headers = {"authorization": request.headers["authorization"]}
    answer = await front_end._client().get(request.url.copy_with(params=old), headers=headers)
    assert answer.status_code == 200
    last = from_json(json.loads(answer.text.splitlines()[-1]))
    assert isinstance(last, Done)
    assert last.preview
    assert last == now[-1]


async def test_killed_front_end_takes_its_job_with_it(front_end, tmp_path):
    await run(front_end)
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from klein_mcp.jobs.request import generate; from tests.klein_mcp.daemons import connection\n"
        "async def main():\n"
        "    async with connection(Path(sys.argv[1])) as front_end:\n"
        "        request = generate('pause=0.2 steps=1000')\n"
        "        async for event in front_end.run(request, client='doomed'): print(event, flush=True)\n"
        "asyncio.run(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while "Step" not in process.stdout.readline():
        pass
    assert (await front_end.status()).queue.running
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(600):  # by itself the job would go on for 200 s
        if not (await front_end.status()).queue.running:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the job outlived its front end")
