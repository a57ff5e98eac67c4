"""The output formats, one folder a format."""
