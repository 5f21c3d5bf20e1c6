"""`klein-mcp replay`: generate an image's history again with this machine's engine."""

import argparse
import json
import os
import sys
from dataclasses import replace

from klein_mcp.cli.arguments import seed as seed_argument
from klein_mcp.cli.records import describe_record, expect_handle
from klein_mcp.cli.terminal import ProgressBar, strip_control_chars
from klein_mcp.errors import one_line
from klein_mcp.images.paths import expanded
from klein_mcp.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("handle", metavar="HANDLE", help="an image of the library, see klein-mcp list")
    parser.add_argument("--onto", metavar="IMG", help="another image at the root of its history: a file or a handle")
    parser.add_argument("--seed", type=seed_argument, metavar="N", help="another seed; default: each image's own")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    import anyio

    return anyio.run(run_replay, settings, arguments.handle, arguments.onto, arguments.seed, arguments.json)


async def run_replay(settings: Settings, handle: str, onto: str | None, seed: int | None, as_json: bool) -> int:
    """Replay an image through the daemon, and print what was made."""
    from klein_mcp.daemon.client import DaemonClient
    from klein_mcp.jobs.context import CallContext
    from klein_mcp.jobs.replay import changed_weights, plan, replay
    from klein_mcp.jobs.service import Service

    if onto is not None and os.path.exists(expanded(onto)):
        file = expanded(onto).resolve()  # a terminal has a working directory; a reference has none
        # The person at the terminal named it: the read roots are for what agents name.
        settings, onto = replace(settings, read_roots=(file,)), str(file)
    jobs = DaemonClient(settings)
    service = Service(settings, jobs)
    try:
        expect_handle(service.store, handle)
        steps = plan(service.store, handle, onto=onto is not None).steps
        with ProgressBar("starting the engine") as bar:

            async def show_progress(done: float, total: float, message: str) -> None:
                bar.update(done / total, message)

            call = CallContext("replay", progress=show_progress)
            results = await replay(service, handle, call, onto=onto, seed=seed)
        made = [result.images[0] for result in results]
        records = [service.store.get(image.handle) for image in made]
        # Before they are described: this makes the readable names.
        paths = [service.store.readable_path(record) for record in records]
        facts = [
            {**describe_record(service.store, record), "warnings": result.warnings}
            for record, result in zip(records, results, strict=True)
        ]
        different = changed_weights(steps, made)
    finally:
        await jobs.aclose()
        service.close()
    if as_json:
        print(json.dumps(facts))
    else:
        for old, new in zip(steps, facts, strict=True):
            print(f"{old.handle} → {new['image']}  {one_line(strip_control_chars(str(new['prompt'])), 60)}")
        print(paths[-1])
    for number, result in enumerate(results, 1):
        for warning in result.warnings:
            print(strip_control_chars(f"klein-mcp: step {number}: {one_line(warning)}"), file=sys.stderr)
    if different:
        print(f"generated with other weights than the first time: {', '.join(different)}", file=sys.stderr)
    return 0
