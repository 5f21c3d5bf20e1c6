"""Name pickles, git-lfs pointers and web pages by their first bytes."""

_PICKLE = "a pickle, which could run code; only safetensors and GGUF are read"

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", _PICKLE),
    *((bytes((0x80, protocol)), _PICKLE) for protocol in range(2, 6)),
    (b"version https://git-lfs", "a pointer of git-lfs, without the weights it points to"),
    (b"SQLite format 3\0", "a Draw Things model (SQLite), which is not read"),
    (b"\x89HDF\r\n", "an HDF5 file, which is not read"),
    (b"<!DOCTYPE", "a web page, not weights"),
    (b"<!doctype", "a web page, not weights"),
    (b"<html", "a web page, not weights"),
)


def foreign_format(start: bytes) -> str:
    """Return what a file with these first bytes is, or ""."""
    return next((name for signature, name in _SIGNATURES if start.startswith(signature)), "")
