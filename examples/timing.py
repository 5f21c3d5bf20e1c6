"""Measure klein-mcp's median times as a client sees them.

A time runs from the request until the client has the image.

    python examples/timing.py [--calls 20] [--model auto]

This uses a real stdio server, a warm engine and a new seed for each call, and prints a row as in engine/SPEED.md.
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

SERVER = StdioServerParameters(command=sys.executable, args=["-m", "klein_mcp"], env=dict(os.environ))


async def call(client: Client, tool: str, **arguments: Any) -> tuple[dict[str, Any], float]:
    """Return the metadata of a result, and the seconds it took."""
    started = time.perf_counter()
    facts: dict[str, Any] = {}
    while not facts or "job" in facts:
        result = await client.call_tool(*(("wait_for_job", {"job": facts["job"]}) if facts else (tool, arguments)))
        text = result.content[0].text  # type: ignore[union-attr]
        if result.is_error:
            raise RuntimeError(f"{tool}: {text}")
        facts = json.loads(text)
    return facts, time.perf_counter() - started


async def main(calls: int, model: str) -> None:
    """Warm up, measure, print."""
    async with Client(SERVER) as client:
        apple, cold = await call(
            client, "generate_image", prompt="an apple on a yellow background", seed=7, model=model
        )
        rocket, _ = await call(client, "generate_image", prompt="a rocket on an orange background", seed=7, model=model)
        pair = "the apple from image 1 to the left of the rocket from image 2 on a blue background"
        kinds: tuple[tuple[str, dict[str, Any]], ...] = (
            ("generate_image", {"prompt": "a cat in the snow"}),
            ("edit_image", {"image": apple["image"], "prompt": "make the background green"}),
            ("compose_references", {"images": [apple["image"], rocket["image"]], "prompt": pair}),
        )
        medians = []
        for tool, arguments in kinds:
            await call(client, tool, **arguments, model=model)
            times = [(await call(client, tool, **arguments, seed=seed, model=model))[1] for seed in range(calls)]
            medians.append(f"{1000 * statistics.median(times):.0f} ms")
        size = "×".join(map(str, apple["size"]))
        recipe = await client.read_resource(f"klein://images/{apple['image']}/recipe")
        model = json.loads(recipe.contents[0].text)["model"]  # type: ignore[union-attr]
    print(f"| {model}, {size} | {' | '.join(medians)} | {cold:.1f} s |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--model", default="auto")
    given = parser.parse_args()
    anyio.run(main, given.calls, given.model)
