# shellcheck shell=bash
# Sourced by single_node.sh and, on every node, by slurm.sbatch: start this host's ranks under deepspeed and pass wishes to
# stop on to them.

# The environment of this repository, unless one is active. Nothing is installed.
promoe_activate() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
}

# run_ranks ARGUMENTS OF deepspeed: returns its exit code; 75 after SIGTERM or SIGUSR1, when the ranks have saved.
run_ranks() {
    local runner code=0
    set -m  # a process group of its own: a signal to ours reaches the ranks through us, once
    deepspeed "$@" &
    runner=$!
    set +m
    # To the ranks alone: deepspeed's own processes would die or, after half a minute, kill ranks that are still saving.
    # shellcheck disable=SC2064
    trap "promoe_stop $runner" TERM INT USR1
    while kill -0 "$runner" 2> /dev/null; do
        code=0
        wait "$runner" || code=$?
    done
    trap - TERM INT USR1
    return "$code"
}

promoe_stop() {
    local launcher
    for launcher in $(pgrep -P "$1"); do
        pkill -TERM -P "$launcher" || true
    done
}
