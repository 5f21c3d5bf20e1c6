"""The npm packages of these tests: the reference host of MCP Apps, bundled, and axe."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGES = ("@modelcontextprotocol/ext-apps@2.0.4", "zod@4", "esbuild@0.27", "axe-core@4.11")
HERE = Path(__file__).parent


def install(folder: Path) -> Path:
    """Install the packages into `folder`, or skip the tests where npm cannot."""
    if not (folder / "node_modules" / "axe-core").exists():
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *PACKAGES]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=400)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"no npm packages: {error}")
    return folder


def bundle_host(folder: Path) -> str:
    """Return the host page's script as one file."""
    source = folder / "host.mjs"
    shutil.copy(HERE / "host.mjs", source)
    esbuild = folder / "node_modules" / ".bin" / "esbuild"
    command = [str(esbuild), str(source), "--bundle", "--format=iife"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done.stdout
