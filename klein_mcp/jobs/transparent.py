"""Runs the engine's jobs of an image, several if it is transparent.

A master and two edits of it on other backings are solved for alpha, and the result is checked. An image on a plain
background is cut out without painting.
"""

import re
from collections.abc import Generator
from dataclasses import dataclass, replace

from engine.contract import Job, KeepSource, Result, Rgb8, image_hash
from klein_mcp.images import alpha
from klein_mcp.images.alpha import Cutout, Pixels
from klein_mcp.jobs.execute import PreparedRequest
from klein_mcp.jobs.request import UNPAINTED, ImageRequest
from klein_mcp.jobs.save import FinishedImage, finish

TRIES = 2
"""Backings for a new image: the second where much of the subject has nearly the colour of the first."""

BACKINGS = ("black", "white")
"""Of the two edits: as far apart as colours are."""

_COLOUR = r"(?:white|black|gr[ae]y|red|green|blue|yellow|orange|purple|pink|brown|beige|transparent|#[0-9a-f]{3,8})"
_PLAIN = r"(?:plain|solid|simple|clean|blank|empty|flat|pure|light|dark|bright|pale|no)"
_BACKGROUND = re.compile(
    r"[,.;!]?\s*(?<!\w)(?:"
    r"(?:isolated\s+)?(?:on|with|against|in front of)\s+(?:an?\s+|the\s+)?(?:[\w#-]+\s+){0,3}background\b"
    # Not "in the background": that is a place.
    rf"|(?:in|over|upon)\s+(?:an?\s+|the\s+)?(?:(?:{_PLAIN}|{_COLOUR})\s+){{1,3}}background\b"
    r"|without\s+(?:an?\s+|any\s+)?background\b"
    rf"|(?:isolated\s+)?(?:on|against)\s+(?:{_PLAIN}\s+)?{_COLOUR}(?=\s*(?:[.,;!]|$)))"
    # Without a preposition it is a part of a list or a sentence of its own.
    rf"|(?:^|[,.;!])\s*(?:an?\s+)?(?:(?:{_PLAIN}|{_COLOUR}|and)[\s,]+){{1,4}}background\b(?=\s*(?:[.,;!]|$))",
    re.IGNORECASE,
)
"""A background that a prompt names: "on a wooden background", ", white background", "isolated on white"."""
_REMOVES_BACKGROUND = re.compile(
    r"(?:please\s+)?(?:"
    r"(?:remove|delete|erase|clear|drop|take away|cut away|cut off|get rid of)\s+"
    r"(?:the\s+|its\s+)?(?:[\w-]+\s+)?(?:background|bg)"
    r"|(?:make|turn)\s+(?:(?:it|this|(?:the|this)\s+image|(?:the\s+|its\s+)?(?:background|bg)))\s+(?:fully\s+)?transparent"
    r"|cut\s+(?:(?:the\s+|its\s+)?(?:[\w-]+\s+){0,3})?out"
    r"|cut\s+out(?:\s+(?:the\s+)?[\w-]+){0,3}"
    r"|(?:a\s+|on\s+a\s+|with\s+a\s+)?transparent(?:\s+(?:background|bg))?"
    r")(?:,?\s+please)?\s*[.!]?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the engine's jobs behind an image."""

    job: Job
    number: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Made:
    """A finished image, and the result that its provenance describes."""

    result: Result
    image: FinishedImage


Making = Generator[Part, Result, Made]


def parts(prepared: PreparedRequest, index: int) -> Making:
    """Yield the jobs of image number `index` and return the image.

    Takes the result of each job. Blocking.
    """
    if prepared.request.background == "auto":
        result = yield Part(prepared.job(index))
        return Made(result, finish(prepared, result))
    return (yield from _transparent(prepared, index))


def advance(making: Making, result: Result | None) -> Part | Made:
    """Return the next job, or the image. Blocking."""
    try:
        return next(making) if result is None else making.send(result)
    except StopIteration as over:
        return over.value


def only_removes_background(prompt: str) -> bool:
    """Return whether an edit asks for nothing but transparency."""
    return _REMOVES_BACKGROUND.fullmatch(prompt.strip()) is not None


def on_backing(prompt: str, colour: str) -> str:
    """Return the prompt of a new image with this background alone."""
    backing = f" on a {colour} background"
    named = _BACKGROUND.search(prompt)
    if named and prompt[: named.start()].strip():
        return _BACKGROUND.sub("", _BACKGROUND.sub(lambda _: "\0", prompt, count=1)).replace("\0", backing).strip()
    prompt = _BACKGROUND.sub("", prompt).lstrip(" .,;!")  # it may begin with one
    if sentences := re.match(r"(.*?)([.!?]\s.+)$", prompt, re.DOTALL):
        return f"{sentences[1]}{backing}{sentences[2]}"
    return f"{prompt.rstrip(' .,!')}{backing}"


def _transparent(prepared: PreparedRequest, index: int) -> Making:
    request, image = prepared.request, prepared.original
    if image is not None and _only_cuts_out(request):
        shown = image if prepared.original_rgba is None else prepared.original_rgba
        if (cut := cut_unpainted(request, shown)) is not None:
            return _unpainted(prepared, index, cut)
        return (yield from _on_backings(prepared, index, image, None, 0))
    if request.tool == "edit_image":
        result = yield Part(prepared.job(index), 0, 3)
        master = finish(prepared, result)
        if master.pixels.shape[2] == 4:
            return Made(result, master)
        number = 1
        if (cut := _plain(master.pixels)) is not None and image is not None and alpha.is_plain(image):
            return Made(result, _cut(master, cut))
    else:
        result, number = yield from _new_master(prepared, index)
        master = finish(prepared, result)
    return (yield from _on_backings(prepared, index, master.pixels, Made(result, master), number))


def cut_unpainted(request: ImageRequest, image: Pixels) -> Cutout | None:
    """Cut out the image of an edit that needs no model.

    None where it asks for more, or the background is not plain.
    """
    if not _only_cuts_out(request):
        return None
    return Cutout(image, alpha.measure(image)) if image.shape[2] == 4 else _plain(image)


def _only_cuts_out(request: ImageRequest) -> bool:
    return only_removes_background(request.prompt) and not (request.region or request.mask)


def _new_master(prepared: PreparedRequest, index: int) -> Generator[Part, Result, tuple[Result, int]]:
    """Paint a new image on a backing that stands out."""
    prompt, tried = prepared.request.prompt, list[str]()
    while True:
        tried.append(alpha.choose_backing(_BACKGROUND.sub("", prompt), tried))
        job = replace(prepared.job(index), prompt=on_backing(prompt, tried[-1]))
        if len(tried) > 1:
            job = replace(job, partials=0)  # as many as were asked for have been sent
        result = yield Part(job, len(tried) - 1, len(tried) + len(BACKINGS))
        if len(tried) == TRIES or not alpha.melts(result.image):
            return result, len(tried)


def _on_backings(prepared: PreparedRequest, index: int, image: Rgb8, master: Made | None, number: int) -> Making:
    """Solve the alpha of `image` from edits of it.

    master: how it was made, None where it is a reference.
    """
    serves = alpha.is_plain(image) and not alpha.melts(image)
    backings = BACKINGS if serves else (alpha.choose_backing(prepared.request.prompt), *BACKINGS)
    images, digest = [image] if serves else [], image_hash(image)
    result = master.result if master else None
    for position, colour in enumerate(backings, number):
        edit = _backing_edit(prepared, index, image, digest, colour)
        painted = yield Part(edit, position, number + len(backings))
        images.append(painted.image)
        result = result or replace(painted, read_as="", painted=None)
    assert result is not None
    cut = alpha.solve(images)
    if not serves:
        cut = replace(cut, image=alpha.keep_colours(cut.image, image))
    finished = master.image if master else FinishedImage(image)
    return Made(result, _cut(finished, cut))


def _backing_edit(prepared: PreparedRequest, index: int, image: Rgb8, digest: str, colour: str) -> Job:
    request = prepared.request
    return Job(
        prompt=f"Change the background to {colour}. Keep the subject and its edges exactly as they are.",
        references=(image,),
        size=KeepSource(),
        seed=request.seed + index,
        model=request.model,
        steps=request.steps,
        guidance=request.guidance,
        hashes=(digest,),
        affinity=prepared.affinity or f"{request.model} {digest}",
        mode=request.mode,
    )


def _plain(image: Rgb8) -> Cutout | None:
    """Cut out without painting.

    None where the background is not plain, or not all of it is outside the subject.
    """
    cut = None if alpha.melts(image) else alpha.cut_out(image)
    return None if cut is None or cut.checks.error or cut.warnings else cut


def _cut(finished: FinishedImage, cut: Cutout) -> FinishedImage:
    """Take a cut-out that passes its checks.

    Else the opaque image, with the reason as its first warning.
    """
    if cut.checks.error:
        return replace(finished, warnings=(f"not transparent: {cut.checks.error}", *finished.warnings))
    warnings = (*cut.warnings, *finished.warnings)
    return replace(finished, pixels=cut.image, opacity=None, checks=cut.checks, warnings=warnings)


def _unpainted(prepared: PreparedRequest, index: int, cut: Cutout) -> Made:
    """Return an image that took no model."""
    assert prepared.original is not None
    result = Result(prepared.original, prepared.request.seed + index, UNPAINTED, "none", 0, 0.0)
    already = ("the image was transparent already",) if prepared.original_rgba is not None else ()
    return Made(result, FinishedImage(cut.image, checks=cut.checks, warnings=(*already, *cut.warnings)))
