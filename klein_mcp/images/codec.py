"""Image files <-> upright, opaque RGB8."""

import io
import warnings as python_warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from engine.contract import Rgb8
from klein_mcp.errors import BadImage
from klein_mcp.images import png, provenance

MAX_BYTES = 64 * 2**20
"""A 4096² PNG of pure noise is 50 MB."""
MAX_PIXELS = 64_000_000
"""The largest image of an ordinary phone is 50 MP; decoded, 64 MP are 192 MB."""

# Pillow's own limit applies to the whole process with an unhelpful message; ours is checked before decoding.
Image.MAX_IMAGE_PIXELS = None

READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
Format = Literal["png", "jpeg", "webp"]
MIME: Mapping[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_HINTS = {
    b"<svg": "SVG is a drawing, not pixels: export it as PNG.",
    b"<?xm": "SVG is a drawing, not pixels: export it as PNG.",
    b"%PDF": "Export the page as PNG.",
    b"<!DO": "It is a web page: use the URL of the image itself.",
    b"<htm": "It is a web page: use the URL of the image itself.",
}


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded file.

    recipe: how it was made, if klein-mcp made it. flattened: whether it was transparent.
    alpha: [height, width] of a file that is transparent somewhere; `image` has it flattened.
    """

    image: Rgb8
    warnings: tuple[str, ...]
    recipe: dict[str, Any] | None
    flattened: bool
    alpha: npt.NDArray[np.uint8] | None = None


def decode(data: bytes, name: str, backdrop: int = 255) -> Decoded:
    """Decode a file. Raises BadImage.

    name: how the caller refers to it, for messages. backdrop: the grey behind transparent pixels.
    """
    if not data:
        raise BadImage(f"{name} is empty (0 bytes).")
    if len(data) > MAX_BYTES:
        raise BadImage(
            f"{name} has {len(data) / 2**20:.0f} MiB; at most {MAX_BYTES // 2**20}.", hint="Send a smaller copy."
        )
    try:
        with python_warnings.catch_warnings():
            # Pillow warns about odd metadata.
            python_warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=READABLE) as opened:
                return _upright_rgb8(opened, name, backdrop)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{name} is not an image that can be read.", hint=_hint(data)) from None
    except Exception as error:  # on broken files Pillow's decoders raise exceptions of any type
        broken = "is cut short" if "truncated" in str(error).lower() else "is damaged"
        raise BadImage(f"{name} {broken} and cannot be read.", hint="Send it again, or another copy.") from error


def _hint(data: bytes) -> str:
    start = data[:256].lstrip()[:4]
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "HEIC is not supported: export it as JPEG."
    return _HINTS.get(start, "It takes PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF.")


def _upright_rgb8(opened: ImageFile.ImageFile, name: str, backdrop: int) -> Decoded:
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"{name} is {width}×{height} = {width * height / 1e6:.0f} MP; at most {MAX_PIXELS // 10**6} MP.",
            hint="Send a smaller copy.",
        )
    warnings = []
    # A phone's JPEG often has a thumbnail or a depth map as its second frame (MPO), which is not needed.
    if getattr(opened, "is_animated", False) and opened.format != "MPO":
        warnings.append(f"{name} has several frames; only the first one is used.")
    opened.load()
    recipe = provenance.read(opened)
    opaque, alpha = _split_alpha(_upright(opened))
    rgb = _to_srgb(_eight_bit(opaque), opened.info.get("icc_profile"), name, warnings)
    pixels = np.asarray(rgb)
    flattened = alpha is not None and bool(np.any(alpha < 255))
    if alpha is not None and flattened:
        colour = "white" if backdrop else "black"
        warnings.append(f"{name} is partly transparent; transparent pixels count as {colour}.")
        pixels = _flattened(pixels, alpha, backdrop)
    return Decoded(np.ascontiguousarray(pixels), tuple(warnings), recipe, flattened, alpha if flattened else None)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing about the orientation
        return image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, npt.NDArray[np.uint8] | None]:
    if image.mode in ("P", "PA") or ("transparency" in image.info and image.mode in ("1", "L", "RGB")):
        image = image.convert("RGBA")
    if image.mode not in ("RGBA", "LA"):
        return image, None
    # Greyscale stays greyscale: its colour profile fits no other mode.
    return image.convert("L" if image.mode == "LA" else "RGB"), np.asarray(image.getchannel("A"))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale deep greyscale to 8 bits, which convert() would clip."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image, np.float64)
    top = 255.0 if image.mode == "F" and values.max(initial=0) > 1 else 1.0 if image.mode == "F" else 65535.0
    return Image.fromarray(np.clip(np.nan_to_num(values) * (255 / top) + 0.5, 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None, name: str, warnings: list[str]) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            warnings.append(f"{name} has an unusable colour profile; its colours are taken as sRGB.")
    return image.convert("RGB")


def _flattened(pixels: Rgb8, alpha: npt.NDArray[np.uint8], backdrop: int) -> Rgb8:
    opacity = alpha[..., None].astype(np.uint16)
    return ((pixels * opacity + backdrop * (255 - opacity) + 127) // 255).astype(np.uint8)


def encode(image: Rgb8, kind: Format = "png", recipe: Mapping[str, Any] | None = None) -> bytes:
    """Encode an image with `recipe` as its provenance."""
    if kind == "png":
        return png.encode(image, provenance.texts(recipe) if recipe else ())
    out = io.BytesIO()
    options: dict[str, Any] = {"xmp": provenance.xmp(recipe).encode()} if recipe else {}
    if kind == "jpeg":
        Image.fromarray(image).save(out, "JPEG", quality=95, subsampling=0, **options)
    else:
        Image.fromarray(image).save(out, "WEBP", quality=95, method=4, **options)
    return out.getvalue()


def resize(image: Rgb8, width: int, height: int) -> Rgb8:
    """Resize with Lanczos unless the size is already right."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def resize_mask(mask: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Bilinear, which never rings: 0 stays 0 away from what is not."""
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))


def fit(image: Rgb8, longest: int) -> Rgb8:
    """Resize to `longest` pixels on the long edge, keeping the aspect ratio."""
    height, width = image.shape[:2]
    scale = longest / max(width, height)
    return resize(image, max(1, round(width * scale)), max(1, round(height * scale)))


fitted = fit  # until every caller uses the new name
