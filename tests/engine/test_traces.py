"""Traces on disk: a second process loads them, and whatever is wrong with them costs time alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.families.klein.compiler import CompiledDiffers, compare
from engine.families.klein.traces import ATTEMPTS, FORGOTTEN, MAX_ATTEMPTS, SavedTraces, structure


def test_traces_that_end_processes_are_left_alone(tmp_path: Path) -> None:
    for _ in range(MAX_ATTEMPTS):
        assert SavedTraces(tmp_path / "new").enabled  # and this process ends
    assert not SavedTraces(tmp_path / "new").enabled


def test_ends_of_yesterday_no_longer_count(tmp_path: Path) -> None:
    for _ in range(MAX_ATTEMPTS):
        SavedTraces(tmp_path)
    yesterday = time.time() - FORGOTTEN - 1
    os.utime(tmp_path / ATTEMPTS, (yesterday, yesterday))
    for _ in range(MAX_ATTEMPTS):
        assert SavedTraces(tmp_path).enabled
    assert not SavedTraces(tmp_path).enabled


def test_process_that_goes_on_does_not_count(tmp_path: Path) -> None:
    for _ in range(MAX_ATTEMPTS + 1):
        traces = SavedTraces(tmp_path)
        assert traces.enabled
        traces.survived()
    assert not (tmp_path / ATTEMPTS).exists()


def test_unreadable_count_disables_traces(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS).write_text("many")
    assert not SavedTraces(tmp_path).enabled


def test_without_a_folder_nothing_is_kept() -> None:
    traces = SavedTraces(None)
    with traces.used():
        assert not torch._dynamo.config.caching_precompile
    traces.save()
    traces.survived()
    assert not traces.enabled


def test_structure_covers_classes_shapes_types_and_choices() -> None:
    networks = [nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 3).bfloat16(), nn.Sequential(nn.Linear(2, 3))]
    names = {structure(network, choices="flash") for network in networks} | {structure(networks[0], choices="cuDNN")}
    assert len(names) == len(networks) + 1
    assert structure(nn.Linear(2, 3), choices="flash") in names


def test_only_rounding_may_differ() -> None:
    plain = torch.randn(64, 64)
    compare("blocks", plain.bfloat16(), plain)
    compare("blocks", torch.zeros(3), torch.zeros(3))
    compare("blocks", plain, plain / 0)
    for wrong in (plain.flip(0), plain * float("nan"), 1.2 * plain):
        with pytest.raises(CompiledDiffers, match="the compiled blocks differ"):
            compare("blocks", wrong, plain)


SCRIPT = """
import sys, torch
from pathlib import Path
from engine.families.klein.compiler import CompileOptions, load_compilers
from engine.families.klein.traces import SavedTraces
from tests.engine.traced import part
folder = Path(sys.argv[1])
load_compilers(CompileOptions(enabled=True, folder=folder))
traces = SavedTraces(folder / "traces")
with torch.no_grad(), traces.used():
    results = [torch.compile(part, dynamic=True)(torch.arange(3.0 * n).view(3, n)) for n in (5, 7)]
traces.save()
traces.survived()
from torch._dynamo.utils import counters
print(counters["stats"]["unique_graphs"], [result.sum().item() for result in results])
"""


@pytest.mark.slow
def test_a_second_process_traces_nothing(tmp_path: Path) -> None:
    def run() -> str:
        # A test before this one may have set the folders for this process.
        env = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

    first, second = run(), run()
    graphs, results = first.split(" ", 1)
    assert int(graphs) >= 1
    assert second == f"0 {results}"
    for entry in (tmp_path / "traces").glob("*/entry"):
        entry.write_bytes(b"damaged")
    assert run() == first
    assert run() == second
