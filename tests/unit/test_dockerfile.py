"""The Dockerfile: hadolint accepts it, and it installs and starts mptq as the README says."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"


def lines():
    return DOCKERFILE.read_text().replace("\\\n", " ").splitlines()


def test_hadolint_accepts_it():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_it_installs_what_the_readme_says():
    readme = (ROOT / "README.md").read_text()
    (install,) = (line for line in lines() if "torch" in line and line.startswith("RUN"))
    assert "'.[data,report]'" in install
    assert "pip install '.[data,report]'" in readme


def test_what_it_copies_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in lines():
        if line.startswith("COPY"):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name
                assert f"!{name}" in ignored, name


def test_it_starts_the_command():
    (entry,) = (line for line in lines() if line.startswith("ENTRYPOINT"))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(entry.removeprefix("ENTRYPOINT"))[0] in scripts
