"""Other implementations of the networks' operations, for the length of a block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from engine.nn import ops


@contextmanager
def chosen(**implementations: Callable[..., Tensor]) -> Iterator[None]:
    """Use these implementations inside the block."""
    before = {name: ops.current(name) for name in implementations}
    ops.choose(**implementations)
    try:
        yield
    finally:
        ops.choose(**before)
