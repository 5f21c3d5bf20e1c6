"""The engine as a Python library: no server, no files, arrays in and arrays out.

    python examples/library.py [FOLDER]

`Engine.run` is a generator of events; the last one is the `Result`. Closing it early stops the work.
"""

import sys
from pathlib import Path

from PIL import Image

from engine.contract import Job, KeepSource, Result, Step
from engine.engine import Engine


def generate(engine: Engine, job: Job) -> Result:
    """Return the result of one job, printing a line for each step."""
    for event in engine.run(job):
        if isinstance(event, Step):
            print(f"  step {event.done} of {event.total}", file=sys.stderr)
        if isinstance(event, Result):
            return event
    raise AssertionError("an engine ends with a result or raises")


def main(folder: Path) -> None:
    """Generate one image, edit it, and compose both."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine()  # the best installed model on the best device; EngineConfig(device="cpu") chooses

    apple = generate(engine, Job("an apple on a yellow background", seed=7))
    green = generate(engine, Job("make the background green", references=(apple.image,), size=KeepSource(), seed=7))
    both = generate(
        engine, Job("image 1 with the background from image 2", references=(apple.image, green.image), seed=7)
    )

    for name, result in (("apple", apple), ("green", green), ("both", both)):
        Image.fromarray(result.image).save(folder / f"{name}.png")
        seconds = sum(result.ms.values()) / 1000
        height, width = result.image.shape[:2]
        print(f"{name}.png  {width}×{height}  {result.model}  seed {result.seed}  {seconds:.2f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "klein-example"))
