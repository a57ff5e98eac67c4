#!/usr/bin/env bash
# Build the documentation into site/, without network; any warning is an error. With --serve, show it while it is edited.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
source .venv/bin/activate
if [ "${1:-}" = --serve ]; then exec mkdocs serve; fi
export NO_MKDOCS_2_WARNING=1 # about the successor of mkdocs
exec mkdocs build --strict --quiet
