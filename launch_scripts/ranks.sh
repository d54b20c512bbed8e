# shellcheck shell=bash
# Sourced by single_node.sh and, on every node, by slurm.sbatch: start this host's ranks under deepspeed and pass shutdown
# requests on to them.

# The environment of this repository, unless one is active. Nothing is installed.
promoe_activate() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
}

# wait_for PID: returns the exit code of a child, however many signals are trapped meanwhile.
wait_for() {
    while kill -0 "$1" 2> /dev/null; do
        wait "$1" || true
    done
    # A trapped signal ends `wait` with a code of its own; the child may have ended while the trap ran. Bash remembers.
    wait "$1"
}

# run_ranks ARGUMENTS OF deepspeed: returns its exit code; 75 after SIGTERM or SIGUSR1, when the ranks have saved.
run_ranks() {
    local runner code=0
    promoe_asked=no
    set -m  # a process group of its own: a signal to ours reaches the ranks through us, once
    deepspeed "$@" &
    runner=$!
    set +m
    # shellcheck disable=SC2064
    trap "promoe_stop $runner" TERM INT USR1
    wait_for "$runner" || code=$?
    trap - TERM INT USR1
    # 256 - 15, as deepspeed reports it: our signal came before Python could take it, so there was nothing to save.
    if [ "$promoe_asked" = yes ] && [ "$code" -eq 241 ]; then
        code=75
    fi
    return "$code"
}

# promoe_stop RUNNER: signal its ranks alone. deepspeed's own processes would die or, after half a minute, kill ranks that are still
# saving. Ranks that are not there yet are waited for.
promoe_stop() {
    local launcher signalled=no
    promoe_asked=yes
    while [ "$signalled" = no ] && kill -0 "$1" 2> /dev/null; do
        for launcher in $(pgrep -P "$1"); do
            pkill -TERM -P "$launcher" -f 'promoe_ds\.cli\.train --local_rank' && signalled=yes
        done
        [ "$signalled" = yes ] || sleep 0.2
    done
}
