"""Makes an image's whole history again.

Every edit that led to it, on its own base or on another.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from engine.contract import EngineError, Mode
from engine.families.klein.variants import VARIANTS
from klein_mcp.errors import RequestError
from klein_mcp.images.library import Record, Store
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.photographs import check_photograph
from klein_mcp.jobs.request import UNPAINTED, ImageRequest, Native, generate
from klein_mcp.jobs.results import JobResult, SavedImage
from klein_mcp.jobs.service import Service, with_saved


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """The images to be made again, parents first.

    base: the image at the root, following first parents. copies: images that were saved and opened again, by what
    they were saved from.
    """

    steps: tuple[Record, ...]
    base: Record
    copies: Mapping[str, str]

    def stand_ins(self, again: Mapping[str, str]) -> dict[str, str]:
        """Add to `again` what stands in place of copies."""
        return {**again, **{copy: again[image] for copy, image in self.copies.items() if image in again}}


def plan(store: Store, handle: str, *, onto: bool) -> ReplayPlan:
    """Plan the replay of `handle`.

    onto: with another base, so only what came from it. Raises RequestError.
    """
    image = store.get(handle)
    ancestors = _ancestors(store, image)
    base = image
    while base.parents:
        base = ancestors[base.parents[0]]
    if onto and base is image:
        raise RequestError(f"{handle} was not made from another image.", hint="Name an edited one.")
    made = [record for record in _parents_first(ancestors, image) if record.tool != "open"]
    if onto:
        made = [record for record in made if record is not base and base.handle in _line(ancestors, record)]
    if not made:
        raise RequestError(f"{handle} was opened from a file, not painted.", hint="Name a painted image.")
    copies = {record.handle: _saved_from(ancestors, record) for record in ancestors.values() if record.tool == "open"}
    return ReplayPlan(tuple(made), base, copies)


async def replay(
    service: Service, handle: str, call: CallContext, *, onto: str | None = None, seed: int | None = None
) -> list[JobResult]:
    """Make every step again, an image each. Raises RequestError or EngineError.

    onto: a reference to use instead of the base. seed: for every step, instead of its own.
    """
    chain = plan(service.store, handle, onto=onto is not None)
    again: dict[str, str] = {}
    opened: tuple[str, ...] = ()
    if onto is not None:
        base = await service.open(onto, call)
        again[chain.base.handle], opened = base.record.handle, base.warnings
    made: list[JobResult] = []
    same = onto is None and seed is None
    for record in chain.steps:
        # With its own seeds a step is the same again on the copy, which may have lost detail or size.
        request = step_request(record, again if same else chain.stand_ins(again), seed)
        if same:
            request = replace(request, mode=recorded_mode(record))
        try:
            if onto is not None:
                await check_base(service, call, request)
            result = await service.run(request, call)
        except (RequestError, EngineError) as error:
            raise with_saved(error, [step.images[0] for step in made]) from None
        different = _computed_otherwise(record, result.images[0]) if same else ()
        made.append(replace(result, warnings=(*(() if made else opened), *different, *result.warnings)))
        again[record.handle] = result.images[0].handle
    return made


async def check_base(service: Service, call: CallContext, request: ImageRequest) -> None:
    """Raise RequestError where `edit_image` would refuse the base."""
    try:
        await check_photograph(service, call, request)
    except RequestError as error:
        raise RequestError(error.message, hint="Replay it on a flat image, or edit a region of this one.") from None


def repeat(
    record: Record,
    *,
    width: int | None = None,
    height: int | None = None,
    aspect: str | None = None,
    count: int = 1,
    seed: int | None = None,
    model: str | None = None,
) -> ImageRequest:
    """Request a recipe again, with whatever is given in its place.

    Raises RequestError for an image without a recipe, or a size that its region or mask forbids.
    """
    recipe = recorded_request(record)
    asked = generate(
        recipe.prompt,
        width=width,
        height=height,
        aspect=aspect,
        count=count,
        seed=recipe.seed if seed is None else seed,
        model=model or recipe.model,
    )
    resized = not isinstance(asked.size, Native)
    if resized and (recipe.region or recipe.mask):
        raise RequestError("region and mask keep the image's size.", hint="Leave out the size.")
    same = not resized and (asked.seed, asked.model) == (recipe.seed, recipe.model)
    return replace(
        recipe,
        size=asked.size if resized else recipe.size,
        count=count,
        seed=asked.seed,
        model=asked.model,
        mode=recorded_mode(record) if same else None,
        warnings=(*recipe.warnings, *asked.warnings),
    )


def recorded_request(record: Record) -> ImageRequest:
    """Return the request that made an image, naming its model.

    Raises RequestError if there is none.
    """
    try:
        # "order" is the key of libraries written before 0.2.
        request = ImageRequest.from_json(record.recipe.get("request") or record.recipe["order"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RequestError(
            f"{record.handle} has no recipe that can be painted again.", hint="Make it anew from its prompt."
        ) from None
    # The model that "auto" was then: by now it may be another. A path stays, as its variant may not be found.
    model = record.recipe.get("model")
    return replace(request, model=model) if request.model == "auto" and model in VARIANTS else request


def can_repeat(store: Store, record: Record) -> bool:
    """Return whether an image can be made again with another seed."""
    if record.recipe.get("model") == UNPAINTED:
        return False
    try:
        request = recorded_request(record)
    except RequestError:
        return False
    references = (*request.images, *([request.mask] if request.mask else []))
    found = [store.find(handle) for handle in references]
    return all(each is not None and each.deleted is None for each in found)


def step_request(record: Record, again: Mapping[str, str], seed: int | None = None) -> ImageRequest:
    """Request one step of a history again.

    again: the images that stand in place of the recorded ones. Raises RequestError.
    """
    request = recorded_request(record)
    return replace(
        request,
        images=tuple(again.get(image, image) for image in request.images),
        mask=again.get(request.mask, request.mask) if request.mask else None,
        seed=request.seed if seed is None else seed,
    )


def _ancestors(store: Store, image: Record) -> dict[str, Record]:
    """Return the image and all it came from by handle.

    Deleted ones too, as their recipes are kept.
    """
    found = {image.handle: image}
    waiting = list(image.parents)
    while waiting:
        handle = waiting.pop()
        record = found[handle] if handle in found else store.find(handle)
        if record is None:
            raise RequestError(
                f"{handle}, from which {image.handle} was made, is not in this library.",
                hint=f"{image.handle} itself can be edited further.",
            )
        if handle not in found:
            found[handle] = record
            waiting += record.parents
    return found


def _saved_from(ancestors: dict[str, Record], copy: Record) -> str:
    """Return the image behind a copy, and behind copies of copies."""
    while copy.tool == "open" and copy.parents:
        copy = ancestors[copy.parents[0]]
    return copy.handle


def _parents_first(ancestors: dict[str, Record], image: Record) -> list[Record]:
    """Sort by lineage, not by the time they were made.

    A clock may have been set back between two of them.
    """
    order: dict[str, Record] = {}
    waiting = [image.handle]
    while waiting:
        record = ancestors[waiting[-1]]
        missing = next((parent for parent in record.parents if parent not in order), None)
        if missing is None:
            order[waiting.pop()] = record
        else:
            waiting.append(missing)
    return list(order.values())


def _line(ancestors: dict[str, Record], record: Record) -> set[str]:
    """Return all that `record` was made from."""
    line: set[str] = set()
    waiting: list[str] = list(record.parents)
    while waiting:
        handle = waiting.pop()
        if handle not in line:
            line.add(handle)
            waiting += ancestors[handle].parents
    return line


def recorded_mode(record: Record) -> Mode | None:
    """Return the implementation that made an image, None if unknown."""
    return next((mode for mode in get_args(Mode) if mode == record.recipe.get("mode")), None)


def _computed_otherwise(record: Record, image: SavedImage) -> Iterable[str]:
    """Warn of another number format or mode: pixels may differ a little."""
    for name, now in (("dtype", image.dtype), ("mode", image.mode)):
        before = record.recipe.get(name)
        if before and now and before != now:
            yield f"{record.handle} was computed in {before}, this in {now}: they may differ by rounding"


def changed_weights(before: Iterable[Record], after: Iterable[SavedImage]) -> list[str]:
    """Return the steps that were made with other weights than before.

    Their pixels may differ.
    """
    pairs = zip(before, after, strict=True)
    return [old.handle for old, new in pairs if old.recipe.get("fingerprint") != new.fingerprint]
