"""The klein engine: a prompt and RGB8 arrays in, RGB8 arrays out. It has never heard of a path, a handle or MCP."""
