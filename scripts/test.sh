#!/usr/bin/env bash
# Every check: lint, formatting, types, tests. Arguments go to pytest (-m "not slow" leaves out the long ones).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
source .venv/bin/activate
ruff check --quiet .
ruff format --check --quiet .
mypy
export HF_HUB_OFFLINE=1
pytest "$@"
