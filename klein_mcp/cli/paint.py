"""`klein-mcp paint`: make one image in this process, without the daemon."""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.contract import Event, InvalidJob, Result
from engine.families.klein.variants import EMBEDDED
from klein_mcp.atomic import write_new_or_replace
from klein_mcp.cli.arguments import image_size, local_path, seed
from klein_mcp.cli.records import is_handle
from klein_mcp.cli.terminal import ProgressBar, strip_control_chars
from klein_mcp.errors import RequestError, one_line, quote
from klein_mcp.images.outputs import SUFFIXES
from klein_mcp.jobs import request
from klein_mcp.jobs.demo import demo_warning
from klein_mcp.jobs.progress import describe
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from klein_mcp.images.alpha import Pixels


@dataclass(frozen=True, slots=True)
class PaintOptions:
    """Arguments of the command.

    references: files, or handles of the library. seed: None for a random one. preserve: of an edit, which one reference
    makes it. out: a file with an ending in SUFFIXES, None for ./klein-<seed>.png.
    """

    prompt: str
    references: tuple[str, ...] = ()
    model: str = "auto"
    seed: int | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    preserve: request.Preserve = "auto"
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class _Reference:
    """One image of the command line.

    name: of its file without folders, or its handle. opened: whether it may be a photograph, not all painted by nano.
    """

    name: str
    pixels: "Pixels"
    warnings: tuple[str, ...] = ()
    opened: bool = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what the image shows, or what to change in a reference")
    parser.add_argument(
        "--ref",
        action="append",
        default=[],
        metavar="IMG",
        help="a file or a handle; one is edited, several are composed; repeatable",
    )
    parser.add_argument("--model", metavar="M", help="a variant, a folder or a file, by path or name; default: auto")
    parser.add_argument("--seed", type=seed, metavar="N", help="default, or -1: a random one, which is printed")
    parser.add_argument(
        "--size",
        type=image_size,
        metavar="WxH",
        help="default: the edited image's; of several, the first one's as the model sees it; else the model's own",
    )
    parser.add_argument(
        "--preserve",
        choices=("auto", "off"),
        default="auto",
        help="off: an edit repaints every pixel; default: auto, untouched ones stay the reference's",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--guidance", type=float, metavar="G", help="default: the model's own")
    parser.add_argument("--device", metavar="D", help="cpu, cuda or mps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the device does best")
    parser.add_argument("--quant", choices=("fp8", "nvfp4"), help="format of the weights in memory")
    parser.add_argument("--variant", metavar="V", help="which klein the file of --model is, whatever its name")
    parser.add_argument("--lora", action="append", default=[], metavar="L[:scale]", help="repeatable")
    parser.add_argument(
        "-o",
        dest="out",
        type=_output,
        metavar="PATH",
        help="default: ./klein-<seed>.png; not in the library; replaces a file, and says so",
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Make the image that the arguments describe.

    Raises EngineError, RequestError or OSError.
    """
    options = PaintOptions(
        prompt=arguments.prompt,
        references=tuple(arguments.ref),
        model=arguments.model or settings.model,
        seed=arguments.seed,
        size=arguments.size,
        steps=arguments.steps,
        guidance=arguments.guidance,
        preserve=arguments.preserve,
        out=arguments.out,
    )
    changes: dict[str, Any] = {name: getattr(arguments, name) for name in ("device", "dtype", "quant", "variant")}
    changes["loras"] = tuple(arguments.lora)
    given = {name: value for name, value in changes.items() if value}
    if given and settings.engine:
        names = ", ".join(f"--{'lora' if name == 'loras' else name}" for name in given)
        print(f"klein-mcp: {names} has no effect: KLEIN_ENGINE computes elsewhere, as it was started", file=sys.stderr)
    settings = replace(settings, model=options.model, **given)
    return paint(settings, options, as_json=arguments.json)


def _output(text: str) -> Path:
    if Path(text).suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(SUFFIXES)}")
    return local_path(text)


def paint(settings: Settings, options: PaintOptions, *, as_json: bool = False) -> int:
    """Make the image and write its file.

    Raises EngineError, RequestError or OSError.
    """
    from klein_mcp.daemon.executors import make_executor
    from klein_mcp.images import codec
    from klein_mcp.jobs import save
    from klein_mcp.jobs.execute import prepare_pixels

    references = [_opened(settings, reference) for reference in options.references]
    wanted = _request(options, references)
    out = options.out or Path(f"klein-{wanted.seed}.png")
    _check(out)
    kind = SUFFIXES[out.suffix.lower()]
    prepared = prepare_pixels(wanted, [reference.pixels for reference in references])
    if prepared.original is not None:
        height, width = prepared.original.shape[:2]
        codec.check_sides(kind, width, height)
    if references and references[0].opened:
        _check_photograph(settings, wanted, references[0])
    with ProgressBar("starting the engine") as bar:
        with _interruptible():
            executor = make_executor(settings)
        result = _last(_shown(event, bar) for event in executor.run(prepared.job(0)))
    finished = save.finish(prepared, result)
    # The recipe has names, not paths: a file that is passed on must not reveal where its references were.
    recipe = save.provenance_of(wanted, replace(result, image=finished.pixels), wanted.images).to_json()
    data = codec.encode(finished.pixels, kind, recipe)
    folder = out.parent.resolve()
    replaced = os.path.lexists(out)
    try:
        write_new_or_replace(folder, folder / out.name, data, overwrite=True)
    except OSError as exc:
        raise _unwritable(out, exc.strerror or str(exc)) from None
    demo = options.model == "auto" and result.model == EMBEDDED
    warnings = (
        *(warning for reference in references for warning in reference.warnings),
        *prepared.warnings,
        *finished.warnings,
        *result.warnings,
        *(
            ["JPEG has no transparency: the image is on white"]
            if kind == "jpeg" and finished.pixels.shape[2] == 4
            else ()
        ),
        *([demo_warning(executor.status().models)] if demo else ()),
    )
    for line in (*([f"read as: {result.read_as}"] if result.read_as else ()), *warnings):
        print(strip_control_chars(f"klein-mcp: {one_line(line)}"), file=sys.stderr)
    if as_json:
        changed = save.compare_stored(finished, prepared, data) if kind == "png" else finished.changed
        facts = _metadata(out, finished.pixels, result, warnings)
        print(json.dumps({**facts, **({"changed": changed.to_json()} if changed else {}), "replaced": replaced}))
    else:
        print(f"{_summary(out, finished.pixels, result)}{'  (replaced the file that was there)' if replaced else ''}")
    return 0


def _opened(settings: Settings, reference: str) -> _Reference:
    """Read a file, or an image of the library. Raises RequestError."""
    from klein_mcp.images import codec
    from klein_mcp.images.library import Store
    from klein_mcp.jobs.photographs import is_all_painted

    path = local_path(reference)
    if os.path.lexists(path) or not is_handle(reference):
        decoded = codec.decode(_read(path), str(path), None)
        return _Reference(path.name, decoded.pixels, decoded.warnings)
    store = Store(settings.library)
    try:
        record = store.get(reference)
        pixels = codec.decode(store.read(record), record.handle, None).pixels
        opened = not is_all_painted(store, record)
    finally:
        store.close()
    return _Reference(record.handle, pixels, opened=opened)


def _check_photograph(settings: Settings, wanted: request.ImageRequest, reference: _Reference) -> None:
    """Refuse what `edit_image` refuses. Raises RequestError."""
    from klein_mcp.jobs.installed import find
    from klein_mcp.jobs.photographs import check_detail, may_repaint

    if not may_repaint(wanted) or wanted.model not in ("auto", EMBEDDED):
        return
    try:
        check_detail(wanted, reference.pixels)
    except RequestError as error:
        if wanted.model == "auto" and find(settings).auto != EMBEDDED:
            return
        raise RequestError(error.message, hint="Say --preserve off to do it all the same.") from None


def _request(options: PaintOptions, references: Sequence[_Reference]) -> request.ImageRequest:
    """Build the request. Raises RequestError or InvalidJob."""
    if not options.prompt.strip():
        raise InvalidJob("The prompt is empty.", hint="Say what to paint.")
    width, height = options.size or (None, None)
    common: dict[str, Any] = {
        "seed": options.seed,
        "model": options.model,
        "steps": options.steps,
        "guidance": options.guidance,
    }
    if not references:
        return request.generate(options.prompt, width=width, height=height, **common)
    names = [reference.name for reference in references]
    if len(references) > 1:
        return request.compose(names, options.prompt, width=width, height=height, **common)
    if references[0].pixels.shape[:2] == (height, width):  # its own size, which an edit keeps
        width = height = None
    return request.edit(names[0], options.prompt, width=width, height=height, preserve=options.preserve, **common)


def _check(out: Path) -> None:
    """Check that the image can be written, and make the folder.

    This runs before work that may take minutes.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise _unwritable(out, "it is a folder")
        if not out.exists():
            # Rights and free room do not tell, as in /proc: a file without a name does, and leaves nothing.
            tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as exc:
        raise _unwritable(out, exc.strerror or str(exc)) from None
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise _unwritable(out, "Permission denied")


def _unwritable(out: Path, reason: str) -> RequestError:
    name = quote(out.name, 80) if len(out.name) > 80 else out
    return RequestError(f"{name} cannot be written: {reason}.", hint="Name another with -o.")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once.

    Libraries that are imported here swallow a KeyboardInterrupt.
    """
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: object) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the bar has hidden the cursor
    os._exit(130)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise RequestError(f"The reference {path} cannot be read: {exc.strerror}.", hint="Check the path.") from None


def _shown(event: Event, bar: ProgressBar) -> Event:
    bar.update(*describe(event))
    return event


def _last(events: Iterator[Event]) -> Result:
    result = None
    for event in events:
        result = event
    assert isinstance(result, Result)
    return result


def _metadata(out: Path, image: "Pixels", result: Result, warnings: tuple[str, ...]) -> dict[str, Any]:
    height, width = image.shape[:2]
    return {
        "path": str(out.resolve()),
        "width": width,
        "height": height,
        "seed": str(result.seed),
        "model": result.model,
        "steps": result.steps,
        "guidance": result.guidance,
        **({"read_as": result.read_as} if result.read_as else {}),
        "ms": {name: round(value) for name, value in result.ms.items()},
        "warnings": list(warnings),
    }


def _summary(out: Path, image: "Pixels", result: Result) -> str:
    height, width = image.shape[:2]
    seconds = sum(result.ms.values()) / 1000
    return f"{out}  {width}×{height}  seed {result.seed}  {result.model}  {seconds:.1f} s"
