"""The training loop around steps that are made up: what reaches the log, and in what order things happen."""

from __future__ import annotations

import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import promoe_ds.train.loop as loop
from promoe_ds.config import SupervisionConfig
from promoe_ds.errors import Preempted
from promoe_ds.moe.collectives import WaitClock
from promoe_ds.train.routing_log import RoutingAccumulator
from promoe_ds.train.step import StepResult
from promoe_ds.train.supervisor import Supervisor
from promoe_ds.train.trainer import check_scale

from ..builders import random_network, random_tensor, small_config
from .ranks import ONE_RANK, pretend_one_rank


@pytest.mark.parametrize(("scale", "warned"), [(1.0, 0), (0.18, 1), (5.5, 1)])
def test_latents_of_an_unusual_scale_are_said_by_rank_0(monkeypatch: pytest.MonkeyPatch, scale: float, warned: int) -> None:
    told: list[str] = []
    monkeypatch.setattr("promoe_ds.train.trainer._LOG.warning", lambda message, *values: told.append(message % values))
    dataset = MagicMock(take=lambda indices, positions: (random_tensor(len(indices), 4, 4, 4) * scale, torch.zeros(len(indices))))
    dataset.__len__.return_value = 50
    session = SimpleNamespace(config=small_config(), dataset=dataset, samples_seen=70, ranks=ONE_RANK,
                              batches=SimpleNamespace(global_batch=256))
    check_scale(session)
    assert len(told) == warned


def test_loop_leaves_an_evaluations_waits_out_of_the_next_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_one_rank(monkeypatch)
    network = random_network(train={"max_steps": 3, "log_every": 1}, evaluation={"every": 1, "reference": "somewhere"}).train()
    layer, clock = network.moe_layers()[1], WaitClock()
    layer.dispatcher.clock = clock
    session = SimpleNamespace(config=network.config, step=0, health=MagicMock(stop_agreed=False), ranks=ONE_RANK,
                              routing=RoutingAccumulator(network.config, network, ONE_RANK))

    def step(session: SimpleNamespace) -> StepResult:
        plans = network.denoise(random_tensor(2, 1, 4, 4), torch.tensor([100.0, 900.0]), torch.tensor([1, 2])).plans
        with clock.waiting("combine_backward", torch.device("cpu")):
            time.sleep(0.002)
        session.routing.add(plans, torch.tensor([0.1, 0.9]))
        session.step += 1
        return StepResult(terms={"diffusion": torch.ones(())}, grad_norm=1.0, lr=1.0, problem="")

    def evaluate(session: SimpleNamespace) -> dict[str, float]:
        with clock.waiting("dispatch", torch.device("cpu")):
            time.sleep(0.002)
        return {}

    monkeypatch.setattr(loop, "train_step", step)
    writer = MagicMock()
    loop._loop(session, writer, MagicMock(), MagicMock(), evaluate)
    exchanges = [call.args[2][0]["layer_detail"]["exchanges"] for call in writer.write.call_args_list]
    assert len(exchanges) == 3
    assert all(each["combine_backward"]["seconds"] > 0.001 and each["dispatch"]["seconds"] == 0 for each in exchanges)


def test_loop_stop_agreed_at_an_evaluations_step_saves_without_it(tmp_path, monkeypatch) -> None:
    """Of what a batch system gives, minutes, an evaluation would take hours."""
    happened: list[tuple[str, int]] = []
    train = SimpleNamespace(max_steps=10, stop_after_steps=None, log_every=2, checkpoint_every=100, max_nonfinite_steps=3)
    session = SimpleNamespace(step=0, config=SimpleNamespace(train=train, evaluation=SimpleNamespace(every=2)),
                              health=SimpleNamespace(stop_agreed=False), ranks=SimpleNamespace(is_main=True),
                              routing=SimpleNamespace(reduce=lambda **unused: [], forget_waits=lambda: None))

    def note(what: str) -> dict[str, float]:
        happened.append((what, session.step))
        return {}

    def train_step(session: SimpleNamespace) -> SimpleNamespace:
        session.step += 1
        session.health.stop_agreed = session.step == 4
        return SimpleNamespace(skipped=False)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(loop, "_reduced", lambda result: {})
    writer = SimpleNamespace(tick=lambda: None, images_per_second=lambda: 1.0, write=lambda *unused: note("log"),
                             restart_clock=lambda: None)
    saver = SimpleNamespace(poll=lambda: None, save=lambda: note("save"), finish=lambda: None)
    with pytest.raises(Preempted, match="saved step 4 of 10"):
        loop._loop(session, writer, saver, Supervisor(SupervisionConfig(), tmp_path), lambda session: note("evaluation"))
    assert happened == [("evaluation", 2), ("log", 2), ("log", 4), ("save", 4)]
