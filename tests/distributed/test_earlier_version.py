"""What an earlier version left: its checkpoint resumes to the same losses, its export and its logs
are read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from promoe_ds import load_model
from promoe_ds.config import load_config
from tests.distributed.jobs import Job, metrics, run_jobs

EARLIER = Path(__file__).parents[1] / "fixtures/version_0_1"


def test_earlier_checkpoint_resumes_to_the_losses_of_the_run_that_wrote_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(EARLIER / "run", run_dir)
    expected = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    settings = load_config(EARLIER / "recipe.yaml").model_dump(mode="json")
    overrides = [
        f"train.{name}={settings['train'][name]}"
        for name in ("global_batch_size", "max_steps", "log_every", "checkpoint_every")
    ]
    overrides += [
        f"model.{name}={settings['model'][name]}" for name in ("hidden_size", "depth", "num_heads")
    ]
    overrides += ["optimizer.warmup_steps=2", "parallel.timeout_seconds=60"]
    job = Job(run_dir=run_dir, recipe=str(EARLIER / "recipe.yaml"), overrides=tuple(overrides))
    assert run_jobs(2, [job], tmp_path) == [""]
    found = metrics(run_dir)[-1]
    names = [
        name for name in expected if name.startswith("loss") or name in ("step", "lr", "grad_norm")
    ]
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}


def test_earlier_export_is_read() -> None:
    network = load_model(EARLIER / "export")
    assert (
        network.config.parallel.dispatch == "alltoall"
        and network.config.optimizer.max_grad_norm == 0.5
    )
    with torch.no_grad():
        latents = network(
            torch.randn(2, 1, 8, 8), torch.tensor([500.0, 10.0]), torch.tensor([3, 10])
        )
    assert latents.shape == (2, 1, 8, 8) and torch.isfinite(latents).all()
