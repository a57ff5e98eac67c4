#!/usr/bin/env bash
# Run every check: lint, formatting, types, tests. With --fast, only the unit tests without the slow ones (2 minutes).
# Other arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --fast ]; then
    shift
    set -- tests/unit -m "not slow" "$@"
    fast=1
fi

# report.html is tested in a browser. Without one that test is skipped, or fails if CI is set.
find_chromium() {
    command -v chromium >/dev/null && return
    local as_root=() log
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
        echo "Chromium is missing and cannot be installed from here: report.html is not tested in a browser" >&2
        return
    fi
    echo "Installing Chromium to test report.html" >&2
    log=$(mktemp)
    if ! { "${as_root[@]}" apt-get update --quiet &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium; } >"$log" 2>&1; then
        tail -n 3 "$log" >&2
        echo "Chromium was not installed: report.html is not tested in a browser" >&2
    fi
    rm -f "$log"
}

[ "${fast:-}" ] || find_chromium
scripts/setup.sh
source .venv/bin/activate
ruff check --quiet .
ruff format --check --quiet .
mypy
# One worker per core (up to four; each needs 2 GB), with single-threaded operators.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
