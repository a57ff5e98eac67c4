"""The command line: parses options, calls one library function, prints its result and sets the exit code."""
