"""Image files that are not what they seem, and names of formats that are not read."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from klein_mcp.errors import BadImage
from klein_mcp.images import codec
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
