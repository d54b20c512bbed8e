#!/usr/bin/env bash
# Set up and run the tests: ./launch_scripts/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
promoe_environment
cd "$promoe_root"
ruff check .
exec python -m pytest "$@"
