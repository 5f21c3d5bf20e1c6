"""Paths and file: URLs as people and clients write them."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_mcp.images import paths

WINDOWS_ROOTS = {
    "file:///c%3A/Users/me/My%20Project": "c:/Users/me/My Project",
    "file:///C:/Users/me": "C:/Users/me",
    "file://C:/Users/me": "C:/Users/me",
    "file:///C|/Users": "C:/Users",
    "file://server/share/a%20b": "//server/share/a b",
    "file://wsl.localhost/Ubuntu/home/me": "//wsl.localhost/Ubuntu/home/me",
    "file:////server/share/x": "//server/share/x",
    "FILE:///c:/C%23%20project": "c:/C# project",
}


@pytest.mark.parametrize(("uri", "path"), WINDOWS_ROOTS.items())
def test_windows_roots_as_clients_send_them(uri: str, path: str):
    first = next(paths.candidates(uri, windows=True))
    assert first.as_posix() == path
    assert first.is_absolute()


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (r"C:\Users\me\a b.png", "/mnt/c/Users/me/a b.png"),
        ("d:/x.png", "/mnt/d/x.png"),
        ("file:///c%3A/Users/me/My%20Project", "/mnt/c/Users/me/My Project"),
        (r"\\wsl.localhost\Ubuntu\home\me\x.png", "/home/me/x.png"),
        ("file://wsl$/Ubuntu/home/me", "/home/me"),
        ("/home/me/x.png", "/home/me/x.png"),
    ],
)
def test_linux_within_windows_finds_the_files_of_both(text: str, path: str):
    assert next(paths.candidates(text, windows=False, wsl=True)).as_posix() == path


@pytest.mark.parametrize("name", ["C# project", "what?", "a%20b", "100%", "a b", "ünï", "plain", "a#b?c%23"])
@pytest.mark.parametrize("encoded", [True, False])
def test_root_is_found_however_its_url_was_built(tmp_path: Path, name: str, encoded: bool):
    folder = tmp_path / name
    folder.mkdir()
    uri = folder.as_uri() if encoded else f"file://{folder}"
    assert paths.folder_of(uri) == folder
    assert paths.folder_of(f"{uri}-missing") is None


@pytest.mark.parametrize("uri", ["file://", "file:///", "file:////", "file:///.."])
def test_root_that_is_the_whole_disk_opens_nothing(uri: str):
    assert paths.folder_of(uri) is None


def test_root_that_is_a_file_is_none(tmp_path: Path):
    (tmp_path / "file").touch()
    assert paths.folder_of((tmp_path / "file").as_uri()) is None


@pytest.mark.parametrize(
    "asked",
    [
        "Screenshot 2026-11-26 at 4.42.48 PM.png",
        "Screenshot 2026-11-26 at 4.42.48\u202fPM.png",
        "Screenshot 2026-11-26 at 4.42.48\u00a0PM.png",
    ],
)
def test_screenshot_of_macos_is_found_by_the_name_people_type(tmp_path: Path, asked: str):
    file = tmp_path / "Screenshot 2026-11-26 at 4.42.48\u202fPM.png"
    file.touch()
    assert paths.look_alike(tmp_path / asked) == file


def test_composed_and_decomposed_names_and_apostrophes_are_the_same(tmp_path: Path):
    folder = tmp_path / unicodedata.normalize("NFD", "Café")
    folder.mkdir()
    (folder / "it’s.png").touch()
    assert paths.look_alike(tmp_path / "Café" / "it's.png") == folder / "it’s.png"


def test_two_names_that_look_alike_are_not_guessed(tmp_path: Path):
    for blank in "\u00a0\u202f":
        (tmp_path / f"a{blank}b.png").touch()
    assert paths.look_alike(tmp_path / "a b.png") == tmp_path / "a b.png"


@pytest.mark.parametrize(
    "text", ['"/a b.png"', "'/a b.png'", "`/a b.png`", "@/a b.png", " /a b.png ", "<file:///a b.png>"]
)
def test_what_chats_and_terminals_add_is_removed(text: str):
    assert Path("/a b.png") in [Path(path) for path in paths.candidates(paths.unwrap(text))]


def test_escaped_blank_of_a_terminal_is_a_candidate():
    assert [str(path) for path in paths.candidates(r"/a\ b.png", windows=False)] == [r"/a\ b.png", "/a b.png"]


@pytest.mark.parametrize(
    "text", ["ftp://a/b.png", "data:image/png", "klein://images/x", "%TEMP%\\b.png", "${HOME}/b.png"]
)
def test_what_is_no_path_anywhere_is_recognised(text: str):
    assert paths.why_foreign(text, windows=False)
    assert paths.why_foreign(text, windows=True)
    assert "\n" not in paths.why_foreign(f"{text}\nIgnore this.", windows=True), "an error is one line"


@pytest.mark.parametrize("text", ["C:\\b.png", "c:/b.png", "\\\\server\\share\\b.png"])
def test_path_of_windows_is_one_only_there(text: str):
    assert paths.why_foreign(text, windows=False)
    assert not paths.why_foreign(text, windows=True)


@pytest.mark.parametrize(
    "text", ["b.png", "~/b.png", "file:///b.png", "take 2: b.png", "a:b.png", "$5 note.png", "a\\ b.png"]
)
def test_odd_names_are_paths(text: str):
    assert not paths.why_foreign(text, windows=False)


@given(st.text(max_size=60), st.booleans())
def test_no_text_raises(text: str, windows: bool):
    for prefix in ("", "file:", "file://", "file:///"):
        list(paths.candidates(paths.unwrap(prefix + text), windows=windows, wsl=not windows))
        paths.why_foreign(prefix + text, windows=windows)
