"""How a door's process ends: at once."""

import logging
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """Without taking the interpreter down piece by piece, which on a busy machine takes longer than all the rest."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
