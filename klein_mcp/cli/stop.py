"""`klein-mcp stop`: end this user's engine, and wait until it is gone."""

import argparse
import json

from klein_mcp.cli.daemon import stop_daemon
from klein_mcp.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    """Take no arguments."""


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    stopped = stop_daemon(settings)
    print(json.dumps({"stopped": stopped}) if arguments.json else "stopped" if stopped else "no engine was running")
    return 0
