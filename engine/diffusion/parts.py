"""Work in parts: generators that yield the share done between two parts.

A job can be stopped there.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")

Parts = Generator[float, None, T]
"""Yields shares that rise towards 1, and returns the result."""


def result_of(parts: Parts[T]) -> T:
    """Do all parts without a pause."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value


def within(parts: Parts[T], begin: float, end: float) -> Parts[T]:
    """Do parts that are the shares `begin` to `end` of more."""
    while True:
        try:
            share = next(parts)
        except StopIteration as done:
            return done.value
        yield begin + share * (end - begin)


def beside(parts: Parts[T], work: Callable[[], object]) -> Parts[T]:
    """Do `work` after the first part.

    A GPU still computes that part when the call returns, so the host works beside it.
    """
    try:
        share = next(parts)
    except StopIteration as end:
        work()
        return end.value
    work()
    yield share
    return (yield from parts)
