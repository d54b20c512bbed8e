"""Running training jobs on several real processes and reading what they left."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from promoe_ds.checkpoint.manifest import list_checkpoints, read_manifest
from promoe_ds.checkpoint.zero_reader import ShardedCheckpoint

from ..processes import Forks, ranks
from .worker import run_worker

#: A network of the smallest size that has everything: dense and MoE blocks, shared and
# unconditional experts.
TINY = (
    "model.hidden_size=32",
    "model.depth=4",
    "model.num_heads=2",
    "train.global_batch_size=16",
    "train.log_every=1",
    "train.max_steps=20",
    "train.checkpoint_every=100",
    "optimizer.max_grad_norm=0.5",
    "optimizer.warmup_steps=4",
    "logging.tensorboard=off",
    "parallel.timeout_seconds=60",
)

#: The same conditioned on text: made-up captions of up to twenty tokens, in ten groups.
TEXT = (
    "model.condition=text",
    "model.num_classes=1000",
    "model.text_width=12",
    "model.text_pooled_width=8",
    "model.text_length=20",
    "data.dataset=synthetic",
    "data.synthetic_samples=256",
    "data.caption_groups=10",
)
#: Images of three sizes, in epochs of seven or eight batches.
BUCKETS = (
    "model.buckets=[8, [4, 8], [8, 4]]",
    "data.dataset=synthetic",
    "data.synthetic_samples=40",
)
#: Conditions, and what else changes a network from end to end.
CONDITIONS = {"class": (), "text": TEXT, "buckets": BUCKETS, "modern": ("model.block=modern",)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of the training loop."""

    run_dir: Path
    overrides: tuple[str, ...] = ()
    recipe: str = "digits_promoe"
    zero_stage: int = 2
    bf16: bool = False
    resume: str = "auto"
    fault: dict[str, Any] | None = field(default=None)
    resave_to: str = ""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    #: Decide about updates as on a GPU: on the device, read a step later.
    decides_on_device: bool = False

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "run_dir": str(self.run_dir), "overrides": [*TINY, *self.overrides]}


def run_jobs(world_size: int, jobs: list[Job], folder: Path, *, timeout: int = 400) -> list[str]:
    """Run jobs one after the other on `world_size` processes; return each one's error message (""
    for none).
    """
    target = folder / f"errors_{world_size}.json"
    target.unlink(missing_ok=True)
    with start_jobs(world_size, jobs, folder) as forks:
        assert forks.wait(timeout) == [0] * world_size, forks.texts()
    return json.loads(target.read_text())


def start_jobs(world_size: int, jobs: list[Job], folder: Path) -> Forks:
    """Start jobs on `world_size` processes and return at once."""
    return ranks(
        world_size,
        run_worker,
        [job.as_json() for job in jobs],
        folder / f"errors_{world_size}.json",
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def routing(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "routing.jsonl").read_text().splitlines()]


def tokens_by_condition(lines: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(line["conditional_tokens"], line["unconditional_tokens"]) for line in lines]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out how long ranks waited for exchanges, and the tables over several intervals, which
    end where a process ends.
    """
    kept = []
    for line in lines:
        detail = dict(line.pop("layer_detail", {}))
        for table in ("tokens_per_class", "tokens_per_position"):
            detail.pop(table, None)
        exchanges = {name: one["bytes"] for name, one in detail.pop("exchanges", {}).items()}
        kept.append({**line, "detail": detail, "exchanges": exchanges})
    return kept


def state(run_dir: Path, kind: str = "weights") -> dict[str, torch.Tensor]:
    """Reconstruct the newest checkpoint's tensors of `kind`."""
    newest = list_checkpoints(run_dir / "checkpoints")[0]
    checkpoint = ShardedCheckpoint(newest, read_manifest(newest))
    values = {name: checkpoint.read(kind, name) for name in checkpoint.kinds[kind]}
    checkpoint.check(kind)
    return values


def assert_same_steps(expected: Path, found: Path) -> None:
    """Compare losses and norms of two runs, step by step, to rounding."""
    for before, after in zip(metrics(expected), metrics(found), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5), before["step"]
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4), before["step"]


def assert_same_state(expected: Path, found: Path, *kinds: str, **close: float) -> None:
    """Compare tensors of two runs' newest checkpoints: bit for bit, or to rtol and atol."""
    for kind in kinds:
        whole, other = state(expected, kind), state(found, kind)
        if close:
            whole, other = without_key_bias(whole), without_key_bias(other)
        assert other.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(
                other[name],
                value,
                **(close or {"rtol": 0, "atol": 0}),
                msg=lambda text, n=name, k=kind: f"{k} {n}: {text}",
            )


def assert_near_state(expected: Path, found: Path, *kinds: str) -> None:
    """Compare weights after twelve Adam steps of lr 1e-3, which move each by 1.2e-2 at most: by
    1e-6 in the root mean square of every tensor, and by a thousandth of that move in every value.

    Adam divides by the gradient's size: where that is nearest to zero, the roundings of sums over
    ranks show most, and they differ between processors.
    """
    for kind in kinds:
        whole, other = (without_key_bias(state(each, kind)) for each in (expected, found))
        assert other.keys() == whole.keys()
        for name, value in whole.items():
            off = (other[name] - value).double()
            assert off.square().mean().sqrt() <= 1e-6, f"{kind} {name}"
            assert off.abs().max() <= 1.2e-5, f"{kind} {name}"


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir)]


def without_key_bias(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the key third of every qkv bias: its true gradient is zero, Adam follows rounding noise
    there.
    """
    result = {}
    for name, value in tensors.items():
        if name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            value = torch.cat([q, v])
        result[name] = value
    return result
