"""The README stays short enough to be read whole."""

from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_it_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) < 150
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 120] == []


def test_the_commands_to_set_up_are_near_the_top():
    top = "\n".join(README.read_text().splitlines()[:30])
    assert "scripts/demo.sh" in top
    assert "scripts/test.sh" in top
    assert "pip install" in top
