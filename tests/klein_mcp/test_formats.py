"""Image files that are not what they seem, and names of formats that are not read."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from klein_mcp.errors import BadImage
from klein_mcp.images import codec, png
from tests.images import file, scene


def tiff(image: Image.Image, **tags: Any) -> bytes:
    """Write a TIFF with more tags: number -> value, as `_50706=…`."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[int(name[1:])] = value
    out = io.BytesIO()
    image.save(out, "TIFF", tiffinfo=info)
    return out.getvalue()


@pytest.mark.parametrize("tags", [{"_50706": b"\x01\x04\0\0"}, {"_254": 1, "_330": 8}], ids=["DNG", "SubIFDs"])
def test_raw_file_with_a_thumbnail_is_refused(tags: dict[str, Any]) -> None:
    with pytest.raises(BadImage, match="camera's raw file"):
        codec.decode(tiff(Image.new("RGB", (64, 48)), **tags), "photo.dng")


def test_largest_image_of_a_pyramid_is_used() -> None:
    small, large = Image.fromarray(scene(40, 30)), Image.fromarray(scene(160, 120))
    out = io.BytesIO()
    small.save(out, "TIFF", save_all=True, append_images=[large])
    decoded = codec.decode(out.getvalue(), "scan.tif")
    assert decoded.image.shape == (120, 160, 3)
    assert (decoded.image == scene(160, 120)).all()
    assert "the largest one is used" in decoded.warnings[0]


def test_tiff_counts_with_the_page_that_is_used() -> None:
    """A first page of one pixel had let any other past the bound on memory."""
    out = io.BytesIO()
    Image.new("L", (1, 1)).save(out, "TIFF", save_all=True, append_images=[Image.new("L", (300, 200))])
    assert codec.declared_pixels(out.getvalue()) == 300 * 200


def test_no_more_pages_of_a_tiff_are_read_than_are_compared() -> None:
    """Thousands of pages took Pillow seconds to count."""
    out = io.BytesIO()
    pages = [Image.new("L", (64 + page, 48)) for page in range(70)]
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    decoded = codec.decode(out.getvalue()[:-10_000], "scan.tif")  # without the last two
    assert decoded.warnings == ("scan.tif has over 64 images of different sizes; the largest one is used.",)
    assert decoded.image.shape[1] == 64 + 64


def test_twelve_bits_in_sixteen_are_scaled_by_what_the_file_declares() -> None:
    values = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    declared = codec.decode(tiff(Image.fromarray(values), _281=4095), "scan.tif")
    assert declared.image.max() == 255
    assert declared.warnings == ()
    undeclared = codec.decode(tiff(Image.fromarray(values)), "scan.tif")
    assert undeclared.image.max() == 16
    assert "brightest value is 4095 of 65535" in undeclared.warnings[0]


def planar_tiff(samples: np.ndarray, kind: int) -> bytes:
    """Write [3, h, w] samples plane by plane.

    kind: TIFF's SampleFormat.
    """
    _, height, width = samples.shape
    bits = samples.itemsize * 8
    data, at = samples.tobytes(), 8 + 2 + 12 * 11 + 4
    extra = struct.pack("<3H", bits, bits, bits) + struct.pack("<3I", *(at + 30 + i * len(data) // 3 for i in range(3)))
    extra += struct.pack("<3I", *[len(data) // 3] * 3)
    rows = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, at + 6),
        (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 3, at + 18), (284, 3, 1, 2), (339, 3, 1, kind),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", *row) for row in rows)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(rows)) + directory + b"\0" * 4 + extra + data


def planes(dtype: Any, scale: int) -> np.ndarray:
    return (np.ascontiguousarray(scene(40, 24).transpose(2, 0, 1)).astype(dtype) * scale).astype(dtype)


def test_planar_tiff_is_read() -> None:
    decoded = codec.decode(planar_tiff(planes(np.uint8, 1), 1), "scan.tif")
    assert (decoded.image == scene(40, 24)).all()


@pytest.mark.parametrize(("dtype", "kind"), [(np.uint16, 1), (np.float32, 3)])
def test_deep_planar_tiff_is_refused_not_read_wrong(dtype: Any, kind: int) -> None:
    with pytest.raises(BadImage, match=r"bits .*export it as"):
        codec.decode(planar_tiff(planes(dtype, 257), kind), "scan.tif")


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypcrx \0", "raw file"),
        (b"II*\0\x10\0\0\0CR\x02\0", "raw file"),
        (b"FUJIFILMCCD-RAW ", "raw file"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"8BPS\0\x01", "Photoshop"),
        (b"gimp xcf v011", "GIMP"),
        (b"v/1\x01", "OpenEXR"),
        (b"\0\0\x01\0\x01\0", "Icons"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"\0\0\0\x20ftypavif", "AVIF that is damaged"),
        (b"PK\x03\x04", "ZIP"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "SVG"),
        (b"<!doctype html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_unreadable_format_is_named(start: bytes, name: str) -> None:
    with pytest.raises(BadImage, match="is not an image that can be read") as caught:
        codec.decode(start + bytes(64), "photo")
    assert name in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "I;16", "CMYK", "1"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_strips_and_orientation_equal_the_image_converted_at_once(
    mode: str, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(scene(37, 23)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = file(image, "TIFF" if mode == "CMYK" else "PNG", exif=exif)
    whole = codec.decode(data, "photo")
    monkeypatch.setattr(codec, "_STRIP", 37 * 5)
    strips = codec.decode(data, "photo")
    assert (strips.image == whole.image).all()
    assert whole.image.shape[:2] == ((23, 37) if turn < 5 else (37, 23))


def grey_tiff(samples: np.ndarray, *, photometric: int = 1, kind: int = 1, bits: int = 0) -> bytes:
    """Write [h, w] samples as TIFF.

    photometric: 0 if white is zero. kind: TIFF's SampleFormat. bits: 12 packs two samples in three bytes.
    """
    height, width = samples.shape
    data = samples.tobytes()
    if bits == 12:
        first, second = samples.reshape(-1, 2).T.astype(int)
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
    rows = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits or samples.itemsize * 8), (259, 3, 1, 1),
        (262, 3, 1, photometric), (273, 4, 1, 8 + 2 + 12 * 10 + 4), (277, 3, 1, 1), (278, 4, 1, height),
        (279, 4, 1, len(data)), (339, 3, 1, kind),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", *row) for row in rows)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(rows)) + directory + b"\0" * 4 + data


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    "data",
    [
        grey_tiff((RAMP * 255).astype(np.uint8)),
        grey_tiff((255 - RAMP * 255).astype(np.uint8), photometric=0),
        grey_tiff((65535 - RAMP * 65535).astype(np.uint16), photometric=0),
        grey_tiff((1 - RAMP).astype(np.float32), photometric=0, kind=3),
        grey_tiff((RAMP * 4095).astype(np.uint16), bits=12),
        grey_tiff((RAMP * 65535).astype(np.int32), kind=2),
        grey_tiff((RAMP * 255).astype(np.float32), kind=3),
    ],
    ids=["8", "8 inverted", "16 inverted", "float inverted", "12", "16 in 32", "float to 255"],
)
def test_grey_tiff_of_any_depth_is_the_same_ramp(data: bytes) -> None:
    decoded = codec.decode(data, "scan.tif")
    assert np.abs(decoded.image[..., 0].astype(float) - RAMP * 255).max() <= 1
    assert decoded.warnings == ()


@pytest.mark.parametrize(
    ("data", "black", "white"),
    [
        (grey_tiff((RAMP * 1.02).astype(np.float32), kind=3), "0", "1.02"),
        (grey_tiff((RAMP * 65535).astype(np.float32), kind=3), "0", "65535"),
        (grey_tiff((RAMP * 2 - 1).astype(np.float32), kind=3), "-1", "1"),
        (grey_tiff((RAMP * 3e6).astype(np.int32), kind=2), "0", "3e+06"),
        (grey_tiff((RAMP * 3000 - 1500).astype(np.int16), kind=2), "-1500", "1500"),
    ],
)
def test_unusual_range_of_values_is_scaled_with_a_warning(data: bytes, black: str, white: str) -> None:
    decoded = codec.decode(data, "scan.tif")
    assert np.abs(decoded.image[..., 0].astype(float) - RAMP * 255).max() <= 1
    assert decoded.warnings == (f"scan.tif holds values from {black} to {white}; they were scaled to black and white.",)


def test_infinite_values_do_not_set_the_scale() -> None:
    values = (RAMP * 2).astype(np.float32)
    values[0, 0], values[0, 1], values[-1, -1] = np.nan, -np.inf, np.inf
    decoded = codec.decode(grey_tiff(values, kind=3), "scan.tif")
    assert np.abs(decoded.image[..., 0].astype(float) - RAMP * 255).max() <= 1


def test_unsigned_values_beyond_what_is_read_are_refused() -> None:
    with pytest.raises(BadImage, match="32 bits"):
        codec.decode(grey_tiff((RAMP * (2**32 - 1)).astype(np.uint32)), "scan.tif")


def transparent_png(samples: np.ndarray, depth: int, key: bytes) -> bytes:
    """Write samples as PNG, one colour of which is transparent."""
    height, width, channels = samples.shape
    if depth < 8:
        packed = np.packbits(np.unpackbits(samples[..., None], axis=-1)[..., 8 - depth :].reshape(height, -1), axis=1)
        lines = [b"\0" + line.tobytes() for line in packed]
    else:
        lines = [b"\0" + line.astype(f">u{depth // 8}").tobytes() for line in samples]
    header = struct.pack("!IIBBBBB", width, height, depth, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    return png.SIGNATURE + b"".join(
        struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(("depth", "channels"), [(2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)])
def test_transparent_colour_of_png_is_kept_at_every_depth(depth: int, channels: int) -> None:
    colour = 0xAA55 if depth == 16 else (2**depth - 1) * 2 // 3
    samples = np.zeros((8, 8, channels), np.uint16 if depth == 16 else np.uint8)
    samples[:, :4] = colour
    found = codec.decode(transparent_png(samples, depth, struct.pack("!H", colour) * channels), "it.png", None)
    assert found.alpha is not None
    assert (found.alpha[:, :4] == 0).all()
    assert (found.alpha[:, 4:] == 255).all()
    assert (found.image[:, :4] == 170).all()
