#!/usr/bin/env bash
# Set up and run the tests: ./launch_scripts/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
promoe_environment
cd "$promoe_root"
# Reports are looked at in a real browser; without one, those tests are skipped and say so.
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium for the tests of reports"
    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 ||
        echo "chromium could not be installed: the tests that need it are skipped"
fi
ruff check .
exec python -m pytest "$@"
