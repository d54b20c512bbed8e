#!/usr/bin/env bash
# Train on the hosts of a hostfile: ./launch_scripts/multinode.sh HOSTFILE RECIPE DEEPSPEED_CONFIG RUN_DIR [options of promoe_ds.cli.launch] [-- arguments of promoe_ds.cli.train]
#
# Checks every host, launches over pdsh, watches the job and restarts it, e.g.
#   ./launch_scripts/multinode.sh hosts promoe_xl ds_configs/zero2_bf16.json /shared/runs/xl --max-restarts 3 -- --set parallel.ep_size=4
# From the first ssh key to the first step: docs/guides/multinode.md.
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n 's/^# //;2p' "$0" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
# shellcheck source=launch_scripts/ranks.sh
. launch_scripts/ranks.sh
promoe_activate
hostfile="$1" recipe="$2" config="$3" run_dir="$4"
shift 4
options=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    options+=("$1")
    shift
done
if [ $# -gt 0 ]; then
    shift
fi
exec python -m promoe_ds.cli.launch --hostfile "$hostfile" "${options[@]}" -- --recipe "$recipe" --deepspeed_config "$config" \
    --run-dir "$run_dir" "$@"
