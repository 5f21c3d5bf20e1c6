"""A full or read-only disk: what is there can be listed, and room can be made."""

import errno
from pathlib import Path

import numpy as np
import pytest
from mcp import Client
from mcp.client.stdio import stdio_client

from engine.contract import image_hash
from klein_mcp.cli.info import info
from klein_mcp.cli.list import list_images
from klein_mcp.cli.prune import prune
from klein_mcp.images import codec
from klein_mcp.images.index import Index
from klein_mcp.images.library import Record, Store
from klein_mcp.images.schema import LibraryUnwritable, unwritable
from klein_mcp.settings import Settings
from tests.disks import fill, read_only, small_disk
from tests.real_server import real_server
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio


def add(store: Store, seed: int) -> Record:
    """Store an image of noise, which takes 48 KB."""
    image = np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    recipe = {"seed": str(seed)}
    record = store.put(
        codec.encode(image, "png", recipe),
        handle=store.new_handle(),
        pixels=image_hash(image),
        size=(128, 128),
        client="a client",
        tool="generate_image",
        recipe=recipe,
        prompt="noise",
    )
    store.readable_path(record)  # a link, which keeps the room of its file
    return record


def library(settings: Settings, images: int = 4) -> list[str]:
    """Make a library and close it."""
    store = Store(settings.library)
    made = [add(store, seed).handle for seed in range(images)]
    store.close()
    return made


def test_prune_frees_a_disk_that_is_full(tmp_path: Path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        settings = Settings(home=disk / "home")
        *old, newest = library(settings)
        fill(disk)
        assert prune(settings, max_size=60_000, yes=True) == 0
        store = Store(settings.library)
        assert [record.handle for record in store.everything()] == [newest]
        assert store.is_whole(store.get(newest))
        assert all(store.find(handle) for handle in old)
        add(store, 9)
        store.close()


def test_prune_frees_a_full_disk_beside_an_open_library(tmp_path: Path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        settings = Settings(home=disk / "home")
        library(settings)
        store = Store(settings.library)
        fill(disk)
        with pytest.raises(Exception, match="No space left"):
            add(store, 8)
        assert prune(settings, older_than=0, yes=True) == 0
        assert not store.everything()
        add(store, 9)
        store.close()


def test_full_disk_can_be_listed_and_later_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with small_disk(tmp_path / "disk", "1m") as disk:
        settings = Settings(home=disk / "home")
        made = library(settings)
        filler = fill(disk)
        store = Store(settings.library)
        assert [record.handle for record in store.everything()] == made
        with pytest.raises(LibraryUnwritable, match="klein-mcp prune"):
            store.note_saved(made[0], "/tmp/a.png")
        filler.unlink()
        store.note_saved(made[0], "/dev/null")
        store.close()
        store = Store(settings.library)
        assert store.saved_files(made[0]) == ["/dev/null"]
        store.close()


def test_read_only_library_can_be_listed_and_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with small_disk(tmp_path / "disk", "1m") as disk:
        settings = Settings(home=disk / "home")
        made = library(settings)
        with read_only(disk):
            assert list_images(settings) == 0
            assert info(settings, made[0]) == 0
            with pytest.raises(LibraryUnwritable, match="cannot be written: Read-only file system") as refusal:
                prune(settings, older_than=0, yes=True)
            assert refusal.value.hint == "Make its folder writable, or set KLEIN_HOME to a folder that is."
        assert made[0] in capsys.readouterr().out
        store = Store(settings.library)
        assert len(store.everything()) == len(made)
        assert all(map(store.is_whole, store.everything()))
        store.close()


def test_prune_spares_a_file_that_another_image_has(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    """Rows that cannot be written until a file is gone: any disk can play a full one."""
    store = Store(settings.library)
    first, second, third = (add(store, seed) for seed in (1, 1, 2))
    real = Index.execute

    def execute(index: Index, statement: str, *values: object) -> None:
        if statement.startswith("UPDATE") and store.files.path(third.file).exists():
            raise unwritable(index.path, OSError(errno.ENOSPC, "database or disk is full"))
        real(index, statement, *values)

    monkeypatch.setattr(Index, "execute", execute)
    store.delete([first.handle, third.handle])
    assert [record.handle for record in store.everything()] == [second.handle]
    assert store.is_whole(store.get(second.handle))
    store.close()


async def test_full_disk_without_an_engine_is_explained(tmp_path: Path):
    """Reading goes on, saving elsewhere works, and the rest says why it does not, and what to do."""
    with small_disk(tmp_path / "disk", "3m") as disk, real_server(disk / "home") as place:
        async with Client(place.stdio()) as client:
            made = await call(client, "generate_image", prompt="a cat on red", seed=1)
        place.run("-m", "klein_mcp", "stop")
        filler = fill(disk)
        with open(tmp_path / "stderr", "w+") as errors:
            transport = stdio_client(place.stdio(KLEIN_WRITE_ROOTS=str(tmp_path)), errlog=errors)
            async with Client(transport) as client:
                listed = await call(client, "list_images")
                assert [image["image"] for image in listed["images"]] == [made["image"]]
                message = await refused(client, "generate_image", prompt="a dog on blue", seed=2)
                assert "No space left on device" in message
                assert "klein-mcp prune" in message
                saved = await call(client, "save_image", image=made["image"], path=str(tmp_path / "cat.png"))
                assert "cannot be written" in " ".join(saved["warnings"])
                assert Path(saved["saved"]).read_bytes() == Path(made["path"]).read_bytes()
            errors.seek(0)
            assert "Traceback" not in errors.read()
        demo = place.run("-m", "klein_mcp", "demo", "--out", str(tmp_path / "demo"))
        assert demo.returncode == 1
        assert "No space left on device" in demo.stderr
        assert "klein-mcp prune" in demo.stderr
        filler.unlink()
