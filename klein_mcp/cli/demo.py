"""Drives the real server as a client would: two pictures, an edit and a composition, kept in a folder."""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from klein_mcp.cli.terminal import ProgressBar, harmless, program
from klein_mcp.errors import RequestError

if TYPE_CHECKING:
    from mcp.client import Client


@dataclass(frozen=True, slots=True)
class DemoCall:
    """seconds: as the client saw it, from the request to the picture in its hands.

    load_ms: of them, the model's way into memory; 0 where it was there.
    """

    tool: str
    prompt: str
    seconds: float
    path: str
    model: str
    load_ms: int
    warnings: tuple[str, ...]


def run(out: Path, *, as_json: bool = False) -> int:
    """Raises RequestError when a call fails or there can be no folder, OSError when a picture cannot be kept."""
    from mcp.shared.exceptions import MCPError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RequestError(
            f"{out} cannot be a folder for the pictures: {problem.strerror}.", hint="Name another with --out."
        ) from None
    try:
        anyio.run(_show, out, as_json)
    except Exception as problem:
        match _innermost(problem):
            case MCPError() as lost:
                raise RequestError(
                    f"The server went away: {lost}.", hint="`klein-mcp doctor` looks for causes."
                ) from None
            case inner:
                raise inner from None
    return 0


def _innermost(problem: BaseException) -> BaseException:
    """The client's task groups wrap whatever goes wrong inside them, each once more."""
    return _innermost(problem.exceptions[0]) if isinstance(problem, BaseExceptionGroup) else problem


async def _show(out: Path, as_json: bool) -> None:
    calls = []
    async for call in _calls(out):
        calls.append(asdict(call))
        if not as_json:
            print(f"{call.tool:<20}{call.seconds:7.2f} s  {call.path}  “{call.prompt}”", flush=True)
    if as_json:
        print(json.dumps(calls))
        return
    for warning in dict.fromkeys(warning for call in calls for warning in call["warnings"]):
        print(harmless(f"note: {warning}"))
    loaded = "; the first call loaded it" if calls[0]["load_ms"] else ""
    print(f"painted by {calls[-1]['model']}{loaded}")
    # By its whole path: in a checkout it is not on PATH.
    print(f"next: {shlex.join(program())}, typed alone, says how to add it to a client")


async def _calls(out: Path) -> AsyncIterator[DemoCall]:
    from mcp.client import Client
    from mcp.client.stdio import StdioServerParameters

    server = StdioServerParameters(command=sys.executable, args=["-m", "klein_mcp"], env=dict(os.environ))
    async with Client(server) as client:
        apple, call = await _paint(client, out / "1-apple.png", "generate_image", "an apple on a yellow background")
        yield call
        rocket, call = await _paint(client, out / "2-rocket.png", "generate_image", "a rocket on an orange background")
        yield call
        _, call = await _paint(client, out / "3-edit.png", "edit_image", "make the background pink", image=apple)
        yield call
        prompt = "the apple from image 1 to the left of the rocket from image 2 on a blue background"
        _, call = await _paint(client, out / "4-compose.png", "compose_references", prompt, images=[apple, rocket])
        yield call


async def _paint(client: "Client", path: Path, tool: str, prompt: str, **more: Any) -> tuple[str, DemoCall]:
    """The picture's handle and what there is to tell about the call."""
    started = time.perf_counter()
    with ProgressBar(tool) as bar:
        facts = await _facts(client, bar, tool, {"prompt": prompt, "seed": 7, **more})
        while "job" in facts:
            facts = await _facts(client, bar, "wait_for_job", {"job": facts["job"]})
    seconds = time.perf_counter() - started
    shutil.copyfile(facts["path"], path)
    return facts["image"], DemoCall(
        tool, prompt, seconds, str(path), facts["model"], facts["ms"]["load"], tuple(facts["warnings"])
    )


async def _facts(client: "Client", bar: ProgressBar, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    async def tell(progress: float, total: float | None, message: str | None) -> None:
        bar.tell(progress / (total or 100.0), f"{tool}: {message}" if message else tool)

    result = await client.call_tool(tool, arguments, progress_callback=tell)
    text = next((block.text for block in result.content if block.type == "text"), "")
    if result.is_error:
        raise RequestError(f"{tool} failed: {text}")
    return json.loads(text)
