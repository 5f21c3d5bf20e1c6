"""`python -m tests.files [WORD]`: write, load and paint every format as a toy, and print a table.

WORD: only formats with it in their name. --true-size: a 4B in three formats instead, planned and loaded.
"""

import os
import sys
import tempfile
from pathlib import Path

# Threads that spin while they wait collapse beside other work; before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.files import true_size
from tests.files.check import Outcome, check_all, check_models


def line(outcome: Outcome) -> str:
    if outcome.case.refused:
        return f"{outcome.case.name:28} {'refused' if outcome.ok else 'WRONG':10} {outcome.note}"
    found = outcome.label if outcome.ok else f"WRONG {outcome.label}"
    return f"{outcome.case.name:28} {found:10} {outcome.weights:<12.2g} {outcome.image:.3f}  {outcome.note}"


def main() -> int:
    """Exit code 1 if a format is not what it should be."""
    if sys.argv[1:] == ["--true-size"]:
        return true_size.main()
    failed = 0
    print(f"{'format':28} {'recognised':10} {'weights off':12} image off (mean of 255)")
    with tempfile.TemporaryDirectory() as folder:
        home, written = Path(folder) / "models", []
        for outcome in check_all(Path(folder), " ".join(sys.argv[1:])):
            written += [outcome.case] if home in outcome.case.file.parents else []
            failed += not outcome.ok
            print(line(outcome), flush=True)
        print("\nmodels, with all of them in one folder:")
        for text, ok in check_models(home, written):
            failed += not ok
            print(f"  {'ok   ' if ok else 'WRONG'} {text}")
    print(f"\n{failed} wrong" if failed else "\nall as they should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
