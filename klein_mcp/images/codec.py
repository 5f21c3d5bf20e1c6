"""Image files <-> upright RGB8, or RGBA8 where the alpha is kept."""

import io
import warnings as python_warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

from engine.contract import Rgb8
from klein_mcp.errors import BadImage, NotEnoughMemory, RequestError
from klein_mcp.foreign import clean_json
from klein_mcp.images import depth, formats, png, provenance
from klein_mcp.images.alpha import Pixels, flat, over
from klein_mcp.images.budget import DECODING, MAX_PIXELS
from klein_mcp.images.outputs import Format
from klein_mcp.limits import MAX_FILE_BYTES

# Pillow's own limit applies to the whole process with an unhelpful message; ours is checked before decoding.
Image.MAX_IMAGE_PIXELS = None

_STRIP = 1_000_000
"""Pixels that are converted at a time, so that a large image needs no second copy."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded file.

    recipe: how it was made, if klein-mcp made it. flattened: whether transparent pixels were given a backdrop.
    alpha: [height, width] of a file that is transparent somewhere; `image` has it flattened, if there was a backdrop.
    """

    image: Rgb8
    warnings: tuple[str, ...]
    recipe: dict[str, Any] | None
    flattened: bool
    alpha: npt.NDArray[np.uint8] | None = None

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """RGB8, or RGBA8 of a transparent file decoded without a backdrop."""
        if self.alpha is None or self.flattened:
            return self.image
        return np.dstack([self.image, self.alpha])


def decode(data: bytes, name: str, backdrop: int | None = 255) -> Decoded:
    """Decode a file. Raises BadImage or NotEnoughMemory.

    name: how the caller refers to it, for messages.
    backdrop: the grey behind transparent pixels; None keeps their colours and the alpha.
    """
    if not data:
        raise BadImage(f"{name} is empty (0 bytes).", hint="Send it again, or another copy.")
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(
            f"{name} has {len(data) / 2**20:.0f} MiB; at most {MAX_FILE_BYTES // 2**20}.", hint="Send a smaller copy."
        )
    try:
        # Pillow warns about odd metadata on stderr. catch_warnings would change the filters of all threads, and leave
        # them changed where two threads leave it in another order than they came.
        python_warnings.filterwarnings("ignore", module=r"PIL\.")
        with DECODING.reserve(declared_pixels(data)):
            return _decode(data, name, backdrop)
    except BadImage:
        raise
    except MemoryError:
        raise NotEnoughMemory(
            f"There is not enough memory to open {name}.", hint="Try again later, or send a smaller copy."
        ) from None
    except UnidentifiedImageError:
        raise BadImage(f"{name} is not an image that can be read.", hint=formats.advice(data)) from None
    except Exception as error:  # on broken files Pillow's decoders raise exceptions of any type
        broken = "is cut short" if "truncated" in str(error).lower() else "is damaged"
        raise BadImage(f"{name} {broken} and cannot be read.", hint="Send it again, or another copy.") from error


def declared_pixels(data: bytes) -> int:
    """Return the size in a file's header, or 0.

    Of a TIFF the largest page counts, as it is the one that is used.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats.READABLE) as opened:
            return formats.largest_page(opened)
    except Exception:  # decode() reports it
        return 0


def _decode(data: bytes, name: str, backdrop: int | None) -> Decoded:
    with Image.open(io.BytesIO(data), formats=formats.READABLE) as opened:
        warnings = formats.choose_page(opened, name)
        _check_size(opened, name)
        # A phone's JPEG often has a thumbnail or a depth map as its second frame (MPO), which is not needed.
        if getattr(opened, "is_animated", False) and opened.format not in ("MPO", "TIFF"):
            warnings.append(f"{name} has several frames; only the first one is used.")
        if opened.format == "PNG":
            depth.narrow_transparency(opened, bits=data[24])
        opened.load()
        recipe = clean_json(provenance.read(opened))
        pixels, alpha = _rgb8(opened, name, warnings, backdrop)
        turn = _TURNS.get(_orientation(opened))
    del opened  # its pixels, before a turn needs another copy
    if alpha is not None and backdrop is not None:
        colour = "white" if backdrop else "black"
        warnings.append(f"{name} is partly transparent; transparent pixels count as {colour}.")
    if turn is not None:
        pixels = np.ascontiguousarray(turn(pixels))
        alpha = None if alpha is None else np.ascontiguousarray(turn(alpha))
    return Decoded(pixels, tuple(warnings), recipe, alpha is not None and backdrop is not None, alpha)


def _check_size(opened: ImageFile.ImageFile, name: str) -> None:
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"{name} is {width}×{height} = {width * height / 1e6:.0f} MP; at most {MAX_PIXELS // 10**6} MP.",
            hint="Send a smaller copy.",
        )


def _rgb8(
    image: ImageFile.ImageFile, name: str, warnings: list[str], backdrop: int | None
) -> tuple[Rgb8, npt.NDArray[np.uint8] | None]:
    """Return RGB8, on the backdrop if any, and alpha if there is."""
    width, height = image.size
    to_srgb = _Srgb(image.info.get("icc_profile"), name, warnings)
    levels = depth.levels(image, name, warnings)
    pixels = np.empty((height, width, 3), np.uint8)
    alpha: npt.NDArray[np.uint8] | None = None
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = image.crop((0, top, width, bottom))
        opaque, strip_alpha = _split_alpha(strip)
        part = np.asarray(to_srgb(depth.eight_bit(opaque, levels)))
        if strip_alpha is not None and bool(np.any(strip_alpha < 255)):
            if alpha is None:
                alpha = np.full((height, width), 255, np.uint8)
            alpha[top:bottom] = strip_alpha
            part = part if backdrop is None else over(np.dstack([part, strip_alpha]), backdrop)
        pixels[top:bottom] = part
    return pixels, alpha


_TURNS: Mapping[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}
"""EXIF orientation -> what puts the image upright."""


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF says nothing about the orientation
        return 1


def _split_alpha(image: Image.Image) -> tuple[Image.Image, npt.NDArray[np.uint8] | None]:
    if image.mode in ("P", "PA") or ("transparency" in image.info and image.mode in ("1", "L", "RGB")):
        image = image.convert("RGBA")
    if image.mode not in ("RGBA", "LA"):
        return image, depth.deep_alpha(image)
    # Greyscale stays greyscale: its colour profile fits no other mode.
    return image.convert("L" if image.mode == "LA" else "RGB"), np.asarray(image.getchannel("A"))


class _Srgb:
    """Converts strips of one image from its colour profile to sRGB."""

    def __init__(self, profile: bytes | None, name: str, warnings: list[str]) -> None:
        self._profile, self._name, self._warnings = profile, name, warnings
        self._transform: Any = None

    def __call__(self, strip: Image.Image) -> Image.Image:
        if self._profile:
            try:
                if self._transform is None:
                    source = ImageCms.ImageCmsProfile(io.BytesIO(self._profile))
                    self._transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), strip.mode, "RGB")
                converted = ImageCms.applyTransform(strip, self._transform)
                if converted is not None:
                    return converted
            except (ImageCms.PyCMSError, OSError, ValueError):
                self._profile = None
                self._warnings.append(f"{self._name} has an unusable colour profile; its colours are taken as sRGB.")
        return strip.convert("RGB")


LONGEST_SIDE: Mapping[Format, int] = {"jpeg": 65_500, "webp": 16_383}
"""Pixels of the longest side that a format can store; PNG stores any."""


def check_sides(kind: Format, width: int, height: int) -> None:
    """Raise RequestError for a size that the format cannot store."""
    longest, most = max(width, height), LONGEST_SIDE.get(kind)
    if most and longest > most:
        raise _cannot_store(kind, f"a side has {longest} pixels, at most {most} are possible")


def encode(image: Pixels, kind: Format = "png", recipe: Mapping[str, Any] | None = None) -> bytes:
    """Encode an image with `recipe` as its provenance. Raises RequestError.

    JPEG gets transparent images on white.
    """
    if kind == "png":
        return png.encode(image, provenance.texts(recipe) if recipe else ())
    return encode_lossy(flat(image) if kind == "jpeg" else image, kind, 95, recipe)


def encode_lossy(
    image: Pixels, kind: Literal["jpeg", "webp"], quality: int, recipe: Mapping[str, Any] | None = None
) -> bytes:
    """Encode as JPEG, which has no alpha, or WebP. Raises RequestError."""
    height, width = image.shape[:2]
    check_sides(kind, width, height)
    options: dict[str, Any] = {"xmp": provenance.xmp(recipe).encode()} if recipe else {}
    options |= {"subsampling": 0 if quality >= 90 else 2} if kind == "jpeg" else {"method": 4}
    out = io.BytesIO()
    try:
        Image.fromarray(image).save(out, kind, quality=quality, **options)
    except (OSError, ValueError) as error:  # Pillow's, whichever of its libraries refuses
        raise _cannot_store(kind, str(error)) from None
    return out.getvalue()


def _cannot_store(kind: Format, reason: str) -> RequestError:
    return RequestError(f"{kind} cannot store it: {reason}.", hint="Choose png, or a smaller size.")


def resize(image: Pixels, width: int, height: int) -> Pixels:
    """Resize with Lanczos unless the size is already right.

    Alpha weighs the colours, so that no hidden one shows at an outline.
    """
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def encode_mask(mask: npt.NDArray[np.uint8]) -> bytes:
    """Return a grey PNG."""
    return png.encode(mask[..., None])


def resize_mask(mask: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Bilinear, which never rings: 0 stays 0 away from what is not."""
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))


PIXEL_ART = 64
"""Colours: an image with no more of them is enlarged without new ones."""


def enlarge(image: Pixels, longest: int) -> Pixels:
    """Resize up by Lanczos, or pixel art by repeating its pixels."""
    height, width = image.shape[:2]
    scale = longest / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > PIXEL_ART:
        return resize(image, *size)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST))


def fit(image: Pixels, longest: int) -> Pixels:
    """Resize to `longest` pixels on the long edge, keeping the aspect ratio."""
    height, width = image.shape[:2]
    scale = longest / max(width, height)
    return resize(image, max(1, round(width * scale)), max(1, round(height * scale)))
