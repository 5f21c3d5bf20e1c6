"""The library commands, and replay of an image's history."""

import argparse
import io
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mcp import Client

from engine.contract import Job, OutOfMemory, Rgb8
from klein_mcp.cli.arguments import age, byte_size
from klein_mcp.cli.info import format_facts, info
from klein_mcp.cli.list import list_images
from klein_mcp.cli.main import main
from klein_mcp.cli.prune import prune, select_for_deletion
from klein_mcp.cli.records import expect_handle
from klein_mcp.cli.replay import run_replay
from klein_mcp.cli.terminal import error_line
from klein_mcp.errors import RequestError
from klein_mcp.images.library import Record
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.replay import plan, replay
from klein_mcp.jobs.service import Service
from klein_mcp.settings import Settings
from tests.fakes import FakeExecutor
from tests.images import file, pixels, scene
from tests.klein_mcp.test_photographs import photograph
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio

ME = CallContext("replay")


def printed_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def image_of(facts: dict[str, Any]) -> Any:
    return pixels(Path(facts["path"]).read_bytes())


@pytest.fixture
async def history(client: Client, service: Service, tmp_path: Path) -> list[dict[str, Any]]:
    """Make a photo, two edits of it, a new image, and a composition of both."""
    photo = tmp_path / "photo.png"
    photo.write_bytes(file(scene(64, 48)))
    first = await call(client, "edit_image", image=str(photo), prompt="one", seed=1)
    second = await call(client, "edit_image", image="last", prompt="two", seed=2, region=[8, 8, 40, 30])
    other = await call(client, "generate_image", prompt="other", seed=3)
    last = await call(client, "compose_references", images=[second["image"], other["image"]], prompt="both", seed=4)
    made = [first, second, other, last]
    return [{**facts, "parents": list(service.store.get(facts["image"]).parents)} for facts in made]


async def again(service: Service, handle: str, call: CallContext, **more: Any) -> list[Record]:
    """Replay `handle` and return the new images' records."""
    return [service.store.get(each.images[0].handle) for each in await replay(service, handle, call, **more)]


def pixels_of(service: Service, record: Record) -> Rgb8:
    return service.sources.pixels(record)


async def test_replay_reproduces_the_same_pixels(service: Service, history: list[dict[str, Any]]):
    made = await again(service, history[3]["image"], ME)
    assert [image.prompt for image in made] == ["one", "two", "other", "both"]
    for old, new in zip(history, made, strict=True):
        assert new.handle != old["image"]
        assert (pixels_of(service, new) == image_of(old)).all()
    assert made[3].parents == (made[1].handle, made[2].handle)


async def test_replay_onto_another_base_repeats_only_its_descendants(
    service: Service, history: list[dict[str, Any]], tmp_path: Path
):
    base = scene(64, 48)[::-1].copy()
    (tmp_path / "base.png").write_bytes(file(base))
    made = await again(service, history[3]["image"], ME, onto=str(tmp_path / "base.png"))
    assert [image.prompt for image in made] == ["one", "two", "both"]
    assert made[2].parents == (made[1].handle, history[2]["image"])
    assert not (pixels_of(service, made[0]) == image_of(history[0])).all()
    # The region held on the new base as well.
    assert (pixels_of(service, made[1])[:8] == pixels_of(service, made[0])[:8]).all()


async def test_replay_order_does_not_depend_on_the_clock(
    service: Service, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = itertools.count(2_000_000_000, -1)  # set back between any two images
    monkeypatch.setattr("klein_mcp.images.library.time.time", lambda: float(next(clock)))
    await call(client, "generate_image", prompt="base", seed=1)
    await call(client, "edit_image", image="last", prompt="one", seed=2)
    last = await call(client, "edit_image", image="last", prompt="two", seed=3)
    (tmp_path / "other.png").write_bytes(file(scene(128, 128)))
    made = await again(service, last["image"], ME, onto=str(tmp_path / "other.png"))
    assert [image.prompt for image in made] == ["one", "two"]
    assert made[1].parents == (made[0].handle,)


async def test_replay_with_a_seed_uses_it_for_every_step(
    service: Service, painter: FakeExecutor, history: list[dict[str, Any]]
):
    painter.jobs.clear()
    await replay(service, history[3]["image"], ME, seed=99)
    assert [job.seed for job in painter.jobs] == [99] * 4


async def test_replay_uses_the_original_model(service: Service, painter: FakeExecutor, history: list[dict[str, Any]]):
    painter.jobs.clear()
    await replay(service, history[0]["image"], ME)
    assert painter.jobs[0].model == "nano"


async def test_replay_uses_the_recorded_mode_and_names_another_format(
    service: Service, client: Client, painter: FakeExecutor
):
    painter.mode = "compiled"
    start = await call(client, "generate_image", prompt="base", seed=1)
    painter.mode, painter.dtype = "eager", "bfloat16"
    (result,) = await replay(service, start["image"], ME)
    assert painter.jobs[-1].mode == "compiled"
    assert result.images[0].mode == "compiled"
    assert f"{start['image']} was computed in float32, this in bfloat16: they may differ by rounding" in result.warnings
    # A replay of the replay asks for what made it, and one with another seed for nothing.
    await replay(service, result.images[0].handle, ME, seed=2)
    assert painter.jobs[-1].mode is None


async def test_replay_repeats_a_deleted_step_from_its_recipe(service: Service, history: list[dict[str, Any]]):
    expected = image_of(history[1])
    service.store.delete([history[0]["image"]])
    made = await again(service, history[1]["image"], ME)
    assert (pixels_of(service, made[-1]) == expected).all()


async def test_replay_onto_a_photograph_is_refused_before_its_first_step(
    service: Service, client: Client, painter: FakeExecutor, history: list[dict[str, Any]], tmp_path: Path
):
    (tmp_path / "photo.png").write_bytes(file(photograph()))
    painter.jobs.clear()
    with pytest.raises(RequestError, match="would repaint all of this photograph"):
        await replay(service, history[0]["image"], ME, onto=str(tmp_path / "photo.png"))
    message = await refused(client, "edit_image", image=str(tmp_path / "photo.png"), again=history[0]["image"])
    assert "would repaint all of this photograph and lose its detail. Replay it on a flat image" in message
    assert not painter.jobs


@pytest.fixture
def in_process(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands use the jobs of the test, which they do not close."""

    async def stay_open() -> None:
        pass

    monkeypatch.setattr(service.jobs, "aclose", stay_open)
    monkeypatch.setattr("klein_mcp.daemon.client.DaemonClient", lambda settings: service.jobs)


@pytest.mark.usefixtures("in_process")
async def test_replay_prints_the_warnings_of_its_steps(
    settings: Settings, painter: FakeExecutor, history: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    painter.paint = lambda job: job.references[0]
    await run_replay(settings, history[1]["image"], None, None, as_json=True)
    printed = capsys.readouterr()
    nothing = [f"klein-mcp: step {number}: nothing visible changed" for number in (1, 2)]
    assert set(nothing) <= set(printed.err.splitlines())
    steps = json.loads(printed.out)
    assert ["nothing visible changed" in facts["warnings"] for facts in steps] == [True, True]
    assert [Path(facts["path"]).stem for facts in steps] == [facts["image"] for facts in steps]


@pytest.mark.usefixtures("in_process")
async def test_replay_reads_any_file_that_the_person_names(
    settings: Settings, history: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "base.png").write_bytes(file(scene(64, 48)[::-1].copy()))
    monkeypatch.chdir(tmp_path)
    closed = replace(settings, read_roots=())
    assert await run_replay(closed, history[1]["image"], "base.png", None, as_json=True) == 0
    with pytest.raises(RequestError, match="nothere"):
        await run_replay(closed, history[1]["image"], "nothere.png", None, as_json=True)


async def test_replay_that_fails_names_the_images_it_made(
    service: Service, painter: FakeExecutor, history: list[dict[str, Any]]
):
    paint = painter.paint

    def fail_at_two(job: Job) -> Rgb8:
        if job.prompt == "two":
            raise OutOfMemory("The GPU is full.", hint="Close others.")
        return paint(job)

    painter.paint = fail_at_two
    with pytest.raises(OutOfMemory) as caught:
        await replay(service, history[3]["image"], ME)
    made = service.store.everything()[-1]
    assert made.prompt == "one"
    assert caught.value.hint == f"Close others. Saved before that: {made.handle}."


async def test_images_saved_before_an_error_follow_its_next_step(
    service: Service, painter: FakeExecutor, history: list[dict[str, Any]], tmp_path: Path
):
    paint, other = painter.paint, history[2]["image"]
    (tmp_path / "base.png").write_bytes(file(scene(64, 48)[::-1].copy()))

    def delete_at_two(job: Job) -> Rgb8:
        if job.prompt == "two":
            service.store.delete([other])
        return paint(job)

    painter.paint = delete_at_two
    with pytest.raises(RequestError, match="was deleted") as caught:
        await replay(service, history[3]["image"], ME, onto=str(tmp_path / "base.png"))
    made = ", ".join(record.handle for record in service.store.everything()[-2:])
    assert error_line(caught.value).endswith(f". klein-mcp list shows the others. Saved before that: {made}.")
    assert str(caught.value).endswith(f". Saved before that: {made}.")


async def test_replay_errors_say_why(service: Service, history: list[dict[str, Any]], client: Client):
    with pytest.raises(RequestError, match="was not made from another"):
        plan(service.store, history[2]["image"], onto=True)
    photo = history[0]["parents"][0]
    with pytest.raises(RequestError, match="was opened from a file"):
        plan(service.store, photo, onto=False)
    with pytest.raises(RequestError, match="There is no image"):
        plan(service.store, "zzzzzz", onto=False)


async def test_argument_that_is_no_handle_says_what_it_is(
    settings: Settings, service: Service, client: Client, history: list[dict[str, Any]], tmp_path: Path
):
    service.settings = replace(settings, write_roots=(tmp_path,))
    await call(client, "save_image", image=history[1]["image"], path=str(tmp_path / "out.png"))
    (tmp_path / "other.png").write_bytes(file(scene(48, 48)))
    for name, message in {
        "last~1": "last~1 is for MCP clients. klein-mcp list shows handles.",
        str(tmp_path / "out.png"): f"This takes a handle; that of {tmp_path}/out.png is {history[1]['image']}.",
        str(tmp_path / "other.png"): f"{tmp_path}/other.png is not in the library. klein-mcp list shows all.",
        "nofile.png": 'There is no file or handle "nofile.png". klein-mcp list shows handles.',
    }.items():
        with pytest.raises(RequestError) as caught:
            expect_handle(service.store, name)
        assert message in error_line(caught.value)
    with pytest.raises(RequestError, match="There is no file or handle"):
        info(settings, "nofile.png")


@pytest.mark.parametrize("words", [["info"], ["replay"], ["replay", "k7f3q2", "--onto"]])
def test_home_of_an_unknown_user_is_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("KLEIN_HOME", str(tmp_path))
    assert main([*words, "~nouser/x.png"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


async def test_deleted_image_is_not_named_as_in_the_library(
    settings: Settings,
    service: Service,
    client: Client,
    history: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    service.settings = replace(settings, write_roots=(tmp_path,))
    await call(client, "save_image", image=history[1]["image"], path=str(tmp_path / "out.jpg"))
    service.store.delete([history[1]["image"]])
    monkeypatch.setenv("HOME", str(tmp_path))
    info(settings, "~/out.jpg", as_json=True)
    facts = printed_json(capsys)
    assert facts["in_library"] is None
    assert facts["ancestors"] == [history[0]["image"], history[0]["parents"][0]]


async def test_list_shows_images_with_their_parents(
    settings: Settings, history: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    list_images(settings)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert history[3]["image"] in lines[0]
    assert "← " + " ".join(history[3]["parents"]) in lines[0]
    list_images(settings, search="two", as_json=True)
    assert [item["image"] for item in printed_json(capsys)] == [history[1]["image"]]
    info(settings, history[1]["image"], as_json=True)
    assert printed_json(capsys)["path"] == history[1]["path"]  # the name that results give, not that of the content
    list_images(settings, search="nothing like it")
    assert "no images with 'nothing like it'" in capsys.readouterr().out


async def test_info_reads_recipe_and_ancestors_of_a_file(
    settings: Settings,
    service: Service,
    client: Client,
    history: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    service.settings = replace(settings, write_roots=(tmp_path,))
    await call(client, "save_image", image=history[1]["image"], path=str(tmp_path / "out.jpg"))
    info(settings, str(tmp_path / "out.jpg"), as_json=True)
    facts = printed_json(capsys)
    assert facts["made_by_klein_mcp"]
    assert (facts["in_library"], facts["recipe"]["seed"]) == (history[1]["image"], "2")
    assert facts["ancestors"] == [history[0]["image"], history[0]["parents"][0]]
    info(settings, history[1]["image"])
    assert "prompt: two" in capsys.readouterr().out
    info(settings, str(tmp_path / "out.jpg"))
    lines = capsys.readouterr().out.splitlines()
    assert "made by klein mcp: yes" in lines
    assert lines.index("recipe:") < lines.index("  seed: 2")
    assert f"ancestors: {history[0]['image']}, {history[0]['parents'][0]}" in lines
    info(settings, str(tmp_path / "photo.png"), as_json=True)
    assert printed_json(capsys)["made_by_klein_mcp"] is False


def test_info_strips_control_characters_from_foreign_files():
    facts = {"prompt": "a cat\x1b[2J\x9b31m\nand a dog\u202e", "recipe": {"a\x1b[2J\nkey": ["\ud800", True]}}
    assert [*format_facts(facts)] == ["prompt: a cat[2J31m and a dog", "recipe:", "  a[2J key: ?, yes"]
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN} שלום"
    assert [*format_facts({"prompt": family, "recipe": {}})] == [f"prompt: {family}", "recipe: none"]
    deep: dict[str, Any] = {}
    for _ in range(50):
        deep = {"deeper": deep}
    assert len([*format_facts(deep)]) < 10


async def test_prune_asks_before_it_deletes(
    settings: Settings, service: Service, history: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    asked: list[str] = []

    def no(question: str) -> str:
        asked.append(question)
        return ""

    assert prune(settings, max_size=0, ask=no) == 1
    assert "Delete 5 images" in asked[0]
    assert capsys.readouterr() == ("", "klein-mcp: nothing was deleted\n")
    assert prune(settings, max_size=0, as_json=True, ask=no) == 1
    assert printed_json(capsys) == {"deleted": [], "bytes": 0}
    assert len(service.store.everything()) == 5
    assert prune(settings, max_size=0, ask=lambda _: "y") == 0
    assert service.store.everything() == []


@pytest.mark.parametrize("limit", [2**63 - 1, 10**30])
async def test_list_takes_any_limit_and_any_words(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, limit: int
):
    monkeypatch.setenv("KLEIN_HOME", str(settings.home))
    assert main(["list", "--limit", str(limit), "--search", "\udcff"]) == 0
    assert "no images" in capsys.readouterr().out


async def test_prune_without_a_terminal_needs_yes(settings: Settings, history: list[dict[str, Any]], service: Service):
    with pytest.raises(RequestError, match="Say --yes to delete them"):
        prune(settings, older_than=0.0)
    assert len(service.store.everything()) == 5


async def test_prune_takes_ctrl_d_for_no(
    settings: Settings,
    service: Service,
    history: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    ended = io.StringIO("")
    ended.isatty = lambda: True  # type: ignore[method-assign] - of this object alone
    monkeypatch.setattr("sys.stdin", ended)
    assert prune(settings, max_size=0, as_json=True) == 1
    assert "[y/N]" in capsys.readouterr().err
    assert len(service.store.everything()) == 5


async def test_prune_prints_json_for_scripts(
    settings: Settings, history: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    prune(settings, max_size=0, yes=True, as_json=True)
    assert len(printed_json(capsys)["deleted"]) == 5


@examples(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=20),
    st.none() | st.floats(0, 100),
    st.none() | st.integers(0, 500),
)
def test_prune_deletes_the_oldest_and_no_more_than_needed(
    images: list[tuple[float, int]], older_than: float | None, max_size: int | None
):
    now = time.time()
    records = [
        Record(str(n), "f", "p", 1, 1, size, now - age, "c", "t", None, None)
        for n, (age, size) in enumerate(sorted(images, reverse=True))
    ]
    gone = select_for_deletion(records, older_than=older_than, max_size=max_size, now=now)
    assert gone == records[: len(gone)]
    remaining = records[len(gone) :]
    if max_size is not None:
        assert sum(record.bytes for record in remaining) <= max_size
    if older_than is not None:
        assert all(now - record.created <= older_than for record in remaining)
    if gone:
        last = gone[-1]
        too_old = older_than is not None and now - last.created > older_than
        assert too_old or (max_size is not None and sum(record.bytes for record in (last, *remaining)) > max_size)


@pytest.mark.parametrize(("text", "seconds"), [("12h", 43200), ("30d", 2592000), ("1.5W", 907200), ("1y", 31536000)])
def test_ages_are_read(text: str, seconds: float):
    assert age(text) == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize(("text", "count"), [("500", 500), ("500MB", 5e8), ("5 gb", 5e9), ("1.5k", 1500)])
def test_sizes_are_read(text: str, count: float):
    assert byte_size(text) == count


@pytest.mark.parametrize("text", ["", "soon", "-1d", "5", "d"])
def test_wrong_age_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="no age like"):
        age(text)


@pytest.mark.parametrize("text", ["", "big", "-1", "5 hours", f"{10**400}GB"])
def test_wrong_size_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="no size like"):
        byte_size(text)
