"""Tests of the GPU benchmark without a GPU.

The smoke run ends, and the counted work equals the closed form.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from engine.families.klein.runner import Runner
from tests.bench import gpu
from tests.bench.ceilings import Ceilings
from tests.bench.floors import Counts
from tests.bench.full_size_models import GIANTS
from tests.bench.report import Line, markdown, with_compiled
from tests.bench.scenarios import SCENARIOS, TARGETS

ROOT = Path(__file__).parents[2]


QUICK = ("ceilings", "first images untuned", "same images", "eager", "tuned", "memory by part", "drift")
"""Sections that compile nothing: tracing the toy models alone takes minutes on a busy machine."""


def smoke(folder: Path, only: tuple[str, ...]) -> gpu.Bench:
    return gpu.main(replace(gpu.Settings.smoke(), json=folder / "gpu.json", only=only))[0]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> gpu.Bench:
    """Run the quick sections of the smoke run, with their file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "tune", lambda self: False)
        return smoke(tmp_path_factory.mktemp("bench"), QUICK)


@pytest.fixture(scope="module")
def counts() -> Counts:
    return Counts(GIANTS["4B"])


@pytest.mark.bench
def test_every_section_of_the_smoke_run_ends(tmp_path: Path) -> None:
    sections = smoke(tmp_path, ()).found["sections"]
    assert {name for name, section in sections.items() if "error" in section or "skipped" in section} == set()
    assert sections["tuning cold"]["mode"] == "compiled"


def test_quick_sections_end_and_fill_every_line(bench: gpu.Bench) -> None:
    sections = bench.found["sections"]
    assert {name for name, section in sections.items() if "error" in section or "skipped" in section} == set()
    assert [line.name for line in bench.lines] == [scenario.name for scenario in bench.settings.scenarios]
    for line in bench.lines:
        assert {"ours", "eager"} <= line.ms.keys()
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in line.ratios.values())


def test_tables_hold_every_line(bench: gpu.Bench) -> None:
    table = markdown(bench.found, bench.lines)
    for line in bench.lines:
        assert line.markdown() in table
    cells = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert cells == {11}  # no broken row


def test_side_timed_separately_is_scaled_to_the_same_run() -> None:
    line = Line("a", 100.0, {"ours": 200.0, "eager": 400.0}, {"compiled": 0.9})
    (scaled,) = with_compiled([line], {"a": {"ratio": 0.8}})
    assert scaled.ms["compiled"] == 250.0
    assert "met" in scaled.markdown()
    assert with_compiled([line], {"took": 1.0}) == [line]


def test_the_file_holds_what_was_printed(bench: gpu.Bench) -> None:
    assert bench.settings.json
    kept = json.loads(bench.settings.json.read_text())
    assert kept["sections"].keys() == bench.found["sections"].keys()
    assert len(kept["lines"]) == len(bench.lines)


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
