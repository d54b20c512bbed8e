"""docs/guides/imagenet.md from a folder of images to metrics.json, as a user types it, with a tiny
autoencoder.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from ..unit.data.made import save_images, save_vae
from ..unit.evaluation.made import TinyNetwork
from .commands import TWO, ZERO2, run, succeed, tool

RECIPE = {
    "model": {
        "input_size": 4,
        "patch_size": 2,
        "in_channels": 1,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    },
    "routing": {"num_experts": 4},
    "data": {"dataset": "latents", "latent_scale": 0.5, "vae": "tiny", "path": "latents"},
    "train": {"max_steps": 4, "global_batch_size": 8, "log_every": 2, "checkpoint_every": 4},
    "logging": {"tensorboard": False},
    "sampling": {"steps": 3, "cfg_scale": 1.5},
}


def test_pipeline_from_images_to_figures(tmp_path: Path) -> None:
    def command(*arguments: str) -> str:
        return succeed(run(*arguments, cwd=tmp_path, DS_ACCELERATOR="cpu"))

    save_images(tmp_path / "imagenet" / "train", per_class=8)
    save_images(tmp_path / "imagenet" / "val", per_class=4)
    save_vae(tmp_path / "vae")
    torch.jit.script(TinyNetwork()).save(str(tmp_path / "net.pt"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    printed = command(
        *(*TWO, "promoe_ds.cli.encode_latents", "--images", "imagenet", "--vae", "vae"),
        *("--vae-name", "tiny", "--out", "latents", "--image-size", "8", "--shard-size", "7"),
    )
    assert "latents: 24 records of 3 classes in 4 shards, 0 images skipped" in printed
    printed = succeed(tool("encode_latents", "--verify", "latents", cwd=tmp_path))
    assert "all 24 records of 4 shards are what was written" in printed
    # The recipe's name of the autoencoder is no folder: to decode while training, it is given one
    # of the same weights.
    printed = command(
        *(*TWO, "promoe_ds.cli.train", "--recipe", "tiny.yaml", "--deepspeed_config", ZERO2),
        *("--run-dir", "run", "--set", "data.vae=vae", "parallel.ep_size=2"),
        *("evaluation.every=4", "evaluation.reference=imagenet/val", "evaluation.samples=12"),
        *("evaluation.extractor=net.pt", "evaluation.steps=2"),
    )
    assert "frechet_distance" in printed
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert ["frechet_distance" in json.loads(line) for line in lines] == [False, True]
    succeed(tool("convert_checkpoint", "run", "export", "--to", "single", cwd=tmp_path))
    command(
        *(*TWO, "promoe_ds.cli.sample", "--model", "export", "--vae", "vae"),
        *("--out", "samples", "--num-samples", "13"),
    )
    assert len(list((tmp_path / "samples").glob("img*_class*.png"))) == 13
    printed = command(
        *(*TWO, "promoe_ds.cli.evaluate", "--samples", "samples", "--reference", "imagenet/val"),
        *("--extractor", "net.pt", "--out", "metrics.json"),
    )
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert list(report["metrics"]) == ["fid", "sfid", "is", "precision", "recall"]
    assert "fid" in printed
    assert report["samples"]["count"] == 13
    assert (report["reference"]["images"], report["protocol"]["processes"]) == (12, 2)
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    assert report["samples"]["settings"]["vae"] == index["vae"]["fingerprint"]
