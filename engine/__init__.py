"""The klein engine: a prompt and RGB8 arrays in, RGB8 arrays out.

It knows neither image files nor handles nor MCP.
"""
