"""What Claude Desktop runs: uv makes the environment of the pyproject.toml beside it, then starts this."""

import sys

from klein_mcp.cli.main import main

sys.exit(main([]))
