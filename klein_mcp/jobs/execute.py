"""An order at work: its references opened, its jobs for the engine, its paintings put away. Blocking."""

from dataclasses import dataclass, replace

from engine.contract import Job, Result, Rgb8
from klein_mcp.errors import RequestError
from klein_mcp.images import region
from klein_mcp.images.library import Record, Store
from klein_mcp.images.region import EditRegion
from klein_mcp.images.resolver import ImageResolver
from klein_mcp.jobs.request import GRID, ImageRequest
from klein_mcp.jobs.save import SavedImage, finish

WHITE = 255
MISSHAPEN = 0.03
"""How far a picture's shape may be from what was asked before it is told: what a small model's few sizes miss."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """order: with a handle for every reference. original, patch: of an edit that keeps its size."""

    order: ImageRequest
    references: tuple[Rgb8, ...]
    parents: tuple[Record, ...]
    warnings: tuple[str, ...]
    original: "Rgb8 | None" = None
    patch: EditRegion | None = None

    @classmethod
    def open(cls, order: ImageRequest, sources: ImageResolver, client: str) -> "PreparedRequest":
        """Raises RequestError."""
        images = [sources.open(reference, client) for reference in order.images]
        masks = [sources.open(order.mask, client, backdrop=0)] if order.mask else []
        if masks and masks[0].record.recipe.get("flattened_on") == WHITE:
            raise RequestError(
                f"The mask {order.mask} was transparent when it was opened as a picture, and is white there now.",
                hint="Give the mask's own file as mask.",
            )
        opened = [*images, *masks]
        work = cls(
            replace(
                order,
                images=tuple(one.record.handle for one in images),
                mask=masks[0].record.handle if masks else None,
            ),
            tuple(one.image for one in images),
            tuple(one.record for one in opened),
            (
                *(warning for one in opened for warning in one.warnings),
                *(warning for one in masks for warning in region.doubt(one.image)),
            ),
        )
        if not order.keep_size:
            return work
        original = work.references[0]
        patch = region.patch(original, order.region, masks[0].image if masks else None)
        return replace(work, references=(patch.cut(original),), original=original, patch=patch)

    def jobs(self) -> list[Job]:
        """One per picture: the same job with seeds that count up."""
        order = self.order
        return [
            Job(
                prompt=order.prompt,
                references=self.references,
                width=order.width,
                height=order.height,
                align=order.keep_size,
                close_up=self.patch is not None and self.patch.part_of_more,
                aspect=order.aspect,
                seed=order.seed + k,
                model=order.model,
            )
            for k in range(order.count)
        ]

    def misshapen(self, painting: Result) -> tuple[str, ...]:
        """A word where the model's sizes do not meet the shape that was asked for."""
        if self.order.aspect is None:
            return ()
        across, along = self.order.aspect
        height, width = painting.image.shape[:2]
        if abs(width / height * along / across - 1) <= MISSHAPEN:
            return ()
        size = f"{width}×{height}, not quite {across}:{along}"
        return (f"the picture is {size}: {painting.model} paints in steps of {GRID} pixels",)

    def finish(self, store: Store, painting: Result, client: str) -> SavedImage:
        """The picture in the library."""
        return finish(
            store, self.order, painting, self.parents, client=client, original=self.original, patch=self.patch
        )
