"""The plan of the whole pipeline: bytes against files that are written, times in proportion to what
they are made of.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from promoe_ds.backends.devices import DEVICES
from promoe_ds.cli.plan import main
from promoe_ds.config import RunConfig, change_config, count_parameters, load_config
from promoe_ds.data.shards import write_shard
from promoe_ds.data.vae import DECODED_AT_ONCE
from promoe_ds.errors import ConfigError
from promoe_ds.planning.pipeline import (
    DECODER_BYTES,
    ENCODER_BYTES,
    TRAIN_IMAGES,
    Assumptions,
    plan_pipeline,
)

CONFIG = load_config("promoe_b")


def steps(gpus: int = 8, config: RunConfig = CONFIG, **assumed) -> dict:
    return {step.name: step for step in plan_pipeline(config, gpus, Assumptions(**assumed))}


def test_encode_disk_is_that_of_a_written_shard(tmp_path: Path) -> None:
    records = torch.zeros(2, 64, 8, 32, 32)
    labels = torch.zeros(64, dtype=torch.int64)
    names = [f"n01440764/n01440764_{number}.JPEG" for number in range(64)]
    record = write_shard(tmp_path / "shard.safetensors", list(records), labels, names)
    written = record.bytes / 64 * TRAIN_IMAGES
    assert steps()["encode"].disk == pytest.approx(written, rel=0.01)


def test_train_disk_is_that_of_all_checkpoints_and_averages_that_are_kept() -> None:
    train = {"max_steps": 50_000, "checkpoint_every": 2_000, "keep_last": 3, "keep_every": 5_000}
    config = change_config(CONFIG, train=train, optimizer={"ema_sigma_rels": [0.05, 0.1]})
    assert len(config.optimizer.averages) == 3
    # Three, and those of 10,000, 20,000 and so on.
    kept = (3 + 5) * (2 + 4 * (3 + 3))
    assert steps(config=config)["train"].disk == kept * count_parameters(CONFIG).trainable


def test_npz_of_50k_samples_is_half_of_the_sampling_disk() -> None:
    assert steps()["sample"].disk / 2 == 50_000 * 256 * 256 * 3


def test_decoder_and_encoder_memory_is_that_of_the_images_of_a_pass() -> None:
    plan, double = steps(), steps(encode_batch=64)
    assert double["encode"].device - plan["encode"].device == pytest.approx(32 * ENCODER_BYTES)
    weights = 2 * count_parameters(CONFIG).total + 4 * 83_653_863
    assert plan["sample"].device - weights == pytest.approx(DECODED_AT_ONCE * DECODER_BYTES)


def test_tool_plans_the_pipeline_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main(
        [
            "--recipe",
            "promoe_b",
            "--pipeline",
            "--gpu",
            "a100",
            "--out",
            str(tmp_path / "plan.json"),
        ]
    )
    names = ["unpack", "encode", "train", "convert", "sample", "evaluate"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", *names]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [step["name"] for step in plan["pipeline"]] == names
    expected = steps(device=DEVICES["a100"])["sample"]
    assert (
        plan["pipeline"][4]["seconds"] == pytest.approx(expected.seconds)
        and plan["assumptions"]["device"]["name"] == "a100"
    )


def test_tool_refuses_a_folder_for_its_file_before_it_plans(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*: is a folder: name a file in it"):
        main(["--recipe", "promoe_b", "--pipeline", "--out", str(tmp_path)])


def test_tool_refuses_options_that_a_pipeline_does_not_read(capsys) -> None:
    for option in (["--no-search"], ["--network", "roce-400"], ["--deepspeed_config", "x.json"]):
        with pytest.raises(SystemExit):
            main(["--recipe", "promoe_b", "--pipeline", *option])
        said = capsys.readouterr().err
        assert f"{option[0].replace('_', '-')} has no effect with --pipeline" in said


def test_tool_refuses_gpus_that_the_experts_cannot_be_shared_over() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ep_size=8 does not divide .*, 4"):
        main(["--recipe", "promoe_3b", "--pipeline", "--gpus-per-node", "4"])


def test_times_follow_gpus_and_assumptions() -> None:
    eight, sixteen = steps(), steps(gpus=16)
    assert sixteen["train"].seconds == pytest.approx(eight["train"].seconds / 2)
    slower = steps(training_share=0.125)
    assert slower["train"].seconds == pytest.approx(2 * eight["train"].seconds)
    assert slower["sample"].seconds == eight["sample"].seconds
