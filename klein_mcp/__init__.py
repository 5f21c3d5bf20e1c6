"""klein-mcp: an MCP server for FLUX.2 [klein]."""

from klein_mcp import _own_packages

__version__ = "0.2.0"

# Here and nowhere later: every module of ours that imports `engine` or `prompts` imports this package first.
_own_packages.install()
