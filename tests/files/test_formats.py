"""Every format that owners of klein hold, as `python -m tests.files` prints them."""

import subprocess
import sys

import pytest


@pytest.mark.formats
def test_every_format_and_every_line_of_models_is_right() -> None:
    """Observed: 44 formats and 44 lines in one minute."""
    done = subprocess.run([sys.executable, "-m", "tests.files"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.endswith("all as they should be\n")
