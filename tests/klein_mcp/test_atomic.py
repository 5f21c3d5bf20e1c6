"""Atomic writes, also while somebody exchanges folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from klein_mcp.atomic import atomic_write, write_new_or_replace

posix = pytest.mark.skipif(os.name != "posix", reason="links and modes")


def test_missing_folders_are_made_and_nothing_is_left_beside(tmp_path: Path):
    write_new_or_replace(tmp_path, tmp_path / "a" / "b" / "c.png", b"1", overwrite=False)
    assert (tmp_path / "a" / "b" / "c.png").read_bytes() == b"1"
    assert os.listdir(tmp_path / "a" / "b") == ["c.png"]


def test_existing_file_is_replaced_only_if_allowed(tmp_path: Path):
    target = tmp_path / "c.png"
    target.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_new_or_replace(tmp_path, target, b"new", overwrite=False)
    assert target.read_bytes() == b"old"
    write_new_or_replace(tmp_path, target, b"new", overwrite=True)
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["c.png"]


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "絵" * 83 + ".png"])
def test_longest_name_of_a_file_system_is_written(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    write_new_or_replace(tmp_path, tmp_path / name, b"1", overwrite=False)
    monkeypatch.setattr("klein_mcp.atomic._HAS_DIR_FD", False)  # as on Windows
    write_new_or_replace(tmp_path, tmp_path / name, b"2", overwrite=True)
    assert (tmp_path / name).read_bytes() == b"2"
    assert os.listdir(tmp_path) == [name]


@posix
def test_replaced_file_keeps_its_mode(tmp_path: Path):
    target = tmp_path / "private.png"
    target.write_bytes(b"old")
    target.chmod(0o600)
    write_new_or_replace(tmp_path, target, b"new", overwrite=True)
    assert target.stat().st_mode & 0o777 == 0o600


@posix
def test_link_in_place_of_a_folder_is_not_followed(tmp_path: Path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (root / "a").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        write_new_or_replace(root, root / "a" / "c.png", b"1", overwrite=False)
    assert not list(outside.iterdir())


EXCHANGE = """
import ctypes, os, sys
root, = sys.argv[1:]
libc, AT_FDCWD, EXCHANGE = ctypes.CDLL(None, use_errno=True), -100, 2
a, link = os.path.join(root, "a").encode(), os.path.join(root, "link").encode()
print("ready", flush=True)
while True:
    libc.renameat2(AT_FDCWD, a, AT_FDCWD, link, EXCHANGE)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
def test_no_save_lands_outside_while_a_folder_is_exchanged_for_a_link(tmp_path: Path):
    """Before, 407 of 3,205 saves landed outside."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (root / "a").mkdir(parents=True)
    (root / "link").symlink_to(outside)
    process = subprocess.Popen([sys.executable, "-c", EXCHANGE, str(root)], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        process.stdout.readline()
        saved = 0
        for number in range(1000):
            try:
                write_new_or_replace(root, root / "a" / f"{number}.png", b"1", overwrite=False)
                saved += 1
            except OSError:
                continue
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
    assert not list(outside.iterdir())
    assert saved


@pytest.mark.parametrize("durable", [False, True])
def test_small_file_is_private(tmp_path: Path, durable: bool):
    atomic_write(tmp_path / "job.json", "{}", durable=durable)
    assert (tmp_path / "job.json").read_text() == "{}"
    if os.name == "posix":
        assert (tmp_path / "job.json").stat().st_mode & 0o777 == 0o600
