"""Events of a job, and their JSON form."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.contract import EngineError, Fix, Loading, Queued, Stage, Step
from klein_mcp import errors
from klein_mcp.errors import RequestError
from klein_mcp.images.schema import LibraryBusy, LibraryDamaged, LibraryUnwritable
from klein_mcp.jobs.results import Preview, SavedImage


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job has an id. Always the first event of `Jobs.run`."""

    job: str


@dataclass(frozen=True, slots=True)
class Saving:
    """An image is computed and is being saved."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """Progress of one image.

    image: its number in the request, from 0.
    part, parts: of several that make one image, such as a transparent one, the one that `event` is of.
    preview: of a Step, for listeners that asked: the image the sampler is heading for.
    partial: that image at full size, as a PNG, of some steps of a request with `partials`.
    """

    image: int
    event: Queued | Loading | Stage | Step | Saving
    preview: Preview | None = None
    partial: Preview | None = None
    part: int = 0
    parts: int = 1

    def share(self, of_part: float) -> float:
        """Return the share of the image that is done.

        of_part: the share of this part.
        """
        return (self.part + of_part) / self.parts


@dataclass(frozen=True, slots=True)
class Starting(Progressed):
    """A front end starts the engine.

    The job has no id yet, or none any more.
    """


@dataclass(frozen=True, slots=True)
class ImageSaved:
    """Image number `image`, from 0, is in the library.

    preview: for listeners that asked for each.
    """

    image: int
    saved: SavedImage
    preview: Preview | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """Every image is saved.

    ms: by stage, over all images. preview: one image, or a sheet of several.
    """

    warnings: tuple[str, ...] = ()
    ms: Mapping[str, float] = field(default_factory=dict)
    preview: Preview | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended with an error for its caller."""

    error: EngineError | RequestError


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody cancelled the job."""


JobEvent = Submitted | Progressed | ImageSaved | Done | Failed | Cancelled
LAST = (Done, Failed, Cancelled)
"""Kinds after which no event follows."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Options of one listener.

    preview: long edge in pixels of a preview of the whole job in Done; 0 for none.
    each: long edge of a preview of each image in ImageSaved; 0 for none. steps: whether steps carry previews.
    partials: whether steps carry the partial images that the request asks for.
    """

    preview: int = 0
    each: int = 0
    steps: bool = False
    partials: bool = False


NO_PREVIEWS = Listen()

_ENGINE_EVENTS = {kind.__name__: kind for kind in (Queued, Loading, Stage, Step, Saving)}
_JOB_EVENTS = {kind.__name__: kind for kind in (Submitted, Progressed, ImageSaved, Done, Failed, Cancelled)}


def to_json(event: JobEvent) -> dict[str, Any]:
    kind = {"kind": type(event).__name__}
    match event:
        case Failed(error):
            return {**kind, "error": error_to_json(error)}
        case Progressed(image, Step(done, total, seconds=seconds), preview, partial, part, parts):
            inner = {"kind": "Step", "done": done, "total": total, "seconds": seconds}
            images = {"preview": preview and asdict(preview), "partial": partial and asdict(partial)}
            return {**kind, "image": image, "event": inner, **images, "part": part, "parts": parts}
        case Progressed(image, inner, _, _, part, parts):
            event_json = {"kind": type(inner).__name__, **asdict(inner)}
            return {**kind, "image": image, "event": event_json, "part": part, "parts": parts}
        case _:
            return {**kind, **asdict(event)}


def from_json(data: Mapping[str, Any]) -> JobEvent:
    """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError."""
    values = dict(data)
    kind = _JOB_EVENTS[values.pop("kind")]
    for name in ("preview", "partial"):
        if encoded := values.get(name):
            values[name] = Preview(**encoded)
    if kind is Failed:
        return Failed(error_from_json(values["error"]))
    if kind is Progressed:
        event = dict(values["event"])
        values["event"] = _ENGINE_EVENTS[event.pop("kind")](**event)
    if kind is ImageSaved:
        values["saved"] = SavedImage.from_json(values["saved"])
    if kind is Done:
        values["warnings"] = tuple(values["warnings"])
    return kind(**values)


def error_to_json(error: EngineError | RequestError) -> dict[str, Any]:
    """Write an error with everything its constructor takes."""
    values = {"kind": type(error).__name__, **vars(error)}
    if isinstance(error, EngineError):
        values["fix"] = error.fix and asdict(error.fix)
    elif not error.action:
        del values["action"], values["shows"]  # early builds of 0.2 may read it, whose errors have neither
    return values


def error_from_json(data: Mapping[str, Any]) -> EngineError | RequestError:
    """Read an error.

    An unknown kind is an EngineError with the same words.
    """
    values = dict(data)
    kind = _ERRORS.get(values.pop("kind"), EngineError)
    if fix := values.get("fix"):
        values["fix"] = Fix(**{**fix, "choices": tuple(fix["choices"])})
    return kind(values.pop("message"), **values)


def _subclasses(kind: type) -> dict[str, type]:
    found = {kind.__name__: kind}
    for child in kind.__subclasses__():
        found |= _subclasses(child)
    return found


_ERRORS = _subclasses(EngineError) | {
    kind.__name__: kind
    for kind in (
        *(RequestError, errors.BadImage, errors.NotEnoughMemory, errors.UnknownImage, errors.Refused),
        *(errors.ServerFault, LibraryBusy, LibraryUnwritable, LibraryDamaged),
    )
}
