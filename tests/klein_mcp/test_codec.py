"""Whatever kind of file comes in, upright opaque RGB8 comes out, or one line that says why not."""

import contextlib
import io
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageCms

from klein_mcp.errors import BadImage
from klein_mcp.foreign import well_formed
from klein_mcp.images import codec, png, provenance
from klein_mcp.images.outputs import Format
from tests.images import file, noise, pixels, scene

SCENE = scene(48, 32)


def decoded(data: bytes) -> codec.Decoded:
    found = codec.decode(data, "it")
    assert found.image.dtype == np.uint8
    assert found.image.ndim == 3
    assert found.image.shape[2] == 3
    assert found.image.flags.c_contiguous
    return found


def off_by(image: Any, other: Any) -> int:
    return int(np.abs(image.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG", "AVIF"])
def test_ordinary_files_of_every_kind_are_read(kind: str):
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    found = decoded(file(SCENE, kind, **({"lossless": True} if kind == "WEBP" else options)))
    assert off_by(found.image, SCENE) <= {"GIF": 60, "JPEG": 8, "AVIF": 12}.get(kind, 0)
    assert found.warnings == ()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_that_reports_it_lies_on_its_side_is_put_upright(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = {  # how the stored pixels must be turned to show the scene
        1: SCENE,
        2: SCENE[:, ::-1],
        3: SCENE[::-1, ::-1],
        4: SCENE[::-1],
        5: SCENE.transpose(1, 0, 2),
        6: np.rot90(SCENE, 1),
        7: np.rot90(SCENE, 1)[:, ::-1][::-1, ::-1].transpose(1, 0, 2)[::-1].transpose(1, 0, 2),
        8: np.rot90(SCENE, -1),
    }[orientation]
    if orientation == 7:
        lying = SCENE[::-1, ::-1].transpose(1, 0, 2)
    assert (decoded(file(np.ascontiguousarray(lying), "PNG", exif=exif)).image == SCENE).all()


def test_transparency_becomes_white_with_warning():
    rgba = np.dstack([SCENE, np.full(SCENE.shape[:2], 255, np.uint8)])
    assert decoded(file(rgba)).warnings == ()
    rgba[:16, :, 3] = 0
    found = decoded(file(rgba))
    assert (found.image[:16] == 255).all()
    assert (found.image[16:] == SCENE[16:]).all()
    assert "transparent" in found.warnings[0]


def test_half_transparent_is_half_white():
    grey = np.full((8, 8, 4), 100, np.uint8)
    grey[..., 3] = 128
    assert off_by(decoded(file(grey)).image, np.full((8, 8, 3), 178, np.uint8)) <= 1


def test_palette_with_transparent_colour_is_read():
    paletted = Image.fromarray(SCENE).quantize(8)
    found = decoded(file(paletted, "PNG", transparency=0))
    assert "transparent" in found.warnings[0]
    assert decoded(file(paletted)).warnings == ()


def test_greyscale_with_alpha_and_bilevel_are_read():
    grey = Image.fromarray(SCENE).convert("LA")
    assert decoded(file(grey)).image.shape == SCENE.shape
    assert set(np.unique(decoded(file(Image.fromarray(SCENE).convert("1"))).image)) == {0, 255}


def test_sixteen_bits_are_scaled_not_cut():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    found = decoded(file(Image.fromarray(ramp)))
    assert off_by(found.image[..., 0], (ramp / 257).round().astype(np.uint8)) <= 1


def test_floating_point_is_scaled():
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64).astype(np.float32)
    found = decoded(file(Image.fromarray(ramp), "TIFF"))
    assert off_by(found.image[..., 0], (ramp * 255).round().astype(np.uint8)) <= 1


def test_cmyk_is_read():
    found = decoded(file(Image.fromarray(SCENE).convert("CMYK"), "JPEG", quality=100))
    assert off_by(found.image, SCENE) <= 24


def test_another_colour_space_becomes_srgb():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    in_lab = ImageCms.profileToProfile(Image.fromarray(red), srgb, lab, outputMode="LAB")
    assert in_lab is not None
    found = decoded(file(in_lab, "TIFF", icc_profile=lab.tobytes()))
    assert off_by(found.image, red) <= 10  # observed 8: eight bits of Lab are coarse
    assert found.warnings == ()


def test_broken_colour_profile_is_reported_and_does_no_harm():
    found = decoded(file(SCENE, "PNG", icc_profile=b"not a profile" * 100))
    assert (found.image == SCENE).all()
    assert "colour profile" in found.warnings[0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_first_is_used_with_warning(kind: str):
    frames = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in (10, 240)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=100)
    found = decoded(out.getvalue())
    assert found.image.max() < 20
    assert "only the first one" in found.warnings[0]


# -- hostile files -----------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))


def giant(width: int, height: int) -> bytes:
    """A few hundred bytes that say they are a huge image."""
    header = struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png.SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def huge_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    return file(SCENE, "JPEG", exif=exif)


def text_bomb() -> bytes:
    """A compressed text chunk that would be 200 MB."""
    bomb = b"key\0\0" + zlib.compress(b"\0" * 200_000_000)
    whole = file(SCENE)
    return whole[:33] + chunk(b"zTXt", bomb) + whole[33:]


HOSTILE = {
    "nothing": (b"", "is empty (0 bytes)"),
    "not a picture": (b"hello world" * 10, "is not an image that can be read"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "export it as PNG"),
    "SVG with a prologue": (b'<?xml version="1.0"?><svg/>', "export it as PNG"),
    "PDF": (b"%PDF-1.7 ...", "Export the page"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "HEIC": (b"\0\0\0\x18ftypheic" + b"\0" * 64, "HEIC is not supported"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is not an image"),
    "50,000 squared": (giant(50_000, 50_000), "50000×50000 = 2500 MP; at most 64 MP"),
    "as many pixels in one line": (giant(2**31 - 1, 2), "at most 64 MP"),
    "65,535 squared as GIF": (
        b"GIF89a" + struct.pack("<HH3x", 65535, 65535) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\0;",
        "65535×65535 = 4295 MP; at most 64 MP",
    ),
    "65,535 squared as JPEG": (
        file(SCENE, "JPEG").replace(struct.pack(">BHH", 8, 32, 48), struct.pack(">BHH", 8, 65535, 65535)),
        "at most 64 MP",
    ),
    "size zero": (giant(0, 10), "be read"),
    "truncated PNG": (file(noise(64, 64))[:3000], "is cut short"),
    "truncated JPEG": (file(noise(64, 64), "JPEG")[:1500], "is cut short"),
    "truncated WebP": (file(noise(64, 64), "WEBP")[:600], "cannot be read"),
    "only a signature": (png.SIGNATURE, "be read"),
    "wrong checksum": (file(SCENE)[:40] + b"\xff\xff" + file(SCENE)[42:], "be read"),
    "text bomb": (text_bomb(), "cannot be read"),
    "GIF without a picture": (b"GIF89a\x01\0\x01\0\0\0\0;", "be read"),
    "TIFF that points outside": (b"II*\0\xff\xff\xff\x7f", "be read"),
    "BMP of negative width": (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, -9, 9, 1, 24, 0, 0, 0, 0, 0, 0),
        "at most 64 MP",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_with_one_line(name: str):
    data, message = HOSTILE[name]
    with pytest.raises(BadImage) as caught:
        codec.decode(data, "it")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_bytes_than_allowed_are_refused_before_decoding():
    with pytest.raises(BadImage, match="65 MiB; at most 64"):
        codec.decode(b"\x89PNG" + bytes(65 * 2**20), "it")


def test_warnings_of_pillow_stay_silent_and_others_are_heard_afterwards():
    torn = io.BytesIO()
    Image.fromarray(SCENE).save(torn, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: decoded(torn.getvalue()), range(40)))
        warnings.warn("something else", stacklevel=1)
    assert [str(each.message) for each in heard] == ["something else"]


def test_honest_file_of_another_name_is_read_by_what_it_is():
    assert (decoded(file(SCENE, "BMP")).image == SCENE).all()


def test_what_hangs_behind_image_is_not_looked_at():
    """A polyglot: an image to us, a web page or an archive to others."""
    for tail in (b"<script>alert(1)</script>", b"PK\x03\x04" + bytes(100)):
        found = decoded(file(SCENE) + tail)
        assert (found.image == SCENE).all()
        assert b"script" not in codec.encode(found.image)


def test_huge_exif_does_no_harm():
    assert off_by(decoded(huge_exif()).image, SCENE) < 60


@settings(deadline=None)
@given(st.binary(max_size=400), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), st.integers(0, 300))
def test_garbage_in_any_file_is_read_or_refused_and_nothing_else(garbage: bytes, kind: str, at: int):
    whole = file(scene(16, 12), kind)
    with contextlib.suppress(BadImage):
        decoded(whole[:at] + garbage + whole[at + len(garbage) :])


# -- the PNG writer ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 4]))))
def test_png_of_ours_is_read_by_pillow_pixel_for_pixel(image: Any):
    with Image.open(io.BytesIO(png.encode(image))) as opened:
        assert opened.mode == ("RGB" if image.shape[2] == 3 else "RGBA")
        assert (np.asarray(opened) == image).all()


def test_without_isal_same_pixels_come_from_zlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(png, "_deflate", zlib)
    assert (pixels(png.encode(SCENE)) == SCENE).all()


@pytest.mark.parametrize("height", [341, 342, 1023, 1400])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_large_png_is_the_same_for_any_number_of_threads(height: int, channels: int, monkeypatch: pytest.MonkeyPatch):
    """Pillow checks the stream's checksum, which is combined from the strips' own."""
    image = np.random.default_rng(height).integers(0, 256, (height, 1024, channels), dtype=np.uint8)
    monkeypatch.setattr(png.os, "cpu_count", lambda: 1)
    alone = png.encode(image)
    monkeypatch.setattr(png.os, "cpu_count", lambda: 8)
    assert png.encode(image) == alone
    with Image.open(io.BytesIO(alone)) as opened:
        assert np.array_equal(np.asarray(opened), image)
    assert np.array_equal(png.decode(alone), image)


def test_texts_in_png_come_back_in_any_script():
    data = png.encode(SCENE, [("klein-mcp", "ein Bär, 熊, 🐻")])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.text["klein-mcp"] == "ein Bär, 熊, 🐻"  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("unit", ["a", "熊", "🐻", '"', "\n", "\x01", "<&'>", "\ufffe\ud800\x85\u2028"])
def test_recipe_with_any_prompt_is_read_from_every_format(kind: Format, unit: str):
    """The longest prompt of any front end has 32,000 characters."""
    prompt = unit * (32_000 // len(unit))
    recipe = {"image": "k7f3q2", "seed": "7", "request": {"tool": "generate_image", "prompt": prompt, "steps": 4}}
    data = codec.encode(SCENE, kind, recipe)
    with Image.open(io.BytesIO(data)) as opened:
        found = provenance.read(opened)
    assert found is not None
    read = found["request"].pop("prompt")
    assert found == {"image": "k7f3q2", "seed": "7", "request": {"tool": "generate_image", "steps": 4}}
    assert read == prompt or (read.endswith("…") and well_formed(prompt).startswith(read[:-1]))
    assert kind != "png" or read == prompt
    assert unit not in ("a", "熊") or len(read) >= 16_000
    short = codec.encode(SCENE, kind, {"request": {"prompt": unit * 100}})
    with Image.open(io.BytesIO(short)) as opened:
        assert provenance.read(opened) == {"request": {"prompt": unit * 100}}


@pytest.mark.bench
def test_png_takes_at_most_tenth_of_pillows_time():
    """At 1024², on a smooth image with grain: the best of three."""
    grain = noise(1024, 1024) // 16
    image = np.clip(scene(1024, 1024).astype(int) + grain, 0, 255).astype(np.uint8)
    ours = min(timed(lambda: png.encode(image)) for _ in range(5))
    expected = min(timed(lambda: file(image)) for _ in range(3))
    assert ours <= expected / 10, f"{1000 * ours:.1f} ms, Pillow {1000 * expected:.0f} ms"  # observed: 13 and 480 ms


def timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
