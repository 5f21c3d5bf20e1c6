"""Limits and names that requests and images share.

Those that the engine has too are in `engine.contract`.
"""

import re
import secrets

MAX_SIDE = 2048
MAX_AREA = 2048 * 2048
EXACT = 2**53 - 1
"""The largest whole number that every JSON reader keeps; larger seeds travel as text."""
MAX_FILE_BYTES = 64 * 2**20
"""Of one image file that comes in: a 4096² PNG of pure noise is 50 MB."""

JOB_ID = re.compile(r"j[0-9a-f]{12}")
"""The name of a job."""


def new_job_id() -> str:
    return "j" + secrets.token_hex(6)
