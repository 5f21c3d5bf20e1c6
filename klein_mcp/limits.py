"""Limits and names that requests and images share."""

import re
import secrets

MIN_SIDE, MAX_SIDE = 64, 2048
GRID = 16
"""Pixels: requested sizes are multiples of it, as one token of a published model is 16 × 16."""
MAX_AREA = 2048 * 2048
MAX_SEED = 2**63 - 1
EXACT = 2**53 - 1
"""The largest whole number that every JSON reader keeps; larger seeds travel as text."""
MAX_FILE_BYTES = 64 * 2**20
"""Of one image file that comes in: a 4096² PNG of pure noise is 50 MB."""

JOB_ID = re.compile(r"j[0-9a-f]{12}")
"""The name of a job."""


def new_job_id() -> str:
    return "j" + secrets.token_hex(6)
