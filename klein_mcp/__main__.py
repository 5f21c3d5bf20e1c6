"""`python -m klein_mcp` is `klein-mcp`."""

import sys

from klein_mcp.cli import main

sys.exit(main())
