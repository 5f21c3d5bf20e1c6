"""`klein-mcp paint`: make one image in this process, without the daemon."""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.contract import Event, InvalidJob, Result
from engine.families.klein.variants import EMBEDDED
from klein_mcp.atomic import write_new_or_replace
from klein_mcp.cli.arguments import image_size, local_path
from klein_mcp.cli.terminal import ProgressBar, strip_control_chars
from klein_mcp.errors import RequestError, quote
from klein_mcp.jobs import request
from klein_mcp.jobs.demo import demo_warning
from klein_mcp.jobs.progress import describe
from klein_mcp.settings import Settings

KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@dataclass(frozen=True, slots=True)
class PaintOptions:
    """Arguments of the command.

    seed: None for a random one. out: a file with an ending in KINDS, None for ./klein-<seed>.png.
    """

    prompt: str
    references: tuple[Path, ...] = ()
    model: str = "auto"
    seed: int | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    out: Path | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what the image shows, or what to change in a reference")
    parser.add_argument(
        "--ref", type=local_path, action="append", default=[], metavar="IMG", help="a reference; repeatable"
    )
    parser.add_argument("--model", metavar="M", help="a variant, a folder or a file, by path or name; default: auto")
    parser.add_argument("--seed", type=int, metavar="N", help="default: a random one, which is printed")
    parser.add_argument(
        "--size", type=image_size, metavar="WxH", help="default: the first reference's, else the model's own"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--guidance", type=float, metavar="G", help="default: the model's own")
    parser.add_argument("--device", metavar="D", help="cpu, cuda or mps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the device does best")
    parser.add_argument("--quant", choices=("fp8", "nvfp4"), help="format of the weights in memory")
    parser.add_argument("--variant", metavar="V", help="which klein a single file is, if it cannot tell")
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
        out=arguments.out,
    )
    changes: dict[str, Any] = {name: getattr(arguments, name) for name in ("device", "dtype", "quant", "variant")}
    changes["loras"] = tuple(arguments.lora)
    given = {name: value for name, value in changes.items() if value}
    if given and settings.engine:
        names = ", ".join(f"--{'lora' if name == 'loras' else name}" for name in given)
        print(f"klein-mcp: {names} has no effect: KLEIN_ENGINE computes elsewhere, as it was started", file=sys.stderr)
    settings = replace(settings, **given)
    return paint(settings, options, as_json=arguments.json)


def _output(text: str) -> Path:
    if Path(text).suffix.lower() not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(KINDS)}")
    return local_path(text)


def paint(settings: Settings, options: PaintOptions, *, as_json: bool = False) -> int:
    """Make the image and write its file.

    Raises EngineError, RequestError or OSError.
    """
    from klein_mcp.daemon.executors import make_executor
    from klein_mcp.images import codec
    from klein_mcp.jobs.execute import PreparedRequest
    from klein_mcp.jobs.save import provenance_of

    wanted = _request(options)
    out = options.out or Path(f"klein-{wanted.seed}.png")
    _check(out)
    decoded = [codec.decode(_read(reference), str(reference)) for reference in options.references]
    about_files = [warning for found in decoded for warning in found.warnings]
    references = tuple(found.image for found in decoded)
    prepared = PreparedRequest(wanted, references, ("",) * len(references), (), wanted.warnings)
    with ProgressBar("starting the engine") as bar:
        with _interruptible():
            executor = make_executor(settings)
        result = _last(_shown(event, bar) for event in executor.run(prepared.job(0)))
    # The recipe has names, not paths: a file that is passed on must not reveal where its references were.
    recipe = provenance_of(wanted, result, wanted.images).to_json()
    data = codec.encode(result.image, KINDS[out.suffix.lower()], recipe)  # type: ignore[arg-type] - KINDS has no other
    folder = out.parent.resolve()
    replaced = os.path.lexists(out)
    try:
        write_new_or_replace(folder, folder / out.name, data, overwrite=True)
    except OSError as exc:
        raise _unwritable(out, exc.strerror or str(exc)) from None
    demo = options.model == "auto" and result.model == EMBEDDED
    warnings = (
        *about_files,
        *wanted.warnings,
        *result.warnings,
        *([demo_warning(executor.status().models)] if demo else ()),
    )
    for warning in warnings:
        print(strip_control_chars(f"klein-mcp: {warning}"), file=sys.stderr)
    if as_json:
        print(json.dumps({**_metadata(out, result, warnings), "replaced": replaced}))
    else:
        print(f"{_summary(out, result)}{'  (replaced the file that was there)' if replaced else ''}")
    return 0


def _request(options: PaintOptions) -> request.ImageRequest:
    """Build the request. Raises RequestError or InvalidJob."""
    if not options.prompt.strip():
        raise InvalidJob("The prompt is empty.", hint="Say what to paint.")
    width, height = options.size or (None, None)
    common: dict[str, Any] = {
        "width": width,
        "height": height,
        "seed": options.seed,
        "model": options.model,
        "steps": options.steps,
        "guidance": options.guidance,
    }
    if options.references:
        return request.compose([path.name for path in options.references], options.prompt, **common)
    return request.generate(options.prompt, **common)


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


def _metadata(out: Path, result: Result, warnings: tuple[str, ...]) -> dict[str, Any]:
    height, width = result.image.shape[:2]
    return {
        "path": str(out.resolve()),
        "width": width,
        "height": height,
        "seed": str(result.seed),
        "model": result.model,
        "steps": result.steps,
        "guidance": result.guidance,
        "ms": {name: round(value) for name, value in result.ms.items()},
        "warnings": list(warnings),
    }


def _summary(out: Path, result: Result) -> str:
    height, width = result.image.shape[:2]
    seconds = sum(result.ms.values()) / 1000
    return f"{out}  {width}×{height}  seed {result.seed}  {result.model}  {seconds:.1f} s"
