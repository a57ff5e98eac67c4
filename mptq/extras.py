"""Packages that only some runs need: the optional dependencies `report` and `data` of pyproject.toml."""

from __future__ import annotations

from importlib.util import find_spec


def missing(*packages: str) -> str | None:
    """Returns which of `packages` are not installed, and the command that installs them; None if all are."""
    absent = [package for package in packages if find_spec(package) is None]
    if not absent:
        return None
    which = f"the package {absent[0]} is" if len(absent) == 1 else f"the packages {', '.join(absent)} are"
    return f"{which} not installed: pip install {' '.join(absent)}"
