"""save_image: writes the full image into the user's project."""

import sqlite3

import anyio.to_thread
from mcp_types import CallToolResult

from klein_mcp.errors import RequestError
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.folders import writable
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.tool import Tool


class SaveImage(fields.Arguments):
    image: fields.ImageRef
    path: fields.SavePath
    format: fields.SaveFormat | None = None
    max_size: fields.SaveSize | None = None
    size: fields.SaveExact | None = None
    strip_metadata: fields.Strip = False
    background: fields.CutOut | None = None
    overwrite: fields.Overwrite = False


async def run(service: Service, call: CallContext, arguments: SaveImage) -> CallToolResult:
    from klein_mcp.images import credentials, export

    opened = await service.open(arguments.image, call)
    roots = await writable(service.settings, call)
    options = export.SaveOptions(
        arguments.path,
        arguments.format,
        arguments.max_size,
        arguments.strip_metadata,
        arguments.overwrite,
        arguments.size,
        transparent=arguments.background is not None,
    )
    settings = service.settings

    def save() -> tuple[export.SavedFile, str]:
        signer = credentials.from_setting(settings.credentials, settings.home)
        file = export.save(service.store, opened.record, options, roots, signer)
        try:
            service.store.note_saved(opened.record.handle, str(file.path))
        except (RequestError, OSError, sqlite3.Error) as exc:  # the file is there all the same
            return file, f"the file is written, but the image's history will not name it: {exc}"
        return file, ""

    saved, unnoted = await anyio.to_thread.run_sync(save)
    payload = {
        "image": opened.record.handle,
        "saved": str(saved.path),
        "format": saved.format,
        "width": saved.width,
        "height": saved.height,
        "bytes": saved.bytes,
        **({"background": "transparent", "alpha": saved.alpha} if saved.alpha else {}),
    }
    warnings = [*opened.warnings, *saved.warnings, *([unnoted] if unnoted else [])]
    if arguments.max_size and max(saved.width, saved.height) < arguments.max_size and arguments.size is None:
        warnings.append(
            f"max_size {arguments.max_size} only shrinks: {saved.width}×{saved.height} was written; size enlarges"
        )
    if warnings:
        payload["warnings"] = warnings
    return CallToolResult(content=[results.text(payload)])


TOOL = Tool(
    name="save_image",
    title="Save an image",
    description=(
        "Write the full image into the user's project as PNG, JPEG or WebP; makes folders, and replaces nothing "
        "unless asked to. The library keeps its own copy."
    ),
    arguments=SaveImage,
    run=run,
    destructive=True,
)
