#!/usr/bin/env bash
# Every check: lint, formatting, types, tests. Arguments go to pytest (-m "not slow" leaves out the long ones).
set -euo pipefail
cd "$(dirname "$0")/.."

# report.html is tested in a browser. Without one that test is skipped, or fails where CI is set.
find_chromium() {
    command -v chromium >/dev/null && return
    local as_root=() log
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
        echo "Chromium is missing and cannot be installed from here: the page of the report is not tested in a browser" >&2
        return
    fi
    echo "Installing Chromium, in which the page of the report is tested" >&2
    log=$(mktemp)
    if ! { "${as_root[@]}" apt-get update --quiet &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium; } >"$log" 2>&1; then
        tail -n 3 "$log" >&2
        echo "Chromium was not installed: the page of the report is not tested in a browser" >&2
    fi
    rm -f "$log"
}

find_chromium
scripts/setup.sh
source .venv/bin/activate
ruff check --quiet .
ruff format --check --quiet .
mypy
# A worker for each core (up to four, each of which needs 2 GB), whose operators use that core alone.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
