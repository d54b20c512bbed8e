"""Print what a judge wants drawn: python -m promoe_ds.evaluation.judges DATASET NUMBER."""

import sys

from promoe_ds.evaluation.judges.table import judge_of

if __name__ == "__main__":
    prompts = judge_of(sys.argv[1]).wanted(int(sys.argv[2]))["prompts"]
    sys.stdout.write("".join(f"{prompt}\n" for prompt in prompts))
