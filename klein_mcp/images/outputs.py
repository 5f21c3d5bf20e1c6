"""The file formats that images are written in."""

from collections.abc import Mapping
from typing import Literal, get_args

Format = Literal["png", "jpeg", "webp"]
FORMATS: tuple[Format, ...] = get_args(Format)

SUFFIXES: Mapping[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Ending of a file's name, in lower case -> its format."""
