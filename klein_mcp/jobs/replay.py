"""Painting a picture's whole history again: every edit that led to it, on its own base or on another."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.families.klein.variants import VARIANTS
from klein_mcp.errors import RequestError
from klein_mcp.images.library import Record, Store
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.service import Service

if TYPE_CHECKING:
    from klein_mcp.jobs.save import SavedImage


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What is to be painted again, parents first. base: the picture at the root, following first parents."""

    steps: tuple[Record, ...]
    base: Record


def plan(store: Store, handle: str, *, onto: bool) -> ReplayPlan:
    """onto: the base will be another, so only what came from it is painted again. Raises RequestError."""
    picture = store.get(handle)
    ancestors = _ancestors(store, picture)
    base = picture
    while base.parents:
        base = ancestors[base.parents[0]]
    if onto and base is picture:
        raise RequestError(f"{handle} was not made from another picture.", hint="Leave out --onto.")
    painted = [record for record in _parents_first(ancestors, picture) if record.tool != "open"]
    if onto:
        painted = [record for record in painted if record is not base and base.handle in _line(ancestors, record)]
    if not painted:
        raise RequestError(f"{handle} was opened from a file, not painted.", hint="Name a painted picture.")
    return ReplayPlan(tuple(painted), base)


async def replay(
    service: Service, handle: str, call: CallContext, *, onto: str | None = None, seed: int | None = None
) -> list["SavedImage"]:
    """onto: a reference to paint on instead of the base. seed: for every step, instead of its own.

    Raises RequestError or EngineError.
    """
    chain = plan(service.store, handle, onto=onto is not None)
    again: dict[str, str] = {}
    if onto is not None:
        again[chain.base.handle] = (await service.open(onto, call)).record.handle
    made: list[SavedImage] = []
    for record in chain.steps:
        outcome = await service.paint(_order(record, again, seed), call)
        made.append(outcome.made[0])
        again[record.handle] = outcome.made[0].record.handle
    return made


def _order(record: Record, again: dict[str, str], seed: int | None) -> ImageRequest:
    try:
        order = ImageRequest.from_json(record.recipe["order"])
    except (KeyError, TypeError, ValueError):
        raise RequestError(f"{record.handle} has no recipe that can be painted again.") from None
    return replace(
        order,
        images=tuple(again.get(image, image) for image in order.images),
        mask=again.get(order.mask, order.mask) if order.mask else None,
        seed=order.seed if seed is None else seed,
        # What auto became then: by now it may be another model.
        model=record.recipe["model"] if record.recipe["model"] in VARIANTS else order.model,
    )


def _ancestors(store: Store, picture: Record) -> dict[str, Record]:
    """By handle, the picture itself included; deleted ones too, as their recipes are kept."""
    found = {picture.handle: picture}
    waiting = list(picture.parents)
    while waiting:
        handle = waiting.pop()
        record = found[handle] if handle in found else store.find(handle)
        if record is None:
            raise RequestError(f"{handle}, from which {picture.handle} was made, is not in this library.")
        if handle not in found:
            found[handle] = record
            waiting += record.parents
    return found


def _parents_first(ancestors: dict[str, Record], picture: Record) -> list[Record]:
    """Not by the time they were made: a clock may have been set back between two of them."""
    order: dict[str, Record] = {}
    waiting = [picture.handle]
    while waiting:
        record = ancestors[waiting[-1]]
        missing = next((parent for parent in record.parents if parent not in order), None)
        if missing is None:
            order[waiting.pop()] = record
        else:
            waiting.append(missing)
    return list(order.values())


def _line(ancestors: dict[str, Record], record: Record) -> set[str]:
    """All that `record` was made from."""
    line: set[str] = set()
    waiting: list[str] = list(record.parents)
    while waiting:
        handle = waiting.pop()
        if handle not in line:
            line.add(handle)
            waiting += ancestors[handle].parents
    return line


def changed_weights(before: Iterable[Record], after: Iterable["SavedImage"]) -> list[str]:
    """Steps that were painted with other weights than the first time, so that their pixels may differ."""
    pairs = zip(before, after, strict=True)
    return [old.handle for old, new in pairs if old.recipe.get("fingerprint") != new.painting.fingerprint]
