"""Encodes images of the library for callers elsewhere. Blocking."""

import io
import struct
from collections.abc import Mapping
from typing import Any

from klein_mcp.images import credentials
from klein_mcp.jobs.service import Service

BEST_QUALITY = 95
"""Above it JPEG and WebP files grow fast and look no better; output_compression 100 means it."""


def outgoing(
    service: Service, handle: str, kind: str = "png", compression: int = 100, *, opaque: bool = False
) -> bytes:
    """Return an image of the library as a file that leaves it.

    opaque: on white, if it has alpha. It is signed where the settings say so. Raises RequestError.
    """
    record = service.store.get(handle)
    data = encode(
        service.store.read(record), kind, compression, record.provenance, opaque=opaque and record.transparent
    )
    signer = credentials.from_setting(service.settings.credentials, service.settings.home)
    return data if signer is None else credentials.sign_record(service.store, record, data, f"image/{kind}", signer)


def encode(
    png: bytes,
    kind: str,
    compression: int = 100,
    recipe: Mapping[str, Any] | None = None,
    *,
    opaque: bool = False,
) -> bytes:
    """Convert a PNG, with its alpha. JPEG gets it on white.

    recipe: written into the file as provenance, which the PNG has already. opaque: on white in every format.
    """
    if kind == "png" and not opaque:
        return png
    import numpy as np
    from PIL import Image

    from klein_mcp.images import codec, provenance
    from klein_mcp.images.alpha import flat

    options: dict[str, Any] = {"xmp": provenance.xmp(recipe).encode()} if recipe else {}
    quality = min(BEST_QUALITY, max(1, compression))
    out = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        shown = Image.fromarray(flat(np.asarray(image))) if opaque or kind == "jpeg" else image
        if kind == "png":
            return codec.encode(np.asarray(shown), "png", recipe)
        if kind == "jpeg":
            shown.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2, **options)
        else:
            shown.save(out, "WEBP", quality=quality, method=4, **options)
    return out.getvalue()


def png_size(png: bytes) -> tuple[int, int]:
    """Return width and height from the header of a PNG."""
    return struct.unpack(">II", png[16:24])
