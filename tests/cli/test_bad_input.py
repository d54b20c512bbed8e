"""Mistakes a user makes: exit code, one readable message, nothing lost, no traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ..processes import environment, run_python
from .commands import REPOSITORY, ZERO2, run, train, train_arguments

#: (overrides, what the message must say)
MISTAKES = [
    (("train.max_stepz=3",), "did you mean train.max_steps?"),
    (("model.num_experts=4",), "did you mean routing.num_experts?"),
    (("model.num_heads=5",), "num_heads=5 does not divide hidden_size=32"),
    (("parallel.ep_size=3",), "parallel.ep_size=3 does not divide routing.num_experts=4"),
    (("parallel.ep_size=2",), "parallel.ep_size=2 does not divide the number of ranks, 1"),
    (("routing.top_k=5",), "top_k=5 exceeds num_experts=4"),
    (
        ("train.micro_batch_size=3",),
        "train.global_batch_size=8 is no multiple of train.micro_batch_size=3",
    ),
    (("model.num_classes=7",), "set model.num_classes=10"),
    (("train.max_steps=many",), "train.max_steps='many'"),
    (("parallel.dispatch=local", "parallel.ep_size=2"), "use dispatch=alltoall"),
    (("data.dataset=latents", "model.input_size=8"), "data.path is not set"),
    (("diffusion.objective=ddpm",), "set model.learn_sigma=true"),
    (("routing.method=kmeans", "routing.top_k=2"), "method=kmeans gives every token one expert"),
    (
        ("routing.method=ec_dit", "routing.num_experts=32"),
        "less than one token (method=ec_dit): raise top_k or lower num_experts",
    ),
    (
        ("routing.method=diff_moe", "routing.num_experts=32", "train.global_batch_size=1"),
        "raise train.micro_batch_size",
    ),
    (
        ("routing.method=ec_dit", "routing.rcl_weight=2"),
        "rcl_weight=2.0 has no use for method=ec_dit",
    ),
    (("routing.method=classification",), "method=classification needs superclass_map"),
    (
        ("routing.superclass_map=nowhere", "routing.method=classification"),
        "is no packaged map (digits) and cannot be read",
    ),
    (
        ("sampling.solver=euler", "diffusion.objective=ddpm", "model.learn_sigma=true"),
        "set it to ddpm or ddim",
    ),
    (
        ("sampling.solver=ddim",),
        "sampling.solver=ddim cannot sample diffusion.objective=rectified_flow: set it to euler",
    ),
]


def check_refused(done, expected: str, code: int) -> None:
    assert done.returncode == code, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "expected"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES]
)
def test_train_wrong_setting_is_refused_in_one_message(tmp_path, overrides, expected) -> None:
    done = train(*overrides, cwd=tmp_path)
    check_refused(done, expected, 3 if "data.path" in expected else 2)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_train_superclass_map_without_a_class_names_it_in_one_line(tmp_path) -> None:
    (tmp_path / "map.yaml").write_text("a: [0, 1]\nb: [2, 3]\nc: [4, 5, 6]\nd: [7, 9]\n")
    done = train("routing.method=classification", "routing.superclass_map=map.yaml", cwd=tmp_path)
    check_refused(
        done, "routing.superclass_map=map.yaml misses class 8: every class needs a superclass", 2
    )
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


def test_train_unknown_recipe_suggests_a_name(tmp_path) -> None:
    check_refused(train(cwd=tmp_path, recipe="digits_promo"), "did you mean digits_promoe?", 2)


def test_train_batch_in_both_files_names_both_places(tmp_path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"train_batch_size": 4, "zero_optimization": {"stage": 2}})
    )
    check_refused(
        train(cwd=tmp_path, config="ds.json"),
        "train_batch_size=4 contradicts train.global_batch_size=8",
        2,
    )


def test_train_two_ranks_one_message(tmp_path) -> None:
    """Under a launcher, too, a mistake is told once."""
    done = run(
        "torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "promoe_ds.cli.train",
        *train_arguments("train.global_batch_size=7"),
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert (
        done.stderr.count("error: train.global_batch_size=7 cannot be cut into 2 equal shares") == 1
    )
    assert str(REPOSITORY / "promoe_ds") not in done.stderr, (
        "a traceback of ours"
    )  # torchrun has one of its own


def test_train_occupied_directory_is_refused(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    check_refused(train(cwd=tmp_path), "is not empty and holds no run of this package", 4)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_train_after_a_failed_first_start_takes_the_corrected_command(tmp_path) -> None:
    latents = ("data.dataset=latents", "model.in_channels=4", "model.num_classes=3")
    check_refused(
        train(*latents, "data.path=nowhere", cwd=tmp_path),
        "data.path=nowhere: no *.safetensors shard there",
        3,
    )
    import torch
    from safetensors.torch import save_file

    (tmp_path / "shards").mkdir()
    save_file(
        {"latents": torch.randn(16, 4, 8, 8), "labels": torch.arange(16) % 3},
        tmp_path / "shards" / "0.safetensors",
    )
    done = train(*latents, "data.path=shards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_train_damaged_config_of_the_run_is_one_message(tmp_path) -> None:
    assert train("train.max_steps=2", cwd=tmp_path).returncode == 0
    (tmp_path / "run" / "config.yaml").write_text("model: [unclosed")
    check_refused(train(cwd=tmp_path), "run/config.yaml", 4)


def test_dry_run_prints_sizes_and_trains_nothing(tmp_path) -> None:
    done = run(
        sys.executable,
        "-m",
        "promoe_ds.cli.train",
        "--recipe",
        "promoe_b",
        "--deepspeed_config",
        str(REPOSITORY / "ds_configs" / "zero2_bf16.json"),
        "--dry-run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "total: 300607520" in done.stdout
    assert "activated: 130572320" in done.stdout
    assert '"train_batch_size": 256' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_without_launcher_assumes_the_fewest_ranks(tmp_path) -> None:
    done = run(
        sys.executable,
        "-m",
        "promoe_ds.cli.train",
        "--recipe",
        "digits_promoe",
        "--deepspeed_config",
        ZERO2,
        "--dry-run",
        "--set",
        "parallel.ep_size=4",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "ranks: 4" in done.stdout


def test_train_error_on_one_rank_only_is_told_by_that_rank(tmp_path) -> None:
    """Rank 1 cannot read its shard: rank 0 knows nothing of it, the message comes all the same."""
    script = (
        "import os; from promoe_ds.cli.entry import run_entry; from promoe_ds.errors import"
        " DataError\nimport time\ndef main(arguments):\n    if os.environ['RANK'] == '1': raise"
        " DataError('shard 7 is gone')\n    time.sleep(60)\nrun_entry(main)"
    )
    (tmp_path / "script.py").write_text(script)
    done = run("torchrun", "--standalone", "--nproc-per-node=2", "script.py", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: rank 1: shard 7 is gone") == 1


def test_save_disk_full_previous_checkpoint_stays_valid(tmp_path) -> None:
    """The kernel refuses to write on, as it does on a full disk: an error, and the checkpoint
    before is resumable.
    """
    assert train("train.stop_after_steps=2", cwd=tmp_path).returncode == 0
    done = run_python(
        ["-m", "promoe_ds.cli.train", *train_arguments("parallel.ep_size=1")],
        cwd=tmp_path,
        env=environment(),
        timeout=300,
        limit=400_000,
    )
    check_refused(done, "the checkpoint could not be written: rank 0:", 4)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (
        f"the newest complete checkpoint is {Path('run/checkpoints/step_0000002')}" in done.stderr
    )
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == ["step_0000002"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.rename(tmp_path / "metrics.jsonl")
    metrics.symlink_to("/dev/full")
    check_refused(
        train(cwd=tmp_path), "run/metrics.jsonl could not be written (No space left on device)", 4
    )
    (tmp_path / "metrics.jsonl").replace(metrics)
    done = train(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resume: taking run/checkpoints/step_0000002" in done.stderr


def test_convert_and_sample_refusals_name_the_file(tmp_path) -> None:
    assert train("train.max_steps=2", cwd=tmp_path).returncode == 0
    convert = (sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"))
    check_refused(
        run(*convert, "nowhere", "e", "--to", "single", cwd=tmp_path),
        "nowhere: there is no such file or folder",
        4,
    )
    assert run(*convert, "run", "export", "--to", "single", cwd=tmp_path).returncode == 0
    check_refused(
        run(*convert, "run", "export", "--to", "single", cwd=tmp_path), "export exists already", 4
    )
    shard = tmp_path / "run/checkpoints/step_0000002/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:1000])
    check_refused(
        run(*convert, "run", "e", "--to", "single", cwd=tmp_path),
        f"{shard.relative_to(tmp_path)} has 1000 bytes",
        4,
    )
    sample = (sys.executable, "-m", "promoe_ds.cli.sample", "--out", "s")
    check_refused(run(*sample, "--model", "nowhere", cwd=tmp_path), "nowhere is no export", 4)
    check_refused(
        run(*sample, "--model", "export", "--classes", "1,12", cwd=tmp_path),
        "knows the classes 0 ... 9",
        2,
    )
    check_refused(
        run(*sample, "--model", "export", "--num", "0", cwd=tmp_path),
        "--num 0: must be at least 1",
        2,
    )
    check_refused(
        run(*sample, "--model", "export", "--solver", "ddim", cwd=tmp_path),
        "--solver=ddim cannot sample diffusion.objective=rectified_flow: set it to euler, heun,"
        " unipc or dpmpp",
        2,
    )
    (tmp_path / "export/model.safetensors").write_bytes(b"garbage")
    check_refused(
        run(*sample, "--model", "export", cwd=tmp_path),
        "export/model.safetensors: cannot be read",
        4,
    )
