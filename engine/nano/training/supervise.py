"""Keeps a training alive by starting it again.

`python -m engine.nano.training.supervise FOLDER OUT --seconds 380 [options of train]`.

A kernel that fails takes its whole process with it. This one starts `train` again with what is left of the time, from
the last state kept, and with plainer attention each time. A training that reports nothing for too long is ended too.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SILENCE = 75.0
"""Seconds without a line in the log after which a training hangs."""
RESERVE = 20.0
"""With less than this left, another start is not worth it."""
ATTEMPTS = 6


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def watch(process: subprocess.Popen, log: Path, deadline: float) -> int:
    """Return the process's exit code, ending it when it hangs."""
    size, since = _size(log), time.time()
    while (code := process.poll()) is None:
        time.sleep(0.5)
        now = time.time()
        if (new := _size(log)) != size:
            size, since = new, now
        if now - since > SILENCE or now > deadline + 15:
            process.kill()
    return code


def supervise(
    folder: Path, out: Path, seconds: float, state: Path, probe: Path | None = None, options: Sequence[str] = ()
) -> bool:
    """Train, starting again after failures, and return whether it succeeded.

    seconds: restarts included. options: of `train`. probe: see `--probe`.
    """
    deadline = time.time() + seconds
    out.mkdir(parents=True, exist_ok=True)
    code, probing = 1, None
    for attempt in range(ATTEMPTS):
        command = [sys.executable, "-m", "engine.nano.training.train", str(folder), str(out)]
        command += ["--deadline", str(deadline), "--state", str(state), "--attention", str(min(attempt, 2)), *options]
        if attempt == 0 and probe:
            probing = subprocess.Popen([sys.executable, "-m", "engine.nano.training.probe", str(folder), str(probe)])
            command += ["--probed", str(probe)]
        code = watch(subprocess.Popen(command), out / "train.jsonl", deadline)
        left = deadline - time.time()
        print(f"attempt {attempt + 1} ended with {code}, {left:.0f} s left", flush=True)
        if code == 0 or left < RESERVE:
            break
    if probing is not None:
        probing.kill()
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="of everything, restarts included")
    parser.add_argument("--state", type=Path, help="where a restart goes on from (default: state.pt in OUT)")
    parser.add_argument("--probe", type=Path, help="try compiling beside the training; the file that says it works")
    args, options = parser.parse_known_args()
    state = args.state or args.out / "state.pt"
    sys.exit(not supervise(args.folder, args.out, args.seconds, state, args.probe, options))


if __name__ == "__main__":
    main()
