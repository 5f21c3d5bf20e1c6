"""Settings from the environment and config.toml, with errors of one line."""

import os
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from klein_mcp.settings import Settings, SettingsError, default_home, misspelled, table, user_home, variable


def load(home: Path, **environ: str) -> Settings:
    return Settings.load({"KLEIN_HOME": str(home), **environ})


def test_defaults_without_any_setting():
    assert Settings.load({}) == Settings(home=default_home())


def test_environment_overrides_file_overrides_default(tmp_path: Path):
    (tmp_path / "config.toml").write_text('model = "klein-4b"\nqueue_size = 5\nallow_urls = true\n')
    settings = load(tmp_path, KLEIN_QUEUE_SIZE="7")
    assert (settings.model, settings.queue_size, settings.allow_urls) == ("klein-4b", 7, True)


def test_file_may_contain_lists(tmp_path: Path):
    (tmp_path / "config.toml").write_text('read_roots = ["/a", "/b"]\nloras = ["/x.safetensors:0.5"]\n')
    settings = load(tmp_path)
    assert settings.read_roots == (Path("/a"), Path("/b"))
    assert settings.loras == ("/x.safetensors:0.5",)


def test_origins_are_read_as_browsers_write_them(tmp_path: Path):
    settings = load(tmp_path, KLEIN_CORS="http://App.example/, https://b.example:8443,null")
    assert settings.cors == ("http://app.example", "https://b.example:8443", "null")
    (tmp_path / "config.toml").write_text('cors = ["http://App.example/"]')
    assert load(tmp_path).cors == ("http://app.example",)


def test_path_lists_use_the_platforms_separator(tmp_path: Path):
    assert load(tmp_path, KLEIN_WRITE_ROOTS="/a:/b").write_roots == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("KLEIN_QUEUE_SIZE", "many", "a number of jobs, 1 to 100000"),
        ("KLEIN_WAIT_BUDGET", "-1", "seconds, 0 to 3600"),
        ("KLEIN_WAIT_BUDGET", "nan", "seconds, 0 to 3600"),
        ("KLEIN_SHOW", "big", "one of inline, link, none"),
        ("KLEIN_ALLOW_URLS", "maybe", "1 or 0"),
        ("KLEIN_READ_ROOTS", "pictures", "an absolute path"),
        *(("KLEIN_CORS", value, "each named") for value in ("*", "http://*", "app.example", "http://app.example/page")),
    ],
)
def test_bad_value_is_named_with_the_allowed_ones(tmp_path: Path, name: str, value: str, allowed: str):
    with pytest.raises(SettingsError, match=allowed) as caught:
        load(tmp_path, **{name: value})
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_key_in_the_file_is_an_error_with_a_suggestion(tmp_path: Path):
    for text, suggestion in {
        "queue_siez = 3": r"Did you mean queue_size\?",
        'KLEIN_MODEL = "nano"': r"Did you mean model\?",
        '[klein]\nmodel = "nano"': r"below no \[table\]",
        r'models = "C:\ComfyUI\models"': "backslashes in single quotes: models = 'C:",
        r'hub = "C:\new\tools"': "without control characters; config.toml takes backslashes in single quotes",
        "model = nano": 'Text needs quotes: model = "klein-4b"',
    }.items():
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(SettingsError, match=suggestion):
            load(tmp_path)


def test_file_that_is_no_toml_is_named(tmp_path: Path):
    (tmp_path / "config.toml").write_text("model = \n")
    with pytest.raises(SettingsError, match=r"config\.toml cannot be read"):
        load(tmp_path)


def test_settings_are_immutable(tmp_path: Path):
    with pytest.raises(FrozenInstanceError):
        load(tmp_path).model = "other"  # type: ignore[misc]


def test_table_has_a_row_for_every_setting():
    rows = list(table())
    assert [name for name, _, _ in rows] == [f"KLEIN_{field.name.upper()}" for field in fields(Settings)]
    assert all(meaning.endswith(".") for _, _, meaning in rows)


def test_hub_folder_follows_the_hubs_own_variables(tmp_path: Path):
    assert load(tmp_path).hub == Path("~/.cache/huggingface/hub").expanduser()
    assert load(tmp_path, XDG_CACHE_HOME="/c").hub == Path("/c/huggingface/hub")
    assert load(tmp_path, HF_HOME="/h", XDG_CACHE_HOME="/c").hub == Path("/h/hub")
    assert load(tmp_path, HF_HUB_CACHE="/d", HF_HOME="/h").hub == Path("/d")
    assert load(tmp_path, KLEIN_HUB="/e", HF_HUB_CACHE="/d").hub == Path("/e")
    assert load(tmp_path, HF_HUB_CACHE="~nobody-here/d").hub.name == "hub"


def test_hub_folder_is_read_as_the_hub_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIG", "/big")
    assert load(tmp_path, HF_HUB_CACHE="$BIG/hub").hub == Path("/big/hub")
    assert load(tmp_path, HF_HOME="${BIG}/hf").hub == Path("/big/hf/hub")
    assert load(tmp_path, HF_HOME="hf").hub == tmp_path / "hf" / "hub"


def test_lora_may_be_a_table_in_the_file(tmp_path: Path):
    (tmp_path / "config.toml").write_text('loras = [{name = "ink", scale = 0.8}, {path = "/oil.safetensors"}]\n')
    assert load(tmp_path).loras == ("ink:0.8", "/oil.safetensors:1")


def test_lora_in_a_list_may_have_a_comma_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('loras = ["/style, v2.safetensors", {path = "/a,b.safetensors", scale = 2}]')
    assert load(tmp_path).loras == ("/style, v2.safetensors", "/a,b.safetensors:2")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("KLEIN_MODLE", "KLEIN_MODEL"), ("KLEIN_LORA", "KLEIN_LORAS"), ("KLEIN_WAITBUDGET", "KLEIN_WAIT_BUDGET")],
)
def test_misspelled_variable_is_reported_with_a_suggestion(name: str, meant: str):
    assert list(misspelled({"PATH": "/bin", name: "1"})) == [(name, meant)]


def test_settings_and_foreign_variables_are_not_misspelled():
    ours = [variable(item.name) for item in fields(Settings)]
    assert not list(misspelled(dict.fromkeys([*ours, "KLEIN_DEV_VENV", "KLEIN_TEST_NODE", "KLEINE", "MODLE"], "1")))


def test_empty_roots_in_the_file_open_nothing(tmp_path: Path):
    (tmp_path / "config.toml").write_text("read_roots = []\nwrite_roots = []\n")
    assert (load(tmp_path).read_roots, load(tmp_path).write_roots) == ((), ())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_mark_of_windows_editors_is_skipped(tmp_path: Path, encoding: str):
    (tmp_path / "config.toml").write_text('model = "nano"\n', encoding=encoding)
    assert load(tmp_path).model == "nano"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("model = {a = 1}", "model in .* is {'a': 1}; it must be text"),
        ("queue_size = [1, 2]", "queue_size in .* it must be text"),
        ("read_roots = [[]]", "read_roots in .* it must be text"),
        ("a = " + "[" * 5000 + "]" * 5000, "nested too deep|cannot be read"),
        ("x" * 5_000_000, "it is over 4 MiB"),
    ],
)
def test_config_of_the_wrong_shape_is_one_short_line(tmp_path: Path, text: str, error: str):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(SettingsError, match=error) as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 300


@pytest.mark.skipif(os.name != "posix", reason="modes and FIFOs")
def test_config_that_others_may_write_and_fifos_are_refused(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text('model = "nano"\n')
    path.chmod(0o666)
    with pytest.raises(SettingsError, match=r"every user may write it; run: chmod o-w"):
        load(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SettingsError, match="not a regular file"):
        load(tmp_path)
    path.unlink()
    tmp_path.chmod(0o777)
    with pytest.raises(SettingsError, match=r"data folder .* every user may write it"):
        load(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="HOME")
def test_without_a_home_folder_klein_home_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert load(tmp_path).hub == tmp_path / "huggingface" / "hub"
    with pytest.raises(SettingsError, match="set HOME, or KLEIN_HOME"):
        Settings.load({})


def test_root_folder_is_no_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert user_home() is None
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert user_home() == Path("/home/me")


def test_home_folder_that_is_no_utf_8_is_refused():
    with pytest.raises(SettingsError, match="a path in UTF-8"):
        Settings.load({"KLEIN_HOME": "/tmp/\udcff"})
