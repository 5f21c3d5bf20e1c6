"""One picture in this process, without a daemon: what `klein-mcp paint` does."""

import argparse
import json
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.contract import Event, InvalidJob, Job, Result
from klein_mcp.cli.arguments import image_size
from klein_mcp.cli.terminal import ProgressBar, harmless
from klein_mcp.errors import RequestError
from klein_mcp.jobs.progress import read
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from engine.engine import Engine

KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@dataclass(frozen=True, slots=True)
class PaintOptions:
    """What was typed. seed: None for a random one. out: one of KINDS by its name; None for ./klein-<seed>.png."""

    prompt: str
    references: tuple[Path, ...] = ()
    model: str = "auto"
    seed: int | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    out: Path | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--ref", type=Path, action="append", default=[], metavar="IMG", help="a reference; repeatable")
    parser.add_argument("--model", metavar="M", help="a variant, a folder or a file; default: auto")
    parser.add_argument("--seed", type=int, metavar="N", help="default: a random one, which is printed")
    parser.add_argument(
        "--size", type=image_size, metavar="WxH", help="default: the first reference's, else the model's own"
    )
    parser.add_argument("--steps", type=int, metavar="N")
    parser.add_argument("--guidance", type=float, metavar="G")
    parser.add_argument("--device", metavar="D", help="cpu, cuda or mps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--quant", choices=("fp8", "nvfp4"), help="format of the weights in memory")
    parser.add_argument("--variant", metavar="V", help="which klein a single file is, if it cannot tell")
    parser.add_argument("--lora", action="append", default=[], metavar="L[:scale]", help="repeatable")
    parser.add_argument(
        "-o", dest="out", type=_output, metavar="PATH", help="default: ./klein-<seed>.png; not in the library"
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Raises EngineError, RequestError, OSError."""
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
    settings = replace(settings, **{name: value for name, value in changes.items() if value})
    return paint(settings, options, as_json=arguments.json)


def _output(text: str) -> Path:
    if Path(text).suffix.lower() not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(KINDS)}")
    return Path(text)


def paint(settings: Settings, order: PaintOptions, *, as_json: bool = False) -> int:
    """Raises EngineError, RequestError, OSError."""
    from klein_mcp.images import codec

    seed = secrets.randbelow(2**32) if order.seed is None else order.seed
    out = order.out or Path(f"klein-{seed}.png")
    _check(out)
    width, height = order.size or (None, None)
    job = Job(
        prompt=_prompt(order.prompt),
        references=tuple(codec.decode(_read(path), str(path)).image for path in order.references),
        width=width,
        height=height,
        seed=seed,
        model=order.model,
        steps=order.steps,
        guidance=order.guidance,
    )
    with ProgressBar("starting the engine") as bar:
        with _interruptible():
            made = engine(settings)
        painting = _last(_told(event, bar) for event in made.run(job))
    recipe = _recipe(order, painting)
    out.write_bytes(codec.encode(painting.image, KINDS[out.suffix.lower()], recipe))  # type: ignore[arg-type]
    for warning in painting.warnings:
        print(harmless(f"klein-mcp: {warning}"), file=sys.stderr)
    print(json.dumps(_facts(out, painting)) if as_json else _sentence(out, painting))
    return 0


def _check(out: Path) -> None:
    """Before the work, which may take minutes: can the picture be written there? Makes the folder."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        problem = "it is a folder" if out.is_dir() else ""
    except OSError as refused:
        problem = refused.strerror or str(refused)
    if problem or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise RequestError(f"{out} cannot be written: {problem or 'Permission denied'}.", hint="Name another with -o.")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process at once: the libraries that come in here swallow a KeyboardInterrupt now and then."""
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: object) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the bar has hidden the cursor
    os._exit(130)


def engine(settings: Settings) -> "Engine":
    """The engine as the settings want it; what they leave open is the engine's to choose."""
    # Read once, when torch comes in. Spinning threads on a busy machine of 2 cores made 0.1 s of work 0.6 s, and 1.3 s
    # at worst; sleeping ones cost nothing when it is idle. Measured: engine/SPEED.md.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from engine.engine import Engine

    return Engine(settings.engine_config())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise RequestError(
            f"The reference {path} cannot be read: {problem.strerror}.", hint="Check the path."
        ) from None


def _prompt(text: str) -> str:
    if not text.strip():
        raise InvalidJob("The prompt is empty.", hint="Say what to paint.")
    return text


def _told(event: Event, bar: ProgressBar) -> Event:
    bar.update(*read(event))
    return event


def _last(events: Any) -> Result:
    painting = None
    for event in events:
        painting = event
    assert isinstance(painting, Result)
    return painting


def _recipe(order: PaintOptions, painting: Result) -> dict[str, Any]:
    return {
        "prompt": order.prompt,
        "seed": str(painting.seed),
        "model": painting.model,
        "fingerprint": painting.fingerprint,
        "steps": painting.steps,
        "guidance": painting.guidance,
        "width": painting.image.shape[1],
        "height": painting.image.shape[0],
        "parents": [str(path) for path in order.references],
    }


def _facts(out: Path, painting: Result) -> dict[str, Any]:
    height, width = painting.image.shape[:2]
    return {
        "path": str(out.resolve()),
        "width": width,
        "height": height,
        "seed": str(painting.seed),
        "model": painting.model,
        "steps": painting.steps,
        "guidance": painting.guidance,
        "ms": {name: round(value) for name, value in painting.ms.items()},
        "warnings": list(painting.warnings),
    }


def _sentence(out: Path, painting: Result) -> str:
    height, width = painting.image.shape[:2]
    seconds = sum(painting.ms.values()) / 1000
    return f"{out}  {width}×{height}  seed {painting.seed}  {painting.model}  {seconds:.1f} s"
