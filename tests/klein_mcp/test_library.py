"""The library keeps what it promised: through restarts, upgrades, many processes, and death at any instant."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from klein_mcp.errors import RequestError, UnknownImage
from klein_mcp.images import files as image_files
from klein_mcp.images import index, schema
from klein_mcp.images.library import Record, Store


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "library")
    yield store
    store.close()


def put(store: Store, data: bytes = b"pixels", **more: object) -> Record:
    details: dict[str, object] = {"client": "me", "tool": "generate_image", "recipe": {}, "pixels": data.hex(), **more}
    return store.put(data, handle=store.new_handle(), size=(8, 8), **details)  # type: ignore[arg-type]


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "files").rglob("*") if path.is_file()]


def left_over(folder: Path) -> list[Path]:
    return list((folder / "incoming").iterdir())


def test_what_was_put_is_found_after_restart(library: Store):
    put(library, b"first")
    record = put(library, b"second", parents=["aaaaaa"], prompt="a dot", recipe={"seed": "5"}, source="/x.png")
    library.close()
    again = Store(library.folder)
    assert again.get(record.handle) == record
    assert again.read(again.get(record.handle)) == b"second"
    assert left_over(library.folder) == []
    again.close()


def test_library_whose_disk_went_away_is_not_an_empty_one(library: Store):
    record = put(library)
    library.folder.rename(library.folder.with_name("elsewhere"))
    assert [each.handle for each in library.everything()] == [record.handle]
    assert not library.folder.exists()


def test_equal_files_are_stored_once_until_the_last_image_is_deleted(library: Store):
    one, other = put(library, b"same"), put(library, b"same")
    assert one.handle != other.handle
    assert len(files(library.folder)) == 1
    library.delete([one.handle])
    assert library.read(library.get(other.handle)) == b"same"
    library.delete([other.handle])
    assert files(library.folder) == []


def test_each_new_name_is_on_disk_before_handle_is_returned(library: Store, monkeypatch: pytest.MonkeyPatch):
    synced: list[Path] = []
    monkeypatch.setattr(image_files, "_sync_folder", synced.append)
    put(library)
    ours = next(path for path in left_over(library.folder) if path.is_dir())
    # Each folder after something was made in it: ours, the file in it. From there the next start would move it.
    assert synced == [ours.parent, ours]


def test_handles_are_short_random_and_easy_to_read_aloud(library: Store):
    handles = {library.new_handle() for _ in range(200)}
    assert len(handles) == 200
    assert all(len(handle) == 6 and handle[0].isalpha() and handle.isalnum() for handle in handles)
    assert not set("".join(handles)) & set("01oilu")


def test_handle_is_never_given_out_twice_even_when_its_image_is_gone(library: Store, monkeypatch: pytest.MonkeyPatch):
    record = put(library)
    library.delete([record.handle])
    letters = iter(record.handle + "zzzzzz")
    monkeypatch.setattr(index.secrets, "choice", lambda _: next(letters))
    assert library.new_handle() == "zzzzzz"


def test_deleted_image_is_named_with_its_day_and_its_lineage_stays(library: Store):
    parent = put(library, b"parent")
    child = put(library, b"child", parents=[parent.handle])
    library.delete([parent.handle])
    with pytest.raises(UnknownImage, match=r"was deleted on \d{4}-\d\d-\d\d"):
        library.get(parent.handle)
    assert library.get(child.handle).parents == (parent.handle,)
    assert library.find(parent.handle) is not None


def test_unknown_handle_gets_nearest_one(library: Store):
    record = put(library)
    with pytest.raises(UnknownImage, match=f"Did you mean {record.handle}?"):
        library.get(record.handle[:-1])


def test_file_somebody_took_away_is_error_that_names_it(library: Store):
    record = put(library)
    library.path(record).unlink()
    with pytest.raises(UnknownImage, match="The file of"):
        library.read(record)


def test_latest_counts_back_what_client_painted(library: Store):
    painted = [put(library, str(n).encode()) for n in range(3)]
    put(library, b"opened", tool="open")
    put(library, b"theirs", client="other")
    found = [library.latest("me", back) for back in range(4)]
    assert [one.handle if one else None for one in found] == [*(one.handle for one in reversed(painted)), None]


def test_many_processes_save_at_once_and_nothing_is_lost(tmp_path: Path):
    writers = [_writer(tmp_path, count=15) for _ in range(4)]
    handles = [line.split()[0] for writer in writers for line in writer.communicate(timeout=300)[0].split("\n") if line]
    assert len(set(handles)) == 60
    store = Store(tmp_path)
    for handle in handles:
        assert store.read(store.get(handle)).startswith(b"image")
    assert left_over(tmp_path) == []
    store.close()


def test_many_threads_share_one_store(library: Store):
    found: list[str] = []

    def work(number: int) -> None:
        for step in range(10):
            record = put(library, f"{number} {step}".encode())
            found.append(library.read(library.get(record.handle)).decode())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 60


def test_older_library_is_brought_up_to_date_with_all_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = Store(tmp_path)
    record = put(old)
    old.close()
    added = "ALTER TABLE pictures ADD COLUMN stars INTEGER; UPDATE pictures SET stars = 5;"
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, added))
    new = Store(tmp_path)
    assert new.get(record.handle) == record
    assert new._index.row("SELECT stars FROM pictures") == (5,)
    new.close()
    new = Store(tmp_path)  # and only once
    new.close()


def test_upgrade_that_fails_leaves_library_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = Store(tmp_path)
    record = put(old)
    old.close()
    with monkeypatch.context() as patched:
        patched.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE more (x); CREATE TABLE more (x);"))
        with pytest.raises(sqlite3.OperationalError):
            Store(tmp_path)
    old = Store(tmp_path)
    assert old.get(record.handle) == record
    old.close()


def test_newer_library_is_not_touched(tmp_path: Path):
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "library.sqlite3") as database:
        database.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    with pytest.raises(RequestError, match="written by a newer klein-mcp"):
        Store(tmp_path)


@pytest.mark.parametrize("moment", ["landed", "committed"])
def test_interrupted_save_is_finished_or_removed_by_next_start(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
):
    class Death(BaseException):
        pass

    def die(*_: object) -> None:
        raise Death

    dying = Store(tmp_path)
    dying_in, name = (dying._index, "insert") if moment == "landed" else (dying.files, "move")
    monkeypatch.setattr(dying_in, name, die)
    with pytest.raises(Death):
        put(dying, b"unlucky")
    assert dying.files._claim is not None
    dying.files._claim.release()  # as the system does for the dead
    other = Store(tmp_path)
    found, _ = other.search(limit=10)
    assert len(found) == (0 if moment == "landed" else 1)
    assert [other.read(record) for record in found] == [b"unlucky"] * len(found)
    assert len(files(tmp_path)) == len(found)
    assert left_over(tmp_path) == []
    other.close()


def test_image_can_be_read_before_its_file_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another front end may see the row in the moment between commit and move."""
    writer, reader = Store(tmp_path), Store(tmp_path)
    monkeypatch.setattr(writer.files, "move", lambda landed: None)
    record = put(writer, b"on its way")
    assert reader.read(reader.get(record.handle)) == b"on its way"
    reader.close()
    writer.close()


def test_deletion_that_was_cut_off_is_finished_by_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path)
    record = put(store)
    monkeypatch.setattr(store.recovery, "finish_deletions", lambda: None)
    store.delete([record.handle])
    assert len(files(tmp_path)) == 1
    store.close()
    Store(tmp_path).close()
    assert files(tmp_path) == []


class Library(RuleBasedStateMachine):
    """Any order of saves, deletions and restarts: the library holds what a plain dictionary would."""

    @initialize(folder=st.builds(lambda: _fresh()))
    def open(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder)
        self.expected: dict[str, bytes] = {}
        self.ever: set[str] = set()

    @rule(data=st.binary(min_size=1, max_size=3), clash=st.booleans())
    def save(self, data: bytes, clash: bool) -> None:
        parents = list(self.expected)[:2] if clash else []
        record = put(self.store, data, parents=parents)
        assert record.handle not in self.ever
        self.ever.add(record.handle)
        self.expected[record.handle] = data

    @rule(pick=st.randoms(use_true_random=False))
    def delete(self, pick: random.Random) -> None:
        if self.expected:
            handle = pick.choice(sorted(self.expected))
            self.store.delete([handle])
            del self.expected[handle]

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store(self.folder)

    @invariant()
    def holds_what_it_should(self) -> None:
        if hasattr(self, "store"):
            found, _ = self.store.search(limit=1000)
            assert {record.handle: self.store.read(record) for record in found} == self.expected
            assert len(files(self.folder)) == len(set(self.expected.values()))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


TestLibrary = Library.TestCase
TestLibrary.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


def _fresh() -> Path:
    return Path(tempfile.mkdtemp(prefix="klein-store-"))


# -- killed for real ---------------------------------------------------------------------------------------------

WRITER = """
import os, sys
from pathlib import Path
from klein_mcp.images.library import Store
store = Store(Path(sys.argv[1]))
for n in range(int(sys.argv[2])):
    data = b"image %d %d " % (os.getpid(), n) + os.urandom(20_000)
    record = store.put(data, handle=store.new_handle(), pixels=str(n), size=(8, 8), client="c", tool="t", recipe={})
    sys.stdout.write(f"{record.handle} {record.file}\\n")
    sys.stdout.flush()
store.close()
"""


def _writer(folder: Path, count: int) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(count)], stdout=subprocess.PIPE, text=True)


@pytest.mark.crash
def test_two_hundred_kills_during_saves_lose_nothing_and_leave_nothing_behind(tmp_path: Path):
    promised: dict[str, str] = {}
    chance = random.Random(0)
    for _ in range(200):
        writer = _writer(tmp_path, 1_000_000)
        assert writer.stdout is not None
        # Mostly between saves; now and then while the library is being opened and mended.
        first = writer.stdout.readline() if chance.random() < 0.8 else ""
        time.sleep(chance.uniform(0, 0.05) if first else chance.uniform(0, 0.3))
        os.kill(writer.pid, signal.SIGKILL)
        lines = [first, *writer.stdout.read().split("\n")]
        writer.wait()
        # A line cut off in the middle was not returned.
        promised |= dict(line.split() for line in lines if len(line.split()) == 2 and len(line.split()[1]) == 64)
    store = Store(tmp_path)
    for handle, name in promised.items():
        data = store.read(store.get(handle))
        assert data.startswith(b"image")
        assert store.get(handle).file == name
    known = {record.file for record in store.everything()}
    assert {path.stem for path in files(tmp_path)} == known
    assert left_over(tmp_path) == []
    assert len(promised) >= 150
    store.close()
