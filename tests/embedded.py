"""Size and limits of the embedded model, and its images as its scorer takes them."""

from engine.contract import GRID, Rgb8
from engine.families.klein.variants import EMBEDDED, VARIANTS
from engine.nano.training.frames import SQUARE, Frame
from engine.nano.training.score import in_units as average

SIDE = VARIANTS[EMBEDDED].native_size
TOKENS = (SIDE // GRID) ** 2
"""Of an image, as the OpenAI API counts them."""
MAX_REFERENCES = VARIANTS[EMBEDDED].max_references
SCALE = SIDE // SQUARE


def in_units(image: Rgb8) -> Rgb8:
    """Return an image of the embedded model at one pixel per unit of its scenes."""
    height, width = image.shape[:2]
    return average(image, Frame(width // SCALE, height // SCALE, SCALE))
