"""Tests of the GPU benchmark without a GPU.

The smoke run ends, and the counted work equals the closed form.
"""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.families.klein import operations
from engine.families.klein.runner import Runner
from engine.nn import ops
from tests.bench import attention, gpu, timed
from tests.bench.ceilings import Ceilings
from tests.bench.children import Children
from tests.bench.fill_cache import PARTS
from tests.bench.floors import Counts
from tests.bench.full_size_models import GIANTS
from tests.bench.limits import time_limit
from tests.bench.report import Line, markdown
from tests.bench.scenarios import SCENARIOS, TARGETS
from tests.bench.timed import Bench

ROOT = Path(__file__).parents[2]


QUICK = (*timed.PREPARE, "ceilings", "tuning from disk", "tuned", "bands", "eager", "parts", "drift")
"""Sections that compile nothing: tracing the toy models alone takes minutes on a busy machine."""


class BrokenPipeline:
    """A compiled pipeline of diffusers that fails in every shape."""

    transformer: Any

    def __init__(self, *_: object, beside: Any) -> None:
        self.transformer = beside.transformer

    def __call__(self, **_: object) -> None:
        raise RuntimeError("the compiler failed")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Run the quick sections on toys in this process."""
    found: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "tune", lambda self: False)
        patch.setattr(timed, "compiled", BrokenPipeline)
        patch.setattr(operations, "quickest", operations.quickest)  # restored at the end
        bench = Bench(GIANTS["toy"], "eager", folder / "cache", folder / "model", found.__setitem__)
        bench.run(QUICK)
    bench.found = found  # type: ignore[attr-defined] - the fixture adds it
    return bench


@pytest.fixture
def children() -> Iterator[tuple[Children, dict[str, Any]]]:
    heard: dict[str, Any] = {}
    children = Children(heard.__setitem__)
    yield children, heard
    children.kill()


@pytest.fixture(scope="module")
def counts() -> Counts:
    return Counts(GIANTS["4B"])


@pytest.mark.bench
def test_every_step_of_the_smoke_run_ends(tmp_path: Path) -> None:
    run = gpu.main(replace(gpu.Settings.smoke(), json=tmp_path / "gpu.json"))
    sections = run.found["sections"]
    assert {name for name, section in sections.items() if "error" in section or "skipped" in section} == set()
    assert sections["tuning from disk"]["mode"] == "compiled"
    assert sections["tuned"]["failed"] == sections["fp8"]["failed"] == {}
    assert all({"ours", "eager", "compiled"} <= line.ms.keys() for line in run.lines)
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"].keys() == sections.keys()
    assert len((tmp_path / "gpu.json").read_text()) < 100_000
    assert not run.folder.exists()


def test_quick_sections_end_and_fill_every_line(bench: Bench) -> None:
    sections = bench.found  # type: ignore[attr-defined] - the fixture adds it
    assert {name for name, section in sections.items() if "error" in section or "skipped" in section} == set()
    assert [line.name for line in bench.lines] == [scenario.name for scenario in timed.TURNS]
    assert (bench.model / "model_index.json").is_file()


def test_failing_compiler_leaves_out_its_side_alone(bench: Bench) -> None:
    failed = bench.found["tuned"]["failed"]  # type: ignore[attr-defined] - the fixture adds it
    assert len(failed) == len(timed.TURNS)
    assert all("the compiler failed" in reason for reason in failed.values())
    assert all(line.ms.keys() == {"ours", "eager"} for line in bench.lines)


def test_section_without_time_is_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, Any] = {}
    monkeypatch.setattr(bench, "heard", heard.__setitem__)
    monkeypatch.setattr(bench, "deadline", time.time() + 1)
    bench.section("fp8")
    assert "skipped" in heard["fp8"]


def test_tables_hold_every_line(bench: Bench) -> None:
    sections = {
        **bench.found,  # type: ignore[attr-defined] - the fixture adds it
        "fp8": {"ms": {"ours, rows": 1.0, "ours, bf16": 2.0, "eager, bf16": 4.0, "eager, fp8": 3.0}},
        "jobs during decoder": {"during, ms": [1.0], "alone, ms": [1.0], "median during": 1.0, "median alone": 1.0,
                                "ratio": 1.0, "longest piece, ms": 1.0},
        "memory all": {"hash": "a", "card, GB": 1},
        "memory 8 GB": {"error": "killed"},
    }  # fmt: skip
    table = markdown({"model": "toy", "sections": sections}, bench.lines)
    for line in bench.lines:
        assert line.markdown() in table
    assert all(name in table for name in ("fp8, ours, rows", "| decoder |", "| 8 GB |", "| in bands |"))
    blocks = [block.splitlines() for block in table.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 5
    for rows in blocks:
        assert len({row.count("|") for row in rows}) == 1  # no broken row


def test_row_judges_every_target_that_was_measured() -> None:
    wanted = {"floor": 1.35, "eager": 0.6, "compiled": 0.9}
    row = Line("a", 100.0, {"ours": 130.0, "eager": 260.0, "compiled": 150.0}, wanted).markdown()
    assert row == "| a | 1.35 | 0.60 | 0.90 | 130, 100, 260, 150: 1.30, 0.50, 0.87: met |"
    assert "missed" in Line("a", 100.0, {"ours": 130.0, "compiled": 140.0}, wanted).markdown()


def test_lines_survive_the_way_to_the_parent() -> None:
    line = Line("a", 100.0, {"ours": 130.0}, {"floor": 1.35})
    run = gpu.Run(gpu.Settings.smoke())
    run._take("line a", {**asdict(line), "all, ms": {}})
    assert run.lines == [line]
    run._take("line a", {**asdict(line), "floor": 110.0})
    assert [line.floor for line in run.lines] == [110.0]  # not twice
    run.folder.rmdir()


def test_parent_compiles_every_part_and_times_every_section(bench: Bench) -> None:
    assert tuple(PARTS) == gpu.FILL
    assert gpu.PREPARE == timed.PREPARE
    assert {*gpu.PREPARE, *gpu.TIMED, *gpu.REST, "tuning again"} == bench._sections.keys()


def test_hanging_child_is_killed_with_what_it_started(children: tuple[Children, dict[str, Any]]) -> None:
    group, heard = children
    hang = (
        "import subprocess, sys; from tests.bench.children import say; p = subprocess.Popen(['sleep', '999']); "
        "say('grandchild', {'pid': p.pid}); p.wait()"
    )
    child = group.start("hanging", "timeit", "-n", "1", "-r", "1", hang)
    assert group.listen(lambda: "grandchild" in heard, 60)
    group.finish([child], 0.1)
    assert child.ended
    assert "killed" in heard["hanging"]["error"]
    status = Path(f"/proc/{heard['grandchild']['pid']}/stat")
    assert _becomes_true(lambda: not status.exists() or " Z " in status.read_text())


def test_child_waits_for_its_turn(children: tuple[Children, dict[str, Any]]) -> None:
    group, heard = children
    work = "from tests.bench.children import say, wait_for_go; say('allowed', {'until': wait_for_go()})"
    child = group.start("waiting", "timeit", "-n", "1", "-r", "1", work)
    assert group.listen(lambda: child.ready, 60)
    assert heard == {}
    child.go(100)
    group.finish([child], 60)
    assert heard["allowed"]["until"] == pytest.approx(time.time() + 100, abs=60)


def test_dying_child_tells_why(children: tuple[Children, dict[str, Any]]) -> None:
    group, heard = children
    group.finish([group.start("dying", "tests.bench.no_such_module")], 60)
    assert "No module named" in heard["dying"]["error"]


def test_trial_beside_others_chooses_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "quickest", operations.quickest)
    heads = torch.randn(1, 8, 2, 16)

    def slow(q: Any, k: Any, v: Any) -> Any:
        time.sleep(0.01)  # the trial of tens of microseconds cannot hide it
        return ops.PLAIN["attention"](q, k, v)

    monkeypatch.setitem(attention.BACKENDS, "cuDNN", slow)
    attention.settle()
    assert operations.quickest(heads, heads, heads, lambda: None).name == "cuDNN"
    attention.settle(1.05)
    assert operations.quickest(heads, heads, heads, lambda: None).name != "cuDNN"


def test_time_limits_stand_inside_each_other() -> None:
    with pytest.raises(TimeoutError, match="after 0 s"), time_limit(60), time_limit(0.05):
        time.sleep(60)
    with pytest.raises(TimeoutError, match="after 0 s"), time_limit(0.05), time_limit(60):
        time.sleep(60)
    with time_limit(60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        with time_limit(90):
            pass
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 61
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def _becomes_true(condition: Any, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_every_target_belongs_to_a_scenario_that_runs() -> None:
    names = {scenario.name for scenario in SCENARIOS}
    assert all(targets.keys() <= names for targets in TARGETS.values())


def test_the_log_names_every_target() -> None:
    log = (ROOT / "engine" / "SPEED.md").read_text()
    for model, targets in TARGETS.items():
        table = log.partition(f"| klein {model} |")[2].partition("\n\n")[0]
        for name, target in targets.items():
            wanted = (
                "—" if ratio is None else f"{ratio:.2f}" for ratio in (target.floor, target.eager, target.compiled)
            )
            assert f"| {name} | {' | '.join(wanted)} |" in table


@pytest.mark.parametrize(("references", "whole"), [(0, 34.8e12), (1, 76.7e12)])
def test_counted_step_of_the_4b_equals_the_closed_form(counts: Counts, references: int, whole: float) -> None:
    """Compare the counted FLOP of a step with the closed form.

    whole: of a step at 1024² that computes every token to the end. Source: the closed form below, by hand; the same
    as FlopCounterMode on diffusers 0.42.1's module gives, less what diffusers computes of the timestep.
    """
    width, blocks, text, canvas = 3072, 5 + 20, 512, 4096
    seen = references * 4096
    tokens = text + canvas + seen
    # One token meets 4 width² of attention and 3 · 3 width² of gated MLP in a block of either kind.
    block = 2 * tokens * 13 * width**2 + 4 * tokens**2 * width
    # In the last block, tokens outside the canvas need keys and values only: 2 of the 13 width², and no attention.
    idle = (text + seen) * (2 * 11 * width**2 + 4 * tokens * width)
    ends = 2 * 2 * canvas * 128 * width
    counted = counts.step(canvas, seen, False)
    assert counted.flop == blocks * block - idle + ends
    assert blocks * block == pytest.approx(whole, rel=2e-3)
    # 25 blocks in bf16. The input and output projections are a few megabytes.
    assert counted.bytes == pytest.approx(2 * (5 * 2 + 20) * 13 * width**2, rel=1e-3)


def test_cached_references_cost_their_reads_and_their_attention(counts: Counts) -> None:
    tokens, seen = 512 + 4096, 4096
    alone, beside = counts.step(4096, 0, False), counts.step(4096, seen, True)
    rows = 24 * tokens + 4096  # in the last block only the canvas has queries
    assert beside.flop - alone.flop == 4 * rows * seen * 3072
    assert beside.bytes - alone.bytes == 25 * 2 * seen * 3072 * 2


def test_minimum_time_falls_as_more_is_cached(counts: Counts) -> None:
    machine = Ceilings(flops=700e12, bandwidth=4e12)
    floor = {scenario.name: counts.seconds(scenario, 4, machine) for scenario in SCENARIOS}
    assert floor["new seed only"] < floor["text-to-image, new prompt"] < floor["edit, one new reference"]
    assert floor["edit again, known reference, new prompt"] < floor["edit, one new reference"]
    assert floor["KV: compose, four known references, new prompt"] < floor["compose, four new references"]


def test_minimum_time_is_the_slower_of_arithmetic_and_memory() -> None:
    machine = Ceilings(flops=100.0, bandwidth=10.0)
    assert machine.seconds(flop=200.0, bytes_=10.0) == 2.0
    assert machine.seconds(flop=100.0, bytes_=30.0) == 3.0
