"""`python -m klein_mcp` is `klein-mcp`."""

import sys

from klein_mcp.cli.main import main

sys.exit(main())
