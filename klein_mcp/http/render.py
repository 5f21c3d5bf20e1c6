"""Encodes images of the library for callers elsewhere. Blocking."""

import io
import struct
from collections.abc import Mapping
from typing import Any

from klein_mcp.errors import RequestError
from klein_mcp.images import credentials
from klein_mcp.images.outputs import Format
from klein_mcp.jobs.service import Service

BEST_QUALITY = 95
"""Above it JPEG and WebP files grow fast and look no better; output_compression 100 means it."""


def outgoing(
    service: Service, handle: str, kind: Format = "png", compression: int = 100, *, opaque: bool = False
) -> bytes:
    """Return an image of the library as a file that leaves it.

    opaque: on white, if it has alpha. It is signed where the settings say so. Raises RequestError.
    """
    record = service.store.get(handle)
    png = service.store.read(record)
    try:
        data = encode(png, kind, compression, record.provenance, opaque=opaque and record.transparent)
    except RequestError as error:
        raise RequestError(f"{handle} is in the library: {error.message}", hint=error.hint) from None
    signer = credentials.from_setting(service.settings.credentials, service.settings.home)
    return data if signer is None else credentials.sign_record(service.store, record, data, f"image/{kind}", signer)


def encode(
    png: bytes,
    kind: Format,
    compression: int = 100,
    recipe: Mapping[str, Any] | None = None,
    *,
    opaque: bool = False,
) -> bytes:
    """Convert a PNG. JPEG gets its alpha on white. Raises RequestError.

    recipe: written into the file as provenance, which the PNG has already. opaque: on white in every format.
    """
    if kind == "png" and not opaque:
        return png
    from klein_mcp.images.budget import DECODING

    width, height = png_size(png)
    return DECODING.run(width * height, lambda: _converted(png, kind, compression, recipe, opaque))


def _converted(png: bytes, kind: "Format", compression: int, recipe: Mapping[str, Any] | None, opaque: bool) -> bytes:
    import numpy as np
    from PIL import Image

    from klein_mcp.images import codec
    from klein_mcp.images.alpha import flat

    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        pixels = np.asarray(image)
    shown = flat(pixels) if opaque or kind == "jpeg" else pixels
    if kind == "png":
        return codec.encode(shown, "png", recipe)
    return codec.encode_lossy(shown, kind, min(BEST_QUALITY, max(1, compression)), recipe)


def png_size(png: bytes) -> tuple[int, int]:
    """Return width and height from the header of a PNG."""
    return struct.unpack(">II", png[16:24])
