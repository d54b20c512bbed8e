"""Mistakes in what the commands beside training are given: exit code, one message that names the
option or the file, nothing written, no traceback.
"""

from __future__ import annotations

import pytest

from .commands import check_refused, module, tool
from .conftest import CUT

CONVERT = [
    ("nowhere e --to single", 4, "nowhere: there is no such file or folder"),
    ("run export --to single", 4, "export exists already"),
    ("cut e --to single", 4, f"cut/{CUT} has 1000 bytes"),
    ("run e --to single --max-shard-size 0", 2, "--max-shard-size: 0"),
    ("run e --to single --weights raw --ema-sigma-rel 0.1", 2, "--ema-sigma-rel"),
    ("run e --to single --ema-sigma-rel 0.1 --recipe r", 2, "--recipe has no effect with --ema"),
    ("run e --to single --with-optimizer --dtype bf16", 2, "--dtype --with-optimizer"),
    ("run e --to single --vae x", 2, "--vae has no effect with --to single"),
    ("run e --to single --set a.b=1", 2, "--set changes a value of --recipe"),
    ("run e --to diffusers --with-optimizer", 2, "--with-optimizer"),
    ("run e --to deepspeed --dtype bf16", 2, "--dtype"),
    ("run e --to official --with-optimizer --weights raw", 2, "--weights --with-optimizer"),
]
SAMPLE = [
    ("--out s --model nowhere", 4, "nowhere is no export"),
    ("--out s --model garbage", 4, "garbage/model.safetensors: cannot be read"),
    ("--out s --model export --classes 1,12", 2, "knows the classes 0 ... 9"),
    ("--out s --model export --classes 1,x", 2, "--classes: x"),
    ("--out s --model export --num 0", 2, "--num/--num-samples: 0"),
    ("--out s --model export --seed 9223372036854775808", 2, "--seed: 9223372036854775808"),
    ("--out s --model export --solver ddim", 2, "--solver=ddim"),
]
DIGITS = [
    ("nowhere", 3, "nowhere"),
    ("run --out no/report.json", 2, "--out no/report.json: there is no folder no"),
    ("run --require nan", 2, "--require: nan"),
]
ENCODE = [
    ("--images x --vae v", 2, "--out is needed"),
    ("--images x --out o", 2, "--images needs --vae"),
    ("--from-npz x --out o", 2, "--from-latents needs --vae-name"),
    ("--from-npz x --out o --vae-name n --no-flip", 2, "--flip has no effect with --from-latents"),
    ("--images x --verify y", 2, "--verify"),
    ("--verify y --workers 0", 2, "--workers: 0"),
]
LOAD = [
    ("nowhere", 3, "nowhere: no routing statistics there"),
    ("run --compare .", 3, ".: no routing statistics there"),
    ("run --out no/such/page.html", 3, "no/such/page.html cannot be written"),
    ("run --placement p.json --ep-size 3", 2, "--ep-size 3 does not divide"),
    ("run --last-steps 0", 2, "--last-steps: 0"),
    ("empty", 3, "routing.jsonl is empty"),
    ("nowhere --follow", 3, "nowhere: no routing statistics there"),
    ("run --follow --every nan", 2, "--every: nan"),
    ("run --follow --export x", 2, "--export has no effect with --follow"),
    ("run --follow --last-steps 5", 2, "--last-steps has no effect with --follow"),
    ("run --ep-size 2", 2, "--ep-size has no effect without --placement"),
    ("run --every 3", 2, "--every has no effect without --follow"),
    ("run --no-html --out x.html", 2, "--out has no effect with --no-html"),
    ("silent --placement p.json", 3, "--placement p.json: no token was routed"),
]
ANALYZE = [
    ("export --singular-vectors 99 --images 4", 2, "--singular-vectors 99: an expert's matrix"),
    ("export --sigmas 1.5", 2, "--sigmas: 1.5"),
    ("export --images 1", 2, "--images: 1"),
    ("export --tokens 19", 2, "--tokens: 19"),
    ("export --seed -1", 2, "--seed: -1"),
    ("export --device gpu", 2, "--device gpu: "),
    ("export --out y.json", 2, "--out y.json"),
    ("export --out no/y.html", 3, "y.html cannot be written: No such file or directory"),
    ("export --export export/config.json", 3, "export/config.json cannot be written"),
    ("export --data-path latents", 2, "path=latents has no use for dataset=digits"),
]
COMMANDS = {
    "convert_checkpoint": CONVERT,
    "evaluate_digits": DIGITS,
    "encode_latents": ENCODE,
    "expert_load": LOAD,
    "analyze_experts": ANALYZE,
    "sample": SAMPLE,
}


@pytest.mark.parametrize(
    ("name", "arguments", "code", "said"),
    [(name, *mistake) for name, mistakes in COMMANDS.items() for mistake in mistakes],
)
def test_mistake_is_one_message(trained, name, arguments, code, said) -> None:
    start = module if name == "sample" else tool
    check_refused(start(name, *arguments.split(), cwd=trained), said, code)
    assert not any((trained / written).exists() for written in ("e", "s", "o", "p.json", "x"))
