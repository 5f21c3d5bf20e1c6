"""What a user starts from: client configurations, and programs that drive klein-mcp. The tests run all of it."""
