"""All tools, in the order a model reads them."""

from klein_mcp.mcp_server.tools import (
    compose_references,
    edit_image,
    engine_status,
    generate_image,
    list_images,
    save_image,
    view_image,
    wait_for_job,
)
from klein_mcp.mcp_server.tools.tool import Tool

TOOLS: dict[str, Tool] = {
    module.TOOL.name: module.TOOL
    for module in (
        generate_image,
        edit_image,
        compose_references,
        view_image,
        list_images,
        save_image,
        wait_for_job,
        engine_status,
    )
}
