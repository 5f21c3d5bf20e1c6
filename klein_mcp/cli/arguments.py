"""Argument types of the command line: text -> value."""

import argparse
import contextlib
import re
from pathlib import Path

_SECONDS = {"h": 3600.0, "d": 86400.0, "w": 604800.0, "m": 30 * 86400.0, "y": 365 * 86400.0}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def image_size(text: str) -> tuple[int, int]:
    """Parse "1024x768"."""
    from engine.contract import MIN_SIDE
    from klein_mcp.limits import MAX_SIDE

    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 1024x768")
    if not all(MIN_SIDE <= int(side) <= MAX_SIDE for side in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} has a side that is not {MIN_SIDE} to {MAX_SIDE} pixels")
    return int(width), int(height)


def local_path(text: str) -> Path:
    """Parse a path, which may begin with ~."""
    from klein_mcp.images.paths import expanded

    return expanded(text)


def count(text: str) -> int:
    """Parse a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)


def seed(text: str) -> int | None:
    """Parse a seed, None for -1, which means a random one."""
    from engine.contract import MAX_SEED

    if text == "-1":
        return None
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed, 0 to {MAX_SEED}")
    return int(text)


def gpus(text: str) -> float:
    """Parse GPUs of one engine, in amounts that Ray can reserve."""
    with contextlib.suppress(ValueError):
        number = float(text)
        if 0 <= number <= 1 or (number > 0 and number.is_integer()):
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not 0, a part of a GPU such as 0.5, or whole ones")


def port(text: str) -> int:
    """Parse a TCP port, 0 to let the system choose."""
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def age(text: str) -> float:
    """Parse "30d" to seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdwmy])", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no age like 12h, 30d, 2w, 6m or 1y")
    return float(match[1]) * _SECONDS[match[2]]


def byte_size(text: str) -> int:
    """Parse "5GB" to bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*(kb|mb|gb|tb|k|m|g|t|b|)", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 500MB or 5GB")
    return int(float(match[1]) * _BYTES[match[2][:1].replace("b", "")])
