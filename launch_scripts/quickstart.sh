#!/usr/bin/env bash
# Train ProMoE on real digits under the deepspeed launcher with expert parallelism and ZeRO 2, stop half-way, resume,
# convert, sample, evaluate: ./launch_scripts/quickstart.sh [OUTPUT_DIR]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ "${1:-}" = "-h" ] || [ "${1:-}" = "--help" ]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
fi
promoe_output "${1:-}" quickstart
out="$promoe_out"
promoe_environment report
cd "$promoe_root"

# Two processes on the CPU, whatever devices there are, so that everybody sees the same; --quiet silences the launcher alone.
export DS_ACCELERATOR=cpu
train() {
    deepspeed --quiet --num_gpus 2 --master_port "$(promoe_free_port)" --module promoe_ds.cli.train --recipe digits_promoe \
        --deepspeed_config ds_configs/zero2_fp32.json --run-dir "$out/run" "$@"
}

echo "== training on 2 ranks (ep_size 2, ZeRO 2), stopped half-way"
train --set train.stop_after_steps=450
echo "== resuming to the end"
train --resume auto
echo "== converting the shards to one file"
python tools/convert_checkpoint.py "$out/run" "$out/export" --to single
echo "== sampling"
python -m promoe_ds.cli.sample --model "$out/export" --out "$out/samples" --num 500 --grid --device cpu
echo "== evaluating"
python tools/evaluate_digits.py "$out/samples" --out "$out/report.json" --require 0.85
python tools/expert_load.py "$out/run"
echo "outputs: run $out/run, export $out/export, samples $out/samples, grid $out/samples/grid.png, figures $out/report.json," \
    "page of the experts $out/run/expert_load.html"
