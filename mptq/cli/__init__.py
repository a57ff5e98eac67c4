"""The command line: parses, calls one library function with plain values, prints, and chooses the exit code."""
