"""Draw the plots of docs/speed.md from docs/data: `python docs/plots.py`. Needs matplotlib (extra `docs`)."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "klein-mcp", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen

DOCS = Path(__file__).parent
OURS, THEIRS, FLOOR = "#1f6feb", "#8b949e", "#d29922"


def lines() -> dict[str, dict[str, float]]:
    """Return ours, diffusers eager and the physical floor in milliseconds, by scenario."""
    run = json.loads((DOCS / "data" / "h200-2026-11-26.json").read_text(encoding="utf-8"))
    return {row["name"]: {**row["ms"], "floor": row["floor"]} for row in run["lines"]}


def cost() -> None:
    """Draw milliseconds against size, and against the number of references."""
    rows = lines()
    sizes = {512: "text-to-image, new prompt, half the side", 1024: "text-to-image, new prompt"}
    references = {0: "text-to-image, new prompt", 1: "edit, one new reference", 4: "compose, four new references"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, chosen, label in ((left, sizes, "side of the image, pixels"), (right, references, "new 1-MP references")):
        for key, name, colour, style in (
            ("eager", "diffusers, eager", THEIRS, "o-"),
            ("ours", "klein-mcp", OURS, "o-"),
            ("floor", "physical floor", FLOOR, "o--"),
        ):
            axis.plot(list(chosen), [rows[row][key] for row in chosen.values()], style, color=colour, label=name)
        axis.set(xlabel=label, ylabel="milliseconds", ylim=(0, None), xticks=list(chosen))
    left.legend(frameon=False)
    _save(figure, "cost.svg")


def drift() -> None:
    """Draw how far untouched pixels drift over ten edits in a row, with and without preserve."""
    path = DOCS / "data" / "drift.json"
    if not path.exists():
        return
    measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    edits = range(1, len(measured["off"]) + 1)
    axis.plot(edits, measured["off"], "o-", color=THEIRS, label="preserve: off")
    axis.plot(edits, measured["auto"], "o-", color=OURS, label="preserve: auto")
    axis.set(xlabel="edits in a row", ylabel="mean drift, of 255", ylim=(0, None), xticks=list(edits))
    axis.legend(frameon=False)
    _save(figure, "drift.svg")


def _save(figure: Any, name: str) -> None:
    # Without a date the same data gives the same file.
    figure.savefig(DOCS / "plots" / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    cost()
    drift()
