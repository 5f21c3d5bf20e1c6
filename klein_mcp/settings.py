"""Settings, read from the environment and `config.toml` only here.

`KLEIN_<FIELD>` in the environment wins over `<field>` in `config.toml` in the home folder, which wins over the default.
"""

import contextlib
import difflib
import logging
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from engine.contract import EngineConfig
from klein_mcp import __version__
from klein_mcp.private import check_folder, read_private_text

log = logging.getLogger(__name__)


class SettingsError(Exception):
    """A setting with a value that is not allowed, in one line."""


def _text(value: str) -> str:
    return value


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return parse


def _number(kind: type, low: float, high: float, unit: str) -> Callable[[str], Any]:
    def parse(value: str) -> Any:
        try:
            number = kind(value)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise ValueError(f"a number of {unit}, {low:.0f} to {high:.0f}")
        return number

    return parse


def _credentials(value: str) -> str:
    if value in ("off", "local"):
        return value
    try:
        return str(_path(value))
    except ValueError:
        raise ValueError("off, local, or an absolute path") from None


def _flag(value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("1 or 0")


def _path(value: str) -> Path:
    try:
        path = Path(value).expanduser()
        value.encode()
    except RuntimeError:
        raise ValueError("a path that does not begin with an unknown user") from None
    except UnicodeError:
        raise ValueError("a path in UTF-8") from None
    if re.search(r"[\x00-\x1f\x7f]", value):  # what "C:\new\tools" is to TOML
        raise ValueError("a path without control characters; config.toml takes backslashes in single quotes")
    if not path.is_absolute():
        # Desktop clients start servers in an arbitrary folder, so a relative path would change its meaning.
        raise ValueError("an absolute path")
    return path


def _optional_path(value: str) -> Path | None:
    return _path(value) if value else None


def _paths(value: str) -> tuple[Path, ...]:
    return tuple(_path(part) for part in value.split(os.pathsep) if part)


def _words(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^\s/?#*]+")


def _origins(value: str) -> tuple[str, ...]:
    """Return origins as browsers write them, in lower case without a slash."""
    origins = tuple(origin.lower().removesuffix("/") for origin in _words(value))
    if not all(map(_ORIGIN.fullmatch, origins)):
        raise ValueError("origins such as http://localhost:3000, comma-separated, each named: * is none")
    return origins


def _setting(default: Any, parse: Callable[[str], Any], doc: str) -> Any:
    return field(default=default, metadata={"parse": parse, "doc": doc})


def user_home() -> Path | None:
    """Return the user's home folder, None if there is none.

    "/" is the home of services and of unknown users.
    """
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() and home != Path(home.anchor) else None


def default_home() -> Path:
    """Return the platform's data folder. Raises SettingsError without a home folder."""
    from platformdirs import user_data_path

    try:
        folder = user_data_path("klein-mcp", appauthor=False)
    except RuntimeError:
        folder = Path()
    if not folder.is_absolute():  # older releases of platformdirs leave the ~
        raise SettingsError("There is no home folder: set HOME, or KLEIN_HOME to a folder for images.")
    return folder


def default_hub(environ: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Return the cache folder that huggingface_hub uses, by its own variables."""
    caches = environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
            return _hub_path(cache)
        return _hub_path(environ.get("HF_HOME") or f"{caches}/huggingface") / "hub"
    except RuntimeError:  # no home folder, or one of an unknown user: there is no cache to share
        return default_home() / "hub"


def hub_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the hub's variables for a process that runs in another folder."""
    found = {}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        with contextlib.suppress(RuntimeError):
            if environ.get(name):
                found[name] = str(_hub_path(environ[name]))
    return found


def _hub_path(text: str) -> Path:
    """Read a path as huggingface_hub does, which expands ~ and variables."""
    return Path(os.path.expandvars(Path(text).expanduser())).absolute()


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, read once and passed down."""

    home: Path = field(
        default_factory=default_home,
        metadata={"parse": _path, "doc": "Folder of the image library, the configuration and the engine's address."},
    )
    model: str = _setting(
        "auto",
        _text,
        "Default model: a variant, a folder, a file (its path, or its name as `klein-mcp models` lists it), or auto.",
    )
    variant: str = _setting(
        "",
        _text,
        "Which klein a single file is, if neither its name nor its hash shows it. It overrules the name of a file that "
        "`KLEIN_MODEL` gives.",
    )
    encoder: str = _setting("", _text, "Text encoder of single files: name or path. Unset: the best that suits.")
    vae: str = _setting("", _text, "Autoencoder of single files: name or path. Unset: the best that suits.")
    models: tuple[Path, ...] = _setting(
        (),
        _paths,
        "Folders and files of models besides the hub's cache, such as ComfyUI's models folder. `:` separates several, "
        '`;` on Windows; config.toml takes a list: models = ["/a", "/b"].',
    )
    hub: Path = field(
        default_factory=default_hub,
        metadata={
            "parse": _path,
            "doc": "The hub's cache, where pull puts models. Unset: what HF_HOME and similar variables name.",
        },
    )
    device: str = _setting("auto", _text, "Device of the engine: auto, cpu, cuda, cuda:1, mps.")
    dtype: str = _setting(
        "auto", _choice("auto", "float32", "bfloat16"), "Number format of the engine: auto, float32, bfloat16."
    )
    quant: str = _setting(
        "auto",
        _choice("auto", "fp8", "nvfp4"),
        "Format of the transformer's weights in memory: fp8 or nvfp4 take half or a quarter; auto: as the files are.",
    )
    decoder: str = _setting(
        "full",
        _choice("full", "small"),
        "small uses the distilled decoder, which is faster and needs less memory, if it is installed.",
    )
    memory: float = _setting(
        0.0, _number(float, 0, 10_000, "GB"), "GB of GPU memory the engine may use; 0: all that is free."
    )
    compile: str = _setting(
        "auto",
        _choice("auto", "off"),
        "auto compiles the model in idle time where that makes it faster (NVIDIA GPUs, with a C compiler); off never.",
    )
    threads: int = _setting(0, _number(int, 0, 1024, "threads"), "CPU threads of the engine; 0: torch's default.")
    loras: tuple[str, ...] = _setting((), _words, "LoRA files to load, each with an optional :scale, comma-separated.")
    show: str | None = _setting(
        None,
        _choice("inline", "link", "none"),
        "How images are returned by default: inline, link, none. Unset: what the client can show.",
    )
    wait_budget: float = _setting(
        25.0,
        _number(float, 0, 3600, "seconds"),
        "Seconds a call waits for its image before it returns a job, at most a second more; 0: returns it at once.",
    )
    queue_size: int = _setting(
        32,
        _number(int, 1, 100_000, "jobs"),
        "Jobs that may wait; further ones are refused with a time to retry. One client alone gets half of the places.",
    )
    keep_alive: float = _setting(
        600.0, _number(float, 0, 1e9, "seconds"), "Idle seconds until the weights leave the device."
    )
    exit_after: float = _setting(
        3600.0, _number(float, 0, 1e9, "seconds"), "Idle seconds until the engine's process ends."
    )
    engine: tuple[str, ...] = _setting(
        (), _words, "Addresses of engines on other machines (klein-mcp engine), comma-separated. Unset: this machine's."
    )
    engine_token_file: Path | None = field(
        default=None, metadata={"parse": _optional_path, "doc": "File with the token of those engines."}
    )
    engine_certificate_file: Path | None = field(
        default=None,
        metadata={
            "parse": _optional_path,
            "doc": "File with certificates of those engines that no authority has signed, one after another.",
        },
    )
    read_roots: tuple[Path, ...] | None = _setting(
        None,
        _paths,
        "Folders from which tools may open files; [] in config.toml: none. Unset: your home and the temp folder.",
    )
    write_roots: tuple[Path, ...] | None = _setting(
        None,
        _paths,
        "Folders into which save_image may write; [] in config.toml: none. Unset: the client's roots, or the project "
        "folder it started in, if that is inside your home, else Pictures/klein-mcp there.",
    )
    credentials: str = _setting(
        "off",
        _credentials,
        "Sign files that leave the library (C2PA): off, local (a key made here once), or the path of a PEM file with "
        "key and certificate chain. Needs klein-mcp[c2pa].",
    )
    allow_urls: bool = _setting(False, _flag, "1 allows image references by https URL (public hosts only).")
    cors: tuple[str, ...] = _setting(
        (),
        _origins,
        "Origins whose pages may call /v1 and /sdapi of `serve` and load its links, such as http://localhost:3000.",
    )
    log_level: str = _setting(
        "warning", _choice("debug", "info", "warning", "error"), "Log level: debug, info, warning, error."
    )

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read the environment and `config.toml`. Raises SettingsError."""
        folder = _home(environ)
        values = {
            "hub": default_hub({"HF_HOME": str(folder / "huggingface"), **environ} if user_home() is None else environ),
            **_from_file(folder / "config.toml"),
            **_from_environ(environ),
            "home": folder,
        }
        return cls(**values)

    @classmethod
    def load_home(cls) -> "Settings":
        """Read only where the data folder is.

        An engine can so be stopped whatever else is set wrongly.

        Raises SettingsError.
        """
        folder = _home(os.environ)
        return cls(home=folder, hub=folder / "huggingface" / "hub")  # the default would ask for a home folder

    def engine_config(self) -> EngineConfig:
        """Return the engine's configuration."""
        return EngineConfig(
            models=(*self.models, self.home / "models"),
            hub=self.hub,
            device=_unless_auto(self.device),
            dtype=_unless_auto(self.dtype),
            threads=self.threads or None,
            model=_unless_auto(self.model),
            variant=self.variant or None,
            text_encoder=self.encoder or None,
            vae=self.vae or None,
            answers=self.home / "models.json",
            quant=_unless_auto(self.quant),
            loras=self.loras,
            decoder="small" if self.decoder == "small" else "full",
            memory_limit=round(self.memory * 1e9) or None,
            compile="off" if self.compile == "off" else "auto",
            compile_cache=self.compile_cache / __version__,
        )

    @property
    def compile_cache(self) -> Path:
        """Return the folder of the compilers' caches, one folder per version inside."""
        return self.home / "compile"

    @property
    def library(self) -> Path:
        """Return the folder of the image library."""
        return self.home / "library"


def _home(environ: Mapping[str, str]) -> Path:
    home = environ.get("KLEIN_HOME")
    folder = _parse("KLEIN_HOME", home, _path) if home else default_home()
    try:
        check_folder(folder)
    except OSError as exc:
        raise SettingsError(f"The data folder {folder} cannot be used: {exc.strerror or exc}.") from None
    return folder


def _unless_auto(value: str) -> str | None:
    return None if value == "auto" else value


def variable(name: str) -> str:
    """Return the environment variable of a field."""
    return f"KLEIN_{name.upper()}"


def misspelled(environ: Mapping[str, str] = os.environ) -> Iterator[tuple[str, str]]:
    """Yield (unknown variable, the setting probably meant)."""
    known = [item.name for item in fields(Settings)]
    for name in sorted(environ):
        rest = name.removeprefix("KLEIN_").lower()
        # 0.75: KLEIN_MODLE is near to KLEIN_MODEL; KLEIN_DEV_VENV, which is dev.py's, is near to none.
        # A variable near to none may belong to another program.
        if (
            name.startswith("KLEIN_")
            and rest not in known
            and (near := difflib.get_close_matches(rest, known, 1, 0.75))
        ):
            yield name, variable(near[0])


def warn_misspelled() -> None:
    """Log one line per misspelled variable."""
    for name, meant in misspelled():
        log.warning("%s is no setting and has no effect. Did you mean %s?", name, meant)


def table() -> Iterator[tuple[str, str, str]]:
    """Yield (variable, default, meaning) of each setting, for the README."""
    for item in fields(Settings):
        default = _COMPUTED_DEFAULTS.get(item.name) or _default_text(item.default)
        yield variable(item.name), default, item.metadata["doc"]


_COMPUTED_DEFAULTS = {"home": "the platform's data folder", "hub": "~/.cache/huggingface/hub"}


def _default_text(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parse(source: str, value: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(value)
    except ValueError as exc:
        raise SettingsError(f"{source} is {value!r}; it must be {exc}.") from None


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        item.name: _parse(variable(item.name), environ[variable(item.name)], item.metadata["parse"])
        for item in fields(Settings)
        if environ.get(variable(item.name))
    }


def _from_file(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = read_private_text(path)
        data = tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as exc:
        if re.search(r'"[^"\n]*\\', text):
            raise SettingsError(
                f"{path} cannot be read: {exc}. "
                r"Write paths with backslashes in single quotes: models = 'C:\ComfyUI\models'."
            ) from None
        raise SettingsError(f'{path} cannot be read: {exc}. Text needs quotes: model = "klein-4b".') from None
    except (OSError, ValueError) as exc:
        raise SettingsError(f"{path} cannot be read: {getattr(exc, 'strerror', None) or exc}.") from None
    except RecursionError:
        raise SettingsError(f"{path} cannot be read: it is nested too deep.") from None
    known = {item.name: item.metadata["parse"] for item in fields(Settings) if item.name != "home"}
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(name.lower().removeprefix("klein_"), known, 1)
            suggestion = f" Did you mean {near[0]}?" if near else ""
            if isinstance(data[name], dict):
                suggestion = " Settings stand at the top of the file, below no [table]."
            raise SettingsError(f"{path} sets {name}, which is no setting.{suggestion}")
    return {name: _from_toml(f"{name} in {path}", value, known[name]) for name, value in data.items()}


def _from_toml(source: str, value: Any, parse: Callable[[str], Any]) -> Any:
    if parse is _paths and isinstance(value, list):
        return tuple(_parse(source, item, _path) if isinstance(item, str) else _refuse(source, item) for item in value)
    if parse is _words and isinstance(value, list):
        return tuple(word for item in value if (word := _item(item).strip()))  # a comma may be in a LoRA's name
    if isinstance(value, dict) or (isinstance(value, list) and parse is not _origins):
        _refuse(source, value)
    return _parse(source, _as_text(value), parse)


def _refuse(source: str, value: Any) -> NoReturn:
    raise SettingsError(f"{source} is {value!r:.60}; it must be text, a number, or a list where several are meant.")


def _as_text(value: Any) -> str:
    """Spell a TOML value as the environment would."""
    if isinstance(value, list):
        return ",".join(map(_item, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


def _item(value: Any) -> str:
    """Spell one list item.

    A LoRA may be a table: {path = "…" or name = "…", scale = 0.8}.
    """
    if isinstance(value, dict) and (source := value.get("path") or value.get("name")):
        return f"{source}:{value.get('scale', 1)}"
    return str(value)
