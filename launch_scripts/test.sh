#!/usr/bin/env bash
# Set up and run the tests: ./launch_scripts/test.sh [--all] [pytest arguments]
set -euo pipefail
case "${1:-}" in -h | --help)
    cat << 'EOF'
usage: ./launch_scripts/test.sh [--all] [pytest arguments]

Sets up an environment, then runs ruff, mypy, the site (strict) and the tests, several at a time.
  (nothing)   everything that guards a promise of the README: at most 12 minutes on two idle cores
  --all       every combination of the parts as well: at most 35 minutes
  -n 0        one test at a time (pytest-xdist); other arguments go to pytest as they are:
              tests/unit -k routing, -x, --durations=20, ...
EOF
    exit 0
    ;;
esac
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
promoe_environment docs,megatron,report,test,text
cd "$promoe_root"

# install_packages WHAT_FOR PACKAGES...: where root, and where no systemd would start their servers for good. The tests that need what
# is missing are skipped, and pytest says why.
install_packages() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null && [ ! -d /run/systemd/system ] || return 0
    local purpose="$1"
    shift
    echo "installing $* for the tests $purpose"
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@") > /dev/null 2>&1 \
        || echo "they could not be installed: the tests $purpose will be skipped"
}
if ! { command -v pdsh && command -v ip && command -v /usr/sbin/sshd; } > /dev/null; then
    install_packages "on several hosts" pdsh openssh-server iproute2
fi
if ! command -v chromium > /dev/null; then
    install_packages "of reports in a browser" chromium
fi
ruff check .
ruff format --check .
mypy
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
# Two tests that compute and one that waits, a file's tests together, in the order of tests/conftest.py.
exec python -m pytest -n 3 --dist loadscope --no-loadscope-reorder "$@"
