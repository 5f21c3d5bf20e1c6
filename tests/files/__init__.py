"""Every file format that owners of klein hold, written as a toy. `python -m tests.files` prints the table."""
