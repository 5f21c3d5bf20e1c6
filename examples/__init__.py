"""Examples for users: client configurations, and programs that call klein-mcp.

The tests run all of them.
"""
