#!/usr/bin/env bash
# Train on this host alone: ./launch_scripts/single_node.sh RECIPE DEEPSPEED_CONFIG RUN_DIR [arguments of promoe_ds.cli.train]
#
# One rank for each GPU, or PROMOE_RANKS of them. SIGTERM, Ctrl-C and SIGUSR1 let the ranks finish their step, save and end
# with code 75 (docs/guides/multinode.md).
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n 's/^# //;2p' "$0" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
# shellcheck source=launch_scripts/ranks.sh
. launch_scripts/ranks.sh
promoe_activate
recipe="$1" config="$2" run_dir="$3"
shift 3
run_ranks ${PROMOE_RANKS:+--num_gpus "$PROMOE_RANKS"} --master_port "${MASTER_PORT:-29500}" --module promoe_ds.cli.train \
    --recipe "$recipe" --deepspeed_config "$config" --run-dir "$run_dir" "$@"
