"""The attention back end is chosen by a trial: the fastest of those that give the plain result."""

from collections.abc import Callable
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.nn import attention, ops
from engine.nn.attention import Attention, quickest
from tests import operations

PLAIN = ops.PLAIN["attention"]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 24, 2, 16, generator=generator) for _ in range(3))
    return q, k, v


def slowed(backend: Attention, seconds: float, disturbed: Callable[[int], float] = lambda call: 0.0) -> Attention:
    """Return the back end as one that takes so long.

    disturbed: seconds more of each call, by its number.
    """
    calls = count()

    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        Clock.now += seconds + disturbed(next(calls))
        return backend(q, k, v)

    return slow


class Clock:
    """The clock of the trials, which only slowed back ends move."""

    now = 0.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "time", SimpleNamespace(perf_counter=lambda: Clock.now))


def failing(exc: Exception) -> Attention:
    def fail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise exc

    return fail


def no_sync() -> None:
    pass


@pytest.fixture
def slow_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch's own choice the slowest."""
    monkeypatch.setitem(ops.PLAIN, "attention", slowed(PLAIN, 0.2))


@pytest.mark.usefixtures("slow_plain")
def test_the_fastest_back_end_that_runs_is_chosen() -> None:
    backends = {
        "missing": failing(NotImplementedError("no kernel")),
        "refusing": failing(RuntimeError("head dim 512")),
        "slow": slowed(PLAIN, 0.1),
        "fast": lambda q, k, v: PLAIN(q, k, v),
    }
    choice = quickest(*inputs(), no_sync, backends)
    assert choice.name == "fast"
    assert choice.attention is backends["fast"]
    assert set(choice.ms) == {"", "slow", "fast"}


@pytest.mark.usefixtures("slow_plain")
def test_a_back_end_with_other_numbers_is_passed_over() -> None:
    wrong: list[Callable[..., Tensor]] = [lambda q, k, v: PLAIN(k, q, v), lambda q, k, v: PLAIN(q, k, v) * torch.nan]
    for backend in wrong:
        assert quickest(*inputs(), no_sync, {"wrong": backend}).name == ""


@pytest.mark.usefixtures("slow_plain")
def test_work_beside_the_trial_does_not_mislead_it() -> None:
    """Another process that uses the GPU makes most calls of the best one slow."""
    backends = {
        "best": slowed(PLAIN, 0.01, lambda call: 0.5 if call % 8 else 0.0),
        "other": slowed(PLAIN, 0.02),
    }
    assert quickest(*inputs(), no_sync, backends).name == "best"


def test_torch_keeps_its_choice_where_it_is_faster() -> None:
    choice = quickest(*inputs(), no_sync, {"slow": slowed(PLAIN, 0.1)})
    assert choice.name == ""
    assert choice.attention is PLAIN
    assert quickest(*inputs(), no_sync, {}).name == ""


def test_back_ends_of_a_gpu_are_passed_over_on_a_cpu() -> None:
    """Run the real table: on a CPU all of its entries fail or agree with the plain result."""
    choice = quickest(*inputs(), no_sync)
    assert torch.allclose(choice.attention(*inputs()), PLAIN(*inputs()), atol=1e-5)


@pytest.mark.parametrize("name", attention.BACKENDS)
def test_back_ends_are_traced_without_a_break(name: str) -> None:
    """Trace a call as compiled blocks do, for inputs of unknown length, without running it."""
    traced = []

    def keep(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lambda *args: (PLAIN(*inputs()),)

    torch._dynamo.reset()
    with operations.chosen(attention=attention.BACKENDS[name]):
        torch.compile(lambda q, k, v: ops.attention(q, k, v), dynamic=True, fullgraph=True, backend=keep)(*inputs())
    (operation,) = (target for target in traced if "scaled_dot_product" in target)
    assert operation.startswith("aten._scaled_dot_product_")
