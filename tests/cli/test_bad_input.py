"""Mistakes a user makes: exit code, one readable message, nothing lost, no traceback."""

from __future__ import annotations

import json
import sys

import pytest

from ..processes import environment, run_python
from .commands import (
    REPOSITORY,
    TWO,
    ZERO2,
    check_refused,
    module,
    run,
    succeed,
    train,
    train_arguments,
)

#: Overrides, exit code, and what the message must say.
MISTAKES = [
    (("model.num_heads=5",), 2, "num_heads=5 does not divide hidden_size=32"),
    (("parallel.ep_size=2",), 2, "parallel.ep_size=2 does not divide the number of ranks, 1"),
    (("train.micro_batch_size=3",), 2, "train.micro_batch_size=3"),
    (("data.dataset=latents", "model.input_size=8"), 3, "data.path is not set"),
    (
        ("routing.method=diff_moe", "routing.num_experts=32", "train.global_batch_size=1"),
        2,
        "train.micro_batch_size",
    ),
    (("routing.method=classification",), 2, "method=classification needs superclass_map"),
    (
        ("routing.superclass_map=map.yaml", "routing.method=classification"),
        2,
        "routing.superclass_map=map.yaml: class 8 is missing",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "code", "expected"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES]
)
def test_train_wrong_setting_is_refused_in_one_message(tmp_path, overrides, code, expected) -> None:
    (tmp_path / "map.yaml").write_text("a: [0, 1]\nb: [2, 3]\nc: [4, 5, 6]\nd: [7, 9]\n")
    check_refused(train(*overrides, cwd=tmp_path), expected, code)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_train_wrong_file_is_refused_in_one_message(tmp_path) -> None:
    check_refused(train(cwd=tmp_path, recipe="digits_promo"), "did you mean digits_promoe?", 2)
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 4}))
    done = train(cwd=tmp_path, config="ds.json")
    check_refused(done, "train_batch_size=4 contradicts train.global_batch_size=8", 2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    check_refused(train(cwd=tmp_path), "is not empty and holds no run of this package", 4)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_train_two_ranks_one_message(tmp_path) -> None:
    """Under a launcher, too, a mistake is reported once."""
    arguments = train_arguments("train.global_batch_size=7")
    done = run(*TWO, "promoe_ds.cli.train", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: train.global_batch_size=7 cannot be cut into 2") == 1
    # torchrun has a traceback of its own
    assert str(REPOSITORY / "promoe_ds") not in done.stderr


def test_train_after_a_failed_first_start_takes_the_corrected_command(tmp_path) -> None:
    latents = ("data.dataset=latents", "model.in_channels=4", "model.num_classes=3")
    done = train(*latents, "data.path=nowhere", cwd=tmp_path)
    check_refused(done, "data.path=nowhere: no *.safetensors shard there", 3)
    import torch
    from safetensors.torch import save_file

    (tmp_path / "shards").mkdir()
    shard = {"latents": torch.randn(16, 4, 8, 8), "labels": torch.arange(16) % 3}
    save_file(shard, tmp_path / "shards" / "0.safetensors")
    succeed(train(*latents, "data.path=shards", "train.max_steps=2", cwd=tmp_path))
    (tmp_path / "run" / "config.yaml").write_text("model: [unclosed")
    check_refused(train(*latents, "data.path=shards", cwd=tmp_path), "run/config.yaml", 4)


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        (
            "promoe_b",
            (),
            ("total: 300607520", "activated: 130572320", '"train_batch_size": 256'),
        ),
        # Without a launcher, the fewest ranks.
        ("digits_promoe", ("--set", "parallel.ep_size=4"), ("ranks: 4", "ZeRO 2 on 4 ranks")),
    ],
)
def test_dry_run_prints_sizes_and_trains_nothing(tmp_path, recipe, overrides, expected) -> None:
    files = ("--recipe", recipe, "--deepspeed_config", ZERO2)
    printed = succeed(module("train", *files, "--dry-run", *overrides, cwd=tmp_path))
    assert all(words in printed for words in expected)
    assert list(tmp_path.iterdir()) == []


def test_train_error_on_one_rank_only_is_reported_by_that_rank(tmp_path) -> None:
    """Rank 1 cannot read its shard: rank 0 knows nothing of it, the message comes all the same."""
    script = (
        "import os; from promoe_ds.cli.entry import run_entry; from promoe_ds.errors import"
        " DataError\nimport time\ndef main(arguments):\n    if os.environ['RANK'] == '1': raise"
        " DataError('shard 7 is gone')\n    time.sleep(60)\nrun_entry(main)"
    )
    (tmp_path / "script.py").write_text(script)
    done = run(*TWO[:-1], "script.py", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: rank 1: shard 7 is gone") == 1


def test_what_was_shown_before_an_error_is_not_lost(tmp_path) -> None:
    script = (
        "import sys\nfrom promoe_ds.cli.entry import run_entry\nfrom promoe_ds.errors import"
        " DataError\ndef main(arguments):\n    sys.stdout.write('figures')\n    raise"
        " DataError('no disk')\nrun_entry(main)"
    )
    done = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONUNBUFFERED="")
    assert (done.returncode, done.stdout) == (3, "figures")


def test_save_disk_full_previous_checkpoint_stays_valid(tmp_path) -> None:
    """The kernel refuses to write on, as it does on a full disk: an error, and the checkpoint
    before is resumable.
    """
    succeed(train("train.stop_after_steps=2", cwd=tmp_path))
    command = ["-m", "promoe_ds.cli.train", *train_arguments("parallel.ep_size=1")]
    done = run_python(command, cwd=tmp_path, env=environment(), timeout=300, limit=400_000)
    check_refused(done, "the checkpoint could not be written: rank 0:", 4)
    saved = "run/checkpoints/step_0000002"
    assert f"the newest complete checkpoint is {saved}" in done.stderr
    folders = [path for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir()]
    assert folders == [tmp_path / saved]
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.rename(tmp_path / "metrics.jsonl")
    metrics.symlink_to("/dev/full")
    check_refused(
        train(cwd=tmp_path), "run/metrics.jsonl could not be written (No space left on device)", 4
    )
    (tmp_path / "metrics.jsonl").replace(metrics)
    assert f"resume: taking {saved}" in succeed(train(cwd=tmp_path))
