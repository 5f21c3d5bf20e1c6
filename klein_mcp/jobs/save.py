"""From a painting to a picture of the library: put back into its original, recorded with its parents, saved."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.contract import Result, Rgb8
from klein_mcp.images import codec, region, resolver
from klein_mcp.images.library import Record, Store
from klein_mcp.jobs.request import ImageRequest


@dataclass(frozen=True, slots=True)
class SavedImage:
    """A picture in the library, still at hand.

    changed: the share of pixels that differ from the picture that was edited; None where none was.
    """

    image: Rgb8
    record: Record
    painting: Result
    changed: float | None
    save_ms: float

    def to_json(self) -> dict[str, Any]:
        """Without the pixels, which the library has."""
        painting = self.painting
        return {
            "handle": self.record.handle,
            "seed": str(painting.seed),
            "model": painting.model,
            "fingerprint": painting.fingerprint,
            "steps": painting.steps,
            "guidance": painting.guidance,
            "cache": dict(painting.cache),
            "changed": self.changed,
            "save_ms": self.save_ms,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], store: Store) -> "SavedImage":
        """Raises UnknownImage if it was deleted since."""
        record = store.get(data["handle"])
        image = codec.decode(store.read(record), record.handle).image
        names = ("model", "fingerprint", "steps", "guidance", "cache")
        painting = Result(image=image, seed=int(data["seed"]), **{name: data[name] for name in names})
        return cls(image, record, painting, data["changed"], data["save_ms"])


def finish(
    store: Store,
    order: ImageRequest,
    painting: Result,
    parents: tuple[Record, ...],
    *,
    client: str,
    original: "Rgb8 | None" = None,
    patch: region.EditRegion | None = None,
) -> SavedImage:
    """order: with handles for references. original, patch: of an edit that keeps its size. Blocking."""
    started = time.perf_counter()
    image, changed = painting.image, None
    if original is not None and patch is not None:
        image = patch.paste(image, original)
        changed = round(float(np.mean(np.any(image != original, axis=2))), 4)
    handle = store.new_handle()
    height, width = image.shape[:2]
    recipe = {
        "image": handle,
        "order": replace(order, count=1, seed=painting.seed).to_json(),
        "seed": str(painting.seed),
        "model": painting.model,
        "fingerprint": painting.fingerprint,
        "steps": painting.steps,
        "guidance": painting.guidance,
        "width": width,
        "height": height,
        "parents": [parent.handle for parent in parents],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    record = store.put(
        codec.encode(image, "png", recipe),
        handle=handle,
        pixels=resolver.fingerprint(image),
        size=(width, height),
        client=client,
        tool=order.tool,
        recipe=recipe,
        parents=recipe["parents"],
        prompt=order.prompt,
    )
    return SavedImage(image, record, painting, changed, 1000 * (time.perf_counter() - started))
