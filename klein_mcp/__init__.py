"""klein-mcp: any number of agents share one warm FLUX.2 [klein] engine, and every call returns its image."""

from klein_mcp import _own_packages

__version__ = "0.1.0"

# Here and nowhere later: every module of ours that imports `engine` or `prompts` imports this package first.
_own_packages.install()
