"""A scripted agent's loop over stdio: draft, look, edit, save.

    python examples/iterate.py [FOLDER]

A language model would look at the images; this script measures them for a clean background. Everything else is
what an agent does: it passes handles from one call to the next, and it keeps the seed.
"""

import base64
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from PIL import Image, ImageStat

CHANGES = ("make the background blue", "add a yellow star in the top right corner")


def server(folder: Path) -> StdioServerParameters:
    """Return the command that starts klein-mcp, allowed to save into `folder`.

    If klein-mcp is installed, `command="klein-mcp"` is enough.
    """
    environment = {**os.environ, "KLEIN_WRITE_ROOTS": str(folder)}
    return StdioServerParameters(command=sys.executable, args=["-m", "klein_mcp"], env=environment)


async def call(client: Client, tool: str, **arguments: Any) -> tuple[dict[str, Any], Image.Image | None]:
    """Return the metadata of a result, and its preview for the model."""
    result = await client.call_tool(tool, arguments)
    text = result.content[0].text  # type: ignore[union-attr]
    if result.is_error:
        raise RuntimeError(f"{tool}: {text}")
    facts = json.loads(text)
    if "job" in facts:  # on a slow machine the image is not ready yet
        return await call(client, "wait_for_job", job=facts["job"])
    seen = [block for block in result.content if block.type == "image"]
    return facts, Image.open(io.BytesIO(base64.b64decode(seen[0].data))) if seen else None


def unrest(picture: Image.Image) -> float:
    """Measure how much the outermost pixels differ.

    Returns 0 for a background of one colour.
    """
    width, height = picture.size
    frame = picture.convert("RGB")
    edges = [frame.crop(box) for box in ((0, 0, width, 4), (0, height - 4, width, height), (0, 0, 4, height))]
    return sum(sum(ImageStat.Stat(edge).stddev) for edge in edges)


async def main(folder: Path) -> None:
    """Draft, look, edit, save."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    async with Client(server(folder)) as client:
        drafts, sheet = await call(client, "generate_image", prompt="a cat on a green background", count=4, seed=1)
        print(f"4 drafts on a sheet of {sheet.size if sheet else 'no preview'}")

        looks = [(await call(client, "view_image", image=draft["image"]))[1] for draft in drafts["images"]]
        scores = [unrest(look) for look in looks if look]
        best = drafts["images"][scores.index(min(scores))]
        print(f"kept draft {best['label']}, seed {best['seed']}")

        picture = best["image"]
        for change in CHANGES:
            edited, _ = await call(client, "edit_image", image=picture, prompt=change, seed=best["seed"])
            print(f"{change}: {picture} → {edited['image']}, {edited['changed']['share']:.0%} of it changed")
            picture = edited["image"]

        saved, _ = await call(client, "save_image", image=picture, path=str(folder / "iterated.png"))
        print(f"saved {saved['saved']}")


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1] if len(sys.argv) > 1 else "klein-example"))
