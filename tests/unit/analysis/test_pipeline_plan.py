"""The plan of the whole pipeline: bytes against files that are written, times in proportion to what they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from promoe_ds.analysis.pipeline_plan import TRAIN_IMAGES, Assumptions, plan_pipeline
from promoe_ds.config import load_config
from promoe_ds.data.shards import ShardContent, write_shard

CONFIG = load_config("promoe_b")


def steps(**values) -> dict:
    return {step.name: step for step in plan_pipeline(CONFIG, **{"gpus": 8, **values})}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_encode_disk_is_that_of_a_written_shard(tmp_path: Path, dtype: str) -> None:
    records = torch.zeros(2, 64, 8, 32, 32, dtype=getattr(torch, dtype))
    content = ShardContent(kind="moments", records=records[0], flipped=records[1], labels=torch.zeros(64, dtype=torch.int64),
                           names=[f"n01440764/n01440764_{number}.JPEG" for number in range(64)])
    written = write_shard(tmp_path / "shard.safetensors", content).bytes / 64 * TRAIN_IMAGES
    assert steps(latent_dtype=dtype)["encode"].disk == pytest.approx(written, rel=0.01)


def test_npz_of_50k_samples_is_half_of_the_sampling_disk() -> None:
    assert steps()["sample"].disk / 2 == 50_000 * 256 * 256 * 3


def test_times_follow_gpus_guidance_and_assumptions() -> None:
    eight, sixteen = steps(), steps(gpus=16)
    assert sixteen["train"].seconds == pytest.approx(eight["train"].seconds / 2)
    assert steps(cfg_scale=1.0)["sample"].seconds < 0.7 * eight["sample"].seconds
    slower = steps(assumptions=Assumptions(training_share=0.125))
    assert slower["train"].seconds == pytest.approx(2 * eight["train"].seconds)
    assert slower["sample"].seconds == eight["sample"].seconds
