"""The engine as a Python library: no server, no files, arrays in and arrays out.

    python examples/library.py [FOLDER]

`Engine.run` is a generator of events; the last one is the Painting. Closing it early stops the work.
"""

import sys
from pathlib import Path

from PIL import Image

from engine.contract import Job, KeepSource, Result, Step
from engine.engine import Engine


def paint(engine: Engine, job: Job) -> Result:
    """The picture of one job, with a line for each step on the way."""
    for event in engine.run(job):
        if isinstance(event, Step):
            print(f"  step {event.done} of {event.total}", file=sys.stderr)
        if isinstance(event, Result):
            return event
    raise AssertionError("an engine that ends without a picture raises")


def main(folder: Path) -> None:
    """One picture from words, one edited, one composed of both."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine()  # the best installed model on the best device; EngineConfig(device="cpu") chooses

    apple = paint(engine, Job("an apple on a yellow background", seed=7))
    green = paint(engine, Job("make the background green", references=(apple.image,), size=KeepSource(), seed=7))
    both = paint(engine, Job("image 1 with the background from image 2", references=(apple.image, green.image), seed=7))

    for name, painting in (("apple", apple), ("green", green), ("both", both)):
        Image.fromarray(painting.image).save(folder / f"{name}.png")
        seconds = sum(painting.ms.values()) / 1000
        height, width = painting.image.shape[:2]
        print(f"{name}.png  {width}×{height}  {painting.model}  seed {painting.seed}  {seconds:.2f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "klein-example"))
