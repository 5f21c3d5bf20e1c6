"""Readable formats, advice for others, and the many kinds of TIFF."""

from PIL import ImageFile

from klein_mcp.errors import BadImage

READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

EXPORT = "export it as JPEG or PNG."
_RAW = f"A camera's raw file is no finished image: {EXPORT}"

# (offset, bytes at it, advice). Longer signatures first where one begins like another.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftypcrx ", _RAW),
    (4, b"ftyphe", f"HEIC is not supported: {EXPORT}"),
    (4, b"ftypmif1", f"HEIC is not supported: {EXPORT}"),
    (4, b"ftypmsf1", f"HEIC is not supported: {EXPORT}"),
    (4, b"ftypavi", "It is an AVIF that is damaged or cut short: send it again, or another copy."),
    (4, b"ftyp", f"It looks like a video: {EXPORT}"),
    (0, b"\xff\x0a", f"JPEG XL is not supported: {EXPORT}"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", f"JPEG XL is not supported: {EXPORT}"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", f"JPEG 2000 is not supported: {EXPORT}"),
    (0, b"8BPS", f"Photoshop files are not supported: {EXPORT}"),
    (0, b"gimp xcf", f"GIMP files are not supported: {EXPORT}"),
    (0, b"FUJIFILMCCD-RAW", _RAW),
    (0, b"IIU\0", _RAW),
    (0, b"IIRO", _RAW),
    (0, b"IIRS", _RAW),
    (0, b"FOVb", _RAW),
    (0, b"v/1\x01", f"OpenEXR is not supported: {EXPORT}"),
    (0, b"#?RADIANCE", f"Radiance HDR is not supported: {EXPORT}"),
    (0, b"\0\0\1\0", f"Icons are not supported: {EXPORT}"),
    (0, b"PK\x03\x04", "It is a ZIP archive or a document: export the image as PNG."),
    (0, b"\x1aE\xdf\xa3", f"It is a video: {EXPORT}"),
    (0, b"%PDF", "Export the page as PNG."),
)
_TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "SVG is a drawing, not pixels: export it as PNG."),
    (b"<?xml", "SVG is a drawing, not pixels: export it as PNG."),
    (b"<!doctype", "It is a web page: use the URL of the image itself."),
    (b"<html", "It is a web page: use the URL of the image itself."),
    (b"version https://git-lfs", "It is a Git LFS pointer: run git lfs pull."),
)

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DNG_VERSION, _SUB_IFDS, _SUBFILE_TYPE = 50706, 330, 254
_BITS, _PLANAR = 258, 284
_REDUCED = 1
_MOST_PAGES = 64
"""Pages of a TIFF that are compared: an image pyramid has about ten."""


def advice(data: bytes) -> str:
    """Return what to do with bytes that are no readable image."""
    for offset, signature, text in _SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            return text
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, text in _TEXTS:
        if start.startswith(signature):
            return text
    if data[:4] in _TIFF_SIGNATURES:
        if data[8:10] == b"CR":
            return _RAW
        return "TIFF is read with 8 or 16 bits a channel, or one channel of floats: export it as PNG."
    return "It takes PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF."


def choose_page(opened: ImageFile.ImageFile, name: str) -> list[str]:
    """Select the full image of a TIFF. Raises BadImage for raw files.

    Returns warnings.
    """
    tags = getattr(opened, "tag_v2", None)
    if opened.format != "TIFF" or tags is None:
        return []
    thumbnail = int(tags.get(_SUBFILE_TYPE, 0) or 0) & _REDUCED
    if _DNG_VERSION in tags or (thumbnail and _SUB_IFDS in tags):
        raise BadImage(f"{name} is a camera's raw file, with a thumbnail in front.", hint=f"Develop it and {EXPORT}")
    bits = tags.get(_BITS, (8,))
    if tags.get(_PLANAR, 1) == 2 and max(bits if isinstance(bits, tuple) else (bits,)) > 8:
        # Pillow reads these without an error and wrong.
        raise BadImage(f"{name} is a TIFF with 16 bits in separate planes, which is not read.", hint=f"Please {EXPORT}")
    sizes = _page_sizes(opened)
    best = max(range(len(sizes)), key=lambda page: (sizes[page][0] * sizes[page][1], -page))
    opened.seek(best)
    if len(sizes) == 1:
        return []
    if len(set(sizes)) == 1:
        return [f"{name} has several frames; only the first one is used."]
    count = len(sizes) if len(sizes) <= _MOST_PAGES else f"over {_MOST_PAGES}"
    return [f"{name} has {count} images of different sizes; the largest one is used."]


def largest_page(opened: ImageFile.ImageFile) -> int:
    """Return the pixels of the page that `choose_page` would select."""
    sizes = _page_sizes(opened) if opened.format == "TIFF" else [opened.size]
    return max(width * height for width, height in sizes)


def _page_sizes(opened: ImageFile.ImageFile) -> list[tuple[int, int]]:
    """Return the sizes of the first pages, one more than are counted.

    Pillow's `n_frames` walks all of them, in a time that grows with their square.
    """
    sizes = [opened.size]
    try:
        while len(sizes) <= _MOST_PAGES:
            opened.seek(len(sizes))
            sizes.append(opened.size)
    except EOFError:
        pass
    return sizes
