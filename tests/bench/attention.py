"""Makes the trial of attention back ends give one answer in all processes of a run.

Programs that one process compiled serve another only if both call the same back end, and a trial beside other processes
measures those too.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from engine.families.klein import operations
from engine.nn.attention import BACKENDS, Choice, quickest


def settle(slack: float = float("inf")) -> None:
    """Let models of this process take the first back end that works, unless it is slower by this factor."""
    operations.quickest = partial(_settled, slack)
    operations._choices.clear()  # an earlier trial was another


def _settled(slack: float, q: Tensor, k: Tensor, v: Tensor, sync: Callable[[], None]) -> Choice:
    free = quickest(q, k, v, sync)
    for name, attention in BACKENDS.items():
        if name in free.ms:
            settled = Choice(name, attention, free.ms)
            return settled if free.ms[name] <= slack * min(free.ms.values()) else free
    return free
