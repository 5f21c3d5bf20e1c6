"""Nothing generated is lost: locked or damaged index, missing or changed files."""

import contextlib
import hashlib
import os
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from klein_mcp.cli.doctor_files import check_library
from klein_mcp.errors import NotEnoughMemory, RequestError, UnknownImage
from klein_mcp.images import codec, schema
from klein_mcp.images.index import DATABASE
from klein_mcp.images.library import Record, Store
from klein_mcp.images.rebuild import repair
from klein_mcp.images.schema import LibraryBusy, LibraryDamaged
from klein_mcp.jobs.service import Service
from klein_mcp.settings import Settings
from klein_mcp.studio import views
from tests.images import file, pixels, scene
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio


LIKE_OURS = {"image": "k7f3q2", "prompt": "an attack", "request": {"tool": "edit_image"}}
"""A recipe as any file may hold it."""


def abandon(settings: Settings, recipe: dict[str, Any], folder: str = "incoming/0123456789abcdef") -> None:
    """Leave a file as a process of an older klein-mcp does that dies, or one without a row."""
    data = foreign_file(**recipe)
    name = hashlib.sha256(data).hexdigest()
    path = settings.library / folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder.startswith("incoming"):
        path.parent.with_suffix(".lock").touch()
    path.write_bytes(data)


def files_folder(recipe: dict[str, Any]) -> str:
    return f"files/{hashlib.sha256(foreign_file(**recipe)).hexdigest()[:2]}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries opened from now on do not wait long for another program."""
    monkeypatch.setattr(schema, "BUSY_TIMEOUT", 0.2)


async def refused_while_locked(client: Client, settings: Settings, kind: str) -> str:
    """Generate one image, and fail to save a second while another program holds the index."""
    await call(client, "generate_image", prompt="before", seed=1)
    with contextlib.closing(sqlite3.connect(settings.library / DATABASE)) as other:
        other.execute(f"BEGIN {kind}")
        return await refused(client, "generate_image", prompt="a cat", seed=7)


async def test_locked_index_keeps_the_image_for_the_next_start(impatient: None, client: Client, settings: Settings):
    message = await refused_while_locked(client, settings, "EXCLUSIVE")
    assert "Another program holds the image library" in message
    assert "with seed 7 is kept" in message
    store = Store(settings.library)
    _, record = store.everything()
    assert (record.prompt, record.recipe["seed"], record.tool) == ("a cat", "7", "generate_image")
    assert store.read(record)
    assert not list((settings.library / "unsaved").iterdir())
    store.close()


@pytest.mark.parametrize("sign", ["another image", "the kept one is asked for"])
async def test_image_kept_while_the_index_was_locked_appears(
    impatient: None, client: Client, service: Service, settings: Settings, sign: str
):
    message = await refused_while_locked(client, settings, "IMMEDIATE")
    kept = message.split("The image ")[1][:6]
    if sign == "another image":
        await call(client, "generate_image", prompt="after", seed=2)
        assert kept in [record.handle for record in service.store.everything()]
    assert (await call(client, "view_image", image=kept))["image"] == kept
    assert not list((settings.library / "unsaved").iterdir())


async def test_file_of_a_crashed_process_is_taken_in_by_its_recipe(
    client: Client, service: Service, settings: Settings
):
    facts = await call(client, "generate_image", prompt="a cat", seed=7)
    crash(service, settings, facts["image"])
    service.store.recovery.run()
    (found,) = service.store.everything()
    assert (found.handle, found.prompt, found.recipe["seed"]) == (facts["image"], "a cat", "7")
    assert service.store.read(found)


def crash(service: Service, settings: Settings, handle: str) -> Record:
    """Leave an image as a process does that dies between writing and recording it."""
    record = service.store.get(handle)
    crashed = settings.library / "incoming" / "0123456789abcdef"
    crashed.mkdir()
    crashed.with_suffix(".lock").touch()
    os.replace(service.store.path(record), crashed / f"{record.file}.png")
    service.store._index.write("DELETE FROM pictures WHERE handle = ?", handle)
    return record


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), NotEnoughMemory("There is not enough memory.")])
async def test_file_unreadable_for_the_moment_waits_for_the_next_start(
    client: Client, service: Service, settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*_: object) -> None:
        raise error

    record = crash(service, settings, (await call(client, "generate_image", prompt="a cat", seed=7))["image"])
    with monkeypatch.context() as patched:
        patched.setattr(*((codec, "decode") if isinstance(error, NotEnoughMemory) else (Path, "read_bytes")), fail)
        service.store.recovery.run()
    assert service.store.everything() == []
    service.store.recovery.run()
    assert service.store.read(service.store.get(record.handle))
    assert list((settings.library / "incoming").glob("0123456789abcdef*")) == []


def test_fault_of_ours_hinders_no_library_and_is_logged(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fault(*_: Any) -> None:
        raise AttributeError("a fault of ours")

    abandon(settings, LIKE_OURS)
    monkeypatch.setattr(codec, "decode", fault)
    Store(settings.library).close()
    assert "a fault of ours" in caplog.text


async def test_crashed_import_of_a_copy_makes_no_second_image(
    client: Client, service: Service, settings: Settings, tmp_path: Path
):
    original, copy = await with_copy(client, service, tmp_path)
    crash(service, settings, copy)
    service.store.recovery.run()
    assert [record.handle for record in service.store.everything()] == [original]


async def with_copy(client: Client, service: Service, folder: Path) -> tuple[str, str]:
    """Generate an image, and open its copy in another format."""
    service.settings = replace(service.settings, write_roots=(folder,))
    original = await call(client, "generate_image", prompt="a cat", seed=7)
    await call(client, "save_image", image="last", path="copy.jpg")
    copy = await call(client, "view_image", image=str(folder / "copy.jpg"))
    assert service.store.get(copy["image"]).parents == (original["image"],)
    return original["image"], copy["image"]


@pytest.mark.parametrize("older", ["original", "copy"])
@pytest.mark.parametrize("lost", ["index", "row", "index and names"])
async def test_repair_takes_a_copy_for_opened_and_not_for_its_original(
    client: Client, service: Service, settings: Settings, tmp_path: Path, older: str, lost: str
):
    original, copy = await with_copy(client, service, tmp_path)
    files = {handle: service.store.path(service.store.get(handle)) for handle in (original, copy)}
    for handle in (original, copy):
        service.store.readable_path(service.store.get(handle))
        os.utime(files[handle], (1e9, 1e9) if (handle == original) == (older == "original") else (1.5e9, 1.5e9))
    before = service.store.get(original)
    if lost == "row":
        service.store._index.write("DELETE FROM pictures WHERE handle = ?", copy)
        service.store._index.write("DELETE FROM parents WHERE child = ?", copy)
    service.close()
    if lost != "row":
        for path in settings.library.glob(f"{DATABASE}*"):
            path.unlink()
        (settings.library / DATABASE).write_bytes(b"garbage " * 1000)
    if lost == "index and names":
        shutil.rmtree(settings.library / "images")
    repair(settings.library)
    store = Store(settings.library)
    after = store.get(original)
    assert (after.file, after.tool, after.prompt) == (before.file, "generate_image", "a cat")
    (opened,) = (record for record in store.everything() if record.handle != original)
    store.close()
    assert (opened.tool, opened.parents, opened.prompt) == ("open", (original,), None)
    assert opened.file == files[copy].stem
    assert opened.recipe["made"]["image"] == original
    assert opened.handle == copy or lost == "index and names"


async def test_damaged_index_is_named_and_rebuilt_with_lineage(client: Client, service: Service, settings: Settings):
    first = await call(client, "generate_image", prompt="one", seed=1)
    second = await call(client, "edit_image", image="last", prompt="two", seed=2)
    service.close()
    for suffix in ("-wal", "-shm"):
        (settings.library / f"{DATABASE}{suffix}").unlink(missing_ok=True)
    (settings.library / DATABASE).write_bytes(b"garbage " * 1000)
    with pytest.raises(LibraryDamaged, match="doctor --repair"):
        Store(settings.library)
    assert "doctor --repair" in check_library(settings).todo
    result = repair(settings.library)
    assert (result.found, result.added, result.unreadable) == (2, 2, ())
    assert result.moved is not None
    assert result.moved.exists()
    store = Store(settings.library)
    assert store.get(second["image"]).parents == (first["image"],)
    assert store.get(first["image"]).prompt == "one"
    assert repair(settings.library).added == 0
    store.close()


def whole_index(service: Service) -> bytes:
    """Return the index in one file, beside which no change waits."""
    service.store._index.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    return service.store._index.path.read_bytes()


async def test_index_with_any_page_damaged_is_found_and_rebuilt(client: Client, service: Service, settings: Settings):
    made = [(await call(client, "generate_image", prompt="a cat", seed=seed))["image"] for seed in (1, 2)]
    service.store.picks.choose("an agent", made[0])
    service.store.note_saved(made[0], "/tmp/a.png")
    whole, size = whole_index(service), 4096
    service.close()
    for start in range(0, len(whole), size):
        broken = whole[:start] + os.urandom(size) + whole[start + size :]
        (settings.library / DATABASE).write_bytes(broken)
        assert "doctor --repair" in check_library(settings).todo, f"page {start // size + 1}"
        result = repair(settings.library)
        assert (result.added, result.moved is not None) == (2, True), f"page {start // size + 1}"
        assert check_library(settings).todo == ""
        store = Store(settings.library)
        store.check()
        assert {record.handle for record in store.everything()} == set(made)
        store.close()


@pytest.mark.parametrize("damage", [b"\xff", b"{"])
async def test_damaged_text_of_a_row_is_found_and_rebuilt(
    client: Client, service: Service, settings: Settings, damage: bytes
):
    handle = (await call(client, "generate_image", prompt="a cat"))["image"]
    service.store._index.write("UPDATE pictures SET recipe = CAST(? AS TEXT)", damage)
    with pytest.raises(LibraryDamaged):
        service.store.get(handle)
    service.close()
    assert repair(settings.library).moved
    with contextlib.closing(Store(settings.library)) as store:
        assert store.get(handle).prompt == "a cat"


async def test_doctor_names_files_that_are_not_in_the_index(client: Client, service: Service, settings: Settings):
    await call(client, "generate_image", prompt="a cat")
    service.close()
    for path in settings.library.glob(f"{DATABASE}*"):
        path.unlink()
    for found in ("1 files in {}, no index", "0 images in {}, 1 files that are not in its index"):
        check = check_library(settings)
        assert check.found == found.format(settings.library)
        assert "doctor --repair" in check.todo
        Store(settings.library).close()  # as any other command makes it
    repair(settings.library)
    assert check_library(settings).todo == ""


@pytest.mark.skipif(os.name != "posix", reason="Windows moves no open file")
async def test_running_process_follows_to_the_rebuilt_index(client: Client, service: Service, settings: Settings):
    first = await call(client, "generate_image", prompt="a cat", seed=1)
    whole_index(service)
    (settings.library / DATABASE).write_bytes(b"garbage " * 1000)
    assert repair(settings.library).moved
    second = await call(client, "generate_image", prompt="a dog", seed=2)
    assert (await call(client, "view_image", image=first["image"]))["image"] == first["image"]
    with contextlib.closing(Store(settings.library)) as other:
        assert {record.handle for record in other.everything()} == {first["image"], second["image"]}


async def test_missing_file_is_put_back_when_its_image_is_opened(client: Client, service: Service, tmp_path: Path):
    (tmp_path / "photo.png").write_bytes(file(scene(64, 48)))
    facts = await call(client, "view_image", image=str(tmp_path / "photo.png"))
    record = service.store.get(facts["image"])
    for damage in (Path.unlink, lambda path: path.write_bytes(b"other")):
        damage(service.store.path(service.store.get(record.handle)))
        assert not service.store.is_whole(service.store.get(record.handle))
        again = await call(client, "view_image", image=str(tmp_path / "photo.png"))
        assert again["image"] == facts["image"]
        assert (pixels(service.store.read(service.store.get(record.handle))) == scene(64, 48)).all()


@pytest.mark.skipif(os.name != "posix", reason="links and FIFOs")
@pytest.mark.parametrize("replacement", ["other image", "link", "FIFO"])
async def test_file_that_was_exchanged_is_not_shown(client: Client, service: Service, tmp_path: Path, replacement: str):
    facts = await call(client, "generate_image", prompt="a cat")
    record = service.store.get(facts["image"])
    path = service.store.path(record)
    path.unlink()
    if replacement == "other image":
        path.write_bytes(file(scene(64, 48)))
    elif replacement == "link":
        (tmp_path / "secret").write_text("secret")
        path.symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(path)
    with pytest.raises(UnknownImage, match=r"was changed|cannot be read"):
        service.store.read(record)
    assert "Restore it, or generate it again" in await refused(client, "view_image", image=record.handle)


async def test_full_disk_reports_the_seed_and_leaves_no_half_file(
    client: Client, service: Service, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("klein_mcp.images.files.os.fsync", full)
    message = await refused(client, "generate_image", prompt="a cat", seed=7)
    assert "No space left on device" in message
    assert "made with seed 7" in message
    assert not list((settings.library / "incoming").rglob("*.png"))


def foreign_file(**recipe: Any) -> bytes:
    from klein_mcp.images import codec

    return codec.encode(scene(64, 48), "png", recipe)


async def test_claim_of_a_foreign_file_is_no_lineage(client: Client, service: Service, tmp_path: Path):
    facts = await call(client, "generate_image", prompt="a cat")
    (tmp_path / "claim.png").write_bytes(foreign_file(image=facts["image"], seed="1", prompt="x"))
    opened = await call(client, "view_image", image=str(tmp_path / "claim.png"))
    assert service.store.get(opened["image"]).parents == ()


@pytest.mark.parametrize(
    "part",
    [
        {"parents": 5},
        {"parents": ["k7f3q2"]},
        {"parents": ["../../x"]},
        {"parents": [5]},
        {"seed": "9" * 5000},
        {"sheet": 5, "changed": {"share": 1, "box": 5}, "painted": "x"},
        {"request": {"tool": "edit_image", "region": 5}},
        {"request": {"tool": "edit_image", "images": 5}},
        {"request": {"tool": "open"}},
        {"request": 5},
    ],
    ids=lambda part: str(part)[:60],
)
async def test_hostile_recipe_hinders_no_recovery_repair_or_view(
    client: Client, service: Service, settings: Settings, part: dict[str, Any]
):
    recipe = LIKE_OURS | part
    abandon(settings, recipe)
    abandon(settings, recipe, files_folder(recipe))
    service.store.recovery.run()
    repair(settings.library)
    for record in service.store.everything():
        assert record.handle not in record.parents
        views.image_details(service.store, record.handle)
        views.library_page(service.store)
        await call(client, "view_image", image=record.handle)
        await call(client, "list_images", image=record.handle)
        await call(client, "edit_image", image=record.handle, prompt="warmer")


async def test_files_that_name_each_other_as_parents_make_no_circle(
    client: Client, service: Service, settings: Settings
):
    for image, parent in (("kkkkkk", "mmmmmm"), ("mmmmmm", "kkkkkk")):
        recipe = LIKE_OURS | {"image": image, "parents": [parent]}
        abandon(settings, recipe, files_folder(recipe))
    assert repair(settings.library).added == 2
    assert sorted(len(record.parents) for record in service.store.everything()) == [0, 1]
    await call(client, "edit_image", image="mmmmmm", prompt="warmer")


async def test_circle_in_a_library_ends_every_walk(client: Client, service: Service):
    one, two = [(await call(client, "generate_image", prompt=prompt))["image"] for prompt in ("one", "two")]
    for child, parent in ((one, two), (two, one)):
        service.store._index.write("INSERT INTO parents VALUES (?, 0, ?)", child, parent)
    history = (await call(client, "list_images", image=one))["history"]
    assert [step["image"] for step in history] == [two, one]
    assert len(views.image_details(service.store, one)["family"]) == 2
    await call(client, "edit_image", image=one, prompt="warmer")


@pytest.mark.parametrize("lost", ["process", "index"])
async def test_opened_file_is_never_taken_in_as_made_here(
    client: Client, service: Service, settings: Settings, tmp_path: Path, lost: str
):
    (tmp_path / "claim.png").write_bytes(foreign_file(**LIKE_OURS, seed="1"))
    opened = await call(client, "view_image", image=str(tmp_path / "claim.png"))
    made = service.store.get(opened["image"]).recipe["made"]
    if lost == "process":
        crash(service, settings, opened["image"])
        service.store.recovery.run()
        assert service.store.everything() == []
        return
    whole_index(service)
    (settings.library / DATABASE).write_bytes(b"garbage " * 1000)
    assert repair(settings.library).moved
    with contextlib.closing(Store(settings.library)) as store:
        (record,) = store.everything()
    assert (record.tool, record.prompt, record.recipe) == ("open", None, {"made": made})


async def test_recipe_of_a_foreign_file_is_cleaned(client: Client, service: Service, tmp_path: Path):
    recipe = {"prompt": "\ud800" + "x" * 60_000, "seed": float("nan"), "deep": [[[[[[[[1]]]]]]]], "many": [1] * 500}
    (tmp_path / "hostile.png").write_bytes(foreign_file(**recipe))
    opened = await call(client, "view_image", image=str(tmp_path / "hostile.png"))
    made = service.store.get(opened["image"]).recipe["made"]
    assert len(str(made)) < 10_000
    assert made["seed"] is None
    str(made).encode()
    await client.read_resource(f"klein://images/{opened['image']}/recipe")


async def test_list_shows_the_others_if_one_file_is_missing(
    client: Client, service: Service, settings: Settings, capsys: pytest.CaptureFixture[str]
):
    from klein_mcp.cli.list import list_images

    for seed in (1, 2):
        facts = await call(client, "generate_image", prompt="a cat", seed=seed)
    service.store.path(service.store.get(facts["image"])).unlink()
    assert list_images(settings, as_json=True) == 0
    assert '"path": null' in capsys.readouterr().out


def test_lock_of_another_program_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Store(tmp_path).close()
    other = sqlite3.connect(tmp_path / DATABASE)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(schema, "BUSY_TIMEOUT", 0.05)
    with pytest.raises((LibraryBusy, RequestError), match="Another program holds"):
        Store(tmp_path)
    other.close()


def test_pick_while_the_index_is_locked_is_one_line(impatient: None, tmp_path: Path):
    store = Store(tmp_path)
    other = sqlite3.connect(tmp_path / DATABASE)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LibraryBusy, match="Another program holds"):
        store.picks.choose("an agent", "abcdef")
    other.close()
    store.close()


async def test_pick_that_cannot_be_marked_costs_no_result(
    impatient: None, client: Client, service: Service, settings: Settings
):
    made = await call(client, "generate_image", prompt="a cat")
    service.store.picks.choose(service.store.get(made["image"]).client, made["image"])
    other = sqlite3.connect(settings.library / DATABASE)
    other.execute("BEGIN EXCLUSIVE")
    assert (await call(client, "view_image", image=made["image"]))["image"] == made["image"]
    other.close()
    assert "picked" in await call(client, "view_image", image=made["image"])


def test_doctor_names_images_without_a_file(settings: Settings, service: Service):
    assert check_library(replace(settings, home=settings.home / "none")).found == "empty"


async def test_repair_keeps_when_images_were_made(client: Client, service: Service, settings: Settings):
    """Files that were copied have the time of the copy: the recipe knows better, and order follows it."""
    made = [await call(client, "generate_image", prompt="a cat", seed=seed) for seed in (1, 2)]
    first, second = (service.store.get(facts["image"]) for facts in made)
    times = {record.handle: record.created for record in (first, second)}
    os.utime(service.store.path(first), (2e9, 2e9))
    os.utime(service.store.path(second), (1e9, 1e9))
    service.close()
    for path in settings.library.glob(f"{DATABASE}*"):
        path.unlink()
    (settings.library / DATABASE).write_bytes(b"garbage " * 1000)
    assert repair(settings.library).added == 2
    store = Store(settings.library)
    for record in store.everything():
        assert abs(record.created - times[record.handle]) < 2  # a recipe holds whole seconds
    store.close()


async def test_repair_orders_images_by_their_recipes(client: Client, service: Service, settings: Settings):
    await call(client, "generate_image", prompt="new", seed=1)
    old = codec.encode(
        scene(64, 48),
        "png",
        {"image": "kkkkkk", "created": "2020-02-03T04:05:06Z", "prompt": "old", "request": {"tool": "generate_image"}},
    )
    name = hashlib.sha256(old).hexdigest()
    lying = settings.library / "files" / name[:2] / f"{name}.png"
    lying.parent.mkdir(exist_ok=True)
    lying.write_bytes(old)
    service.close()
    for path in settings.library.glob(f"{DATABASE}*"):
        path.unlink()
    (settings.library / DATABASE).write_bytes(b"garbage " * 1000)
    repair(settings.library)
    store = Store(settings.library)
    first, second = store.everything()
    store.close()
    assert (first.prompt, second.prompt) == ("old", "new")
    assert first.created == 1580702706  # 2020-02-03T04:05:06Z


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which files are open")
async def test_open_lock_that_cannot_be_deleted_is_released_first(
    client: Client, service: Service, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    """Windows deletes no open file."""
    delete = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if str(path) in (os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()):
            raise PermissionError(13, "The process cannot access the file")
        delete(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    crash(service, settings, (await call(client, "generate_image", prompt="a cat", seed=7))["image"])
    service.store.recovery.run()
    assert list((settings.library / "incoming").glob("0123456789abcdef*")) == []
    own = service.store.files._own_folder()
    assert own.with_suffix(".lock").exists()
    service.close()
    assert list((settings.library / "incoming").glob(f"{own.name}*")) == []
