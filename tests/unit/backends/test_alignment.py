"""Where weights are in ZeRO's buffers: in bf16 at multiples of 16 bytes, an unconditional expert's
behind the routed ones'; and checkpoints of former orders still load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.candidates import build_trainer, for_timing
from benchmarks.processes import single_process
from promoe_ds.backends import parameter_groups
from promoe_ds.checkpoint.load import load_checkpoint
from promoe_ds.checkpoint.manifest import read_manifest
from promoe_ds.checkpoint.save import Saver
from promoe_ds.checkpoint.zero_reader import ShardedCheckpoint
from promoe_ds.config import RunConfig
from promoe_ds.training.trainer import Trainer

from ..builders import of_method, small_config


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    with single_process():
        yield


def config_of(method: str, **routing: int) -> RunConfig:
    sections = of_method(method, **{"moe_blocks": "all", "num_unconditional_experts": 0, **routing})
    return for_timing(small_config(**sections, model={"depth": 3}, diffusion={}), micro_batch=4)


@contextmanager
def open_trainer(config: RunConfig, *, bf16: bool) -> Iterator[Trainer]:
    trainer = build_trainer(config, bf16=bf16)
    yield trainer
    trainer.engine.destroy()


def off_16_bytes(trainer: Trainer) -> list[str]:
    return [
        name
        for name, p in trainer.module.named_parameters()
        if p.numel() % 8 == 0 and p.data_ptr() % 16
    ]


def contents(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = ShardedCheckpoint(folder, read_manifest(folder))
    return {
        (kind, name): checkpoint.read(kind, name)
        for kind in checkpoint.kinds
        for name in checkpoint.kinds[kind]
    }


@pytest.mark.parametrize(
    ("method", "routing"),
    [
        ("diff_moe", {}),
        ("diff_moe", {"num_experts": 12}),
        ("expert_race", {}),
        ("classification", {}),
    ],
)
def test_weights_in_bf16_begin_at_16_bytes_whatever_the_routers_biases(method, routing) -> None:
    with open_trainer(config_of(method, **routing), bf16=True) as trainer:
        assert parameter_groups.is_reordered(trainer.module, trainer.config.optimizer, "bf16")
        assert off_16_bytes(trainer) == []
        trainer.train_step()
        assert off_16_bytes(trainer) == []


def test_order_of_weights_without_odd_sizes_and_in_fp32_is_the_networks() -> None:
    with open_trainer(config_of("token_choice"), bf16=True) as trainer:
        assert not parameter_groups.is_reordered(trainer.module, trainer.config.optimizer, "bf16")
    with open_trainer(config_of("diff_moe"), bf16=False) as trainer:
        assert not parameter_groups.is_reordered(trainer.module, trainer.config.optimizer, "fp32")


def test_an_unconditional_expert_stays_behind_the_routed_ones_and_changes_no_loss() -> None:
    config = config_of("token_choice", top_k=1, num_unconditional_experts=1)
    losses = []
    for joins in (True, False):
        with open_trainer(config, bf16=True) as trainer:
            assert not joins or trainer.network.join_unconditional()
            steps = [trainer.train_step() for _ in range(3)]
            assert all(
                layer.can_join_unconditional() for layer in trainer.network.moe_layers().values()
            )
            assert off_16_bytes(trainer) == []
        losses.append([float(sum(step.terms.values())) for step in steps])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    with open_trainer(config, bf16=False) as trainer:  # fp32 stays in the network's own order
        assert not trainer.network.join_unconditional()


@pytest.mark.parametrize(
    ("method", "routing", "former"),
    [
        ("diff_moe", {"num_experts": 12}, ("_ALIGNED", 1)),
        (
            "classification",
            {"num_experts": 4, "num_unconditional_experts": 1},
            ("stack_of", lambda name: name),
        ),
    ],
    ids=["odd sizes between", "unconditional apart"],
)
def test_resume_from_a_checkpoint_of_a_former_order_is_exact(
    method, routing, former, tmp_path, monkeypatch
) -> None:
    config = config_of(method, **routing)
    with monkeypatch.context() as before:
        before.setattr(parameter_groups, *former)
        with open_trainer(config, bf16=True) as trainer:
            assert off_16_bytes(trainer) or not trainer.network.join_unconditional()
            trainer.train_step()
            Saver(trainer, tmp_path / "former").save()
            expected = trainer.train_step()
    former = tmp_path / "former" / "step_0000001"
    layout = read_manifest(former).layout
    with open_trainer(config, bf16=True) as trainer:
        load_checkpoint(trainer, former, same_run=True)
        Saver(trainer, tmp_path / "now").save()
        found = trainer.train_step()
    now = tmp_path / "now" / "step_0000001"
    assert read_manifest(now).layout != layout
    there, here = contents(former), contents(now)
    assert {kind for kind, _ in there} > {"weights", "exp_avg", "exp_avg_sq"}
    assert there.keys() == here.keys()
    assert all(torch.equal(here[key], value) for key, value in there.items())
    assert {name: float(value) for name, value in found.terms.items()} == {
        name: float(value) for name, value in expected.terms.items()
    }
    with open_trainer(config, bf16=True) as trainer:  # its own order is loaded by DeepSpeed itself
        load_checkpoint(trainer, now, same_run=True)
        again = trainer.train_step()
    assert float(again.verdict.grad_norm) == float(found.verdict.grad_norm)
