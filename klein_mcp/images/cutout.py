"""Cuts images of the library out of plain backgrounds."""

from klein_mcp.errors import RequestError
from klein_mcp.images import alpha
from klein_mcp.images.alpha import Cutout, Pixels


def of_plain(image: Pixels, handle: str) -> Cutout:
    """Return a cut-out made without painting. Raises RequestError.

    An image that has alpha already stays as it is.
    """
    if image.shape[2] == 4:
        return Cutout(image, alpha.measure(image))
    cut = alpha.cut_out(image)
    if cut is None:
        raise RequestError(f"{handle} has no plain background that could be cut away.", action="repaint")
    if cut.checks.error:
        raise RequestError(f"{handle} cannot be cut out of its background: {cut.checks.error}.", action="repaint")
    return cut
