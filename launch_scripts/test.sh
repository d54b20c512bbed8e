#!/usr/bin/env bash
# Set up and run the tests: ./launch_scripts/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
promoe_environment
cd "$promoe_root"

# Tests on several hosts make them out of namespaces, which needs root and three packages. Without them they are skipped, and
# pytest says why. Where systemd runs, nothing is installed: it would start an ssh server for good.
if ! { command -v pdsh && command -v ip && command -v /usr/sbin/sshd; } > /dev/null && [ "$(id -u)" -eq 0 ] \
    && command -v apt-get > /dev/null && [ ! -d /run/systemd/system ]; then
    echo "installing pdsh, openssh-server and iproute2 for the tests on several hosts"
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends pdsh openssh-server \
        iproute2) > /dev/null 2>&1 || echo "they could not be installed: the tests on several hosts will be skipped"
fi
ruff check .
exec python -m pytest "$@"
