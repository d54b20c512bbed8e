#!/usr/bin/env bash
# Train ProMoE on emoji and their names under the deepspeed launcher with expert parallelism and ZeRO 2, convert, draw
# prompts, judge, show the experts by group of captions: ./launch_scripts/quickstart_text.sh [OUTPUT_DIR]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ "${1:-}" = "-h" ] || [ "${1:-}" = "--help" ]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
fi
promoe_output "${1:-}" quickstart-text
promoe_environment report,text
cd "$promoe_root"

# Two processes on the CPU, whatever devices there are, so that everybody sees the same.
export DS_ACCELERATOR=cpu
echo "== training on 2 ranks (ep_size 2, ZeRO 2)"
deepspeed --quiet --num_gpus 2 --master_port "$(promoe_free_port)" --module promoe_ds.cli.train --recipe emoji_promoe \
    --deepspeed_config ds_configs/zero2_fp32.json --run-dir "$promoe_out/run"
echo "== converting the shards to one file"
python tools/convert_checkpoint.py "$promoe_out/run" "$promoe_out/export" --to single
echo "== drawing launch_scripts/emoji_prompts.txt"
python -m promoe_ds.cli.sample --model "$promoe_out/export" --out "$promoe_out/prompts" --device cpu \
    --prompts launch_scripts/emoji_prompts.txt --grid
echo "== drawing and judging known and held-out captions"
python -m promoe_ds.cli.evaluate --dataset emoji --write-prompts "$promoe_out/captions.txt"
python -m promoe_ds.cli.sample --model "$promoe_out/export" --out "$promoe_out/samples" --device cpu \
    --prompts "$promoe_out/captions.txt"
python -m promoe_ds.cli.evaluate --samples "$promoe_out/samples" --dataset emoji --out "$promoe_out/report.json"
python tools/expert_load.py "$promoe_out/run"
echo "a prompt of your own: python -m promoe_ds.cli.sample --model $promoe_out/export --out OUT --prompt 'a red apple'"
echo "outputs: run $promoe_out/run, export $promoe_out/export, grid $promoe_out/prompts/grid.png," \
    "figures $promoe_out/report.json, page of the experts $promoe_out/run/expert_load.html"
echo "The pictures are made from OpenMoji's (CC BY-SA 4.0, https://openmoji.org)."
