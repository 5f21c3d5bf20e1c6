"""The canvases nano is trained on, and their nine places.

Scenes are laid out in units. The square canvas is 128 × 128 units at every resolution, so one scene can be rendered at
128 × 128 (scale 1, as it is scored) and at 256 × 256 pixels (scale 2, as nano paints it).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

TOKEN = 16
"""Units a token spans on each side: 32 pixels where there are two to a unit."""

SIZES = (32, 56, 88)
"""Sides of the three object sizes in units: small, normal, big."""

REACH = (48, 32, 16)
"""Units from the middle of a square canvas to the centre of an object at its side, for each size.

Multiples of a token: an object then has the same tokens in every place, so what is learned of it in one place holds in
all.
"""

SQUARE = 128
"""Side of the square canvas in units."""

Slot = tuple[int, int]
"""(column, row), each -1, 0 or 1: left, middle, right; top, middle, bottom."""


@dataclass(frozen=True)
class Frame:
    """A canvas: width and height in units, and pixels per unit."""

    width: int = SQUARE
    height: int = SQUARE
    scale: int = 1

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width * self.scale, self.height * self.scale

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens across and down."""
        return self.width // TOKEN, self.height // TOKEN

    def centre(self, size: int, slot: Slot) -> tuple[int, int]:
        """Return (x, y) in units of an object in that place."""
        return _centre(self.width, size, slot[0]), _centre(self.height, size, slot[1])

    def box(self, size: int, slot: Slot) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom in units of an object there."""
        (x, y), side = self.centre(size, slot), SIZES[size]
        return x - side // 2, y - side // 2, x + side // 2, y + side // 2


@lru_cache(maxsize=256)
def _centre(length: int, size: int, place: int) -> int:
    # The middle is rounded to whole tokens: half a token off would give every sprite other tokens.
    middle = length // 2 // TOKEN * TOKEN
    reach = max(0, REACH[size] + middle - SQUARE // 2)
    return middle + place * reach


UNITS = Frame()
"""The square at one pixel per unit."""
UNIT_SHAPES = tuple(
    Frame(*sides)
    for wide, narrow in ((160, 96), (144, 96), (144, 112), (128, 112), (128, 96))
    for sides in ((wide, narrow), (narrow, wide))
)
"""Its area in the sizes the engine picks for 16:9, 3:2, 4:3, their upright forms, and photographs."""
NATIVE = replace(UNITS, scale=2)
"""256 × 256 pixels."""
NATIVE_SHAPES = tuple(replace(shape, scale=2) for shape in UNIT_SHAPES)
"""The native area in other shapes."""


def canvases(native_size: int) -> tuple[Frame, tuple[Frame, ...]]:
    """Return the square of a size and its other shapes."""
    return {SQUARE: (UNITS, UNIT_SHAPES), 2 * SQUARE: (NATIVE, NATIVE_SHAPES)}[native_size]
