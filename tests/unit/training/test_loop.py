"""The training loop around made-up steps: what reaches the log, and in what order things happen."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from promoe_ds.config import SupervisionConfig
from promoe_ds.errors import Preempted, TrainingError
from promoe_ds.moe.collectives import WaitClock
from promoe_ds.training import run
from promoe_ds.training.loop import TrainingLoop
from promoe_ds.training.routing_log import RoutingAccumulator
from promoe_ds.training.step import StepResult, Verdict
from promoe_ds.training.supervisor import Supervisor

from ..builders import random_network, random_tensor
from ..ranks import ONE_RANK, pretend_one_rank


def made_up_trainer(step, **settings) -> SimpleNamespace:
    train = SimpleNamespace(
        max_steps=10,
        stop_after_steps=None,
        log_every=2,
        checkpoint_every=100,
        max_nonfinite_steps=3,
    )
    vars(train).update(settings)
    trainer = SimpleNamespace(
        step=0,
        results_behind=0,
        context=ONE_RANK,
        config=SimpleNamespace(train=train, evaluation=SimpleNamespace(every=2)),
        routing=SimpleNamespace(reduce=lambda **unused: [], waits_paused=contextlib.nullcontext),
    )

    def train_step() -> StepResult:
        trainer.step += 1
        return step(trainer)

    trainer.train_step = train_step
    return trainer


def result(**values) -> StepResult:
    return StepResult({"diffusion": torch.ones(())}, 1.0, lambda: Verdict(1.0, **values))


def test_loop_leaves_an_evaluations_waits_out_of_the_next_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_one_rank(monkeypatch)
    network = random_network(
        train={"max_steps": 3, "log_every": 1}, evaluation={"every": 1, "reference": "somewhere"}
    ).train()
    layer, clock = network.moe_layers()[1], WaitClock()
    layer.dispatcher.clock = clock

    def step(trainer: SimpleNamespace) -> StepResult:
        plans = network.denoise(
            random_tensor(2, 1, 4, 4), torch.tensor([100.0, 900.0]), torch.tensor([1, 2])
        ).plans
        with clock.waiting("combine_backward", torch.device("cpu")):
            time.sleep(0.002)
        trainer.routing.add(plans, torch.tensor([0.1, 0.9]))
        return result()

    def evaluate(trainer: SimpleNamespace) -> dict[str, float]:
        with clock.waiting("dispatch", torch.device("cpu")):
            time.sleep(0.002)
        return {}

    trainer, writer = made_up_trainer(step), MagicMock()
    trainer.config, trainer.routing = (
        network.config,
        RoutingAccumulator(network.config, network, ONE_RANK),
    )
    run._Actions(trainer, writer, MagicMock(), MagicMock(), evaluate).loop().run()
    exchanges = [
        call.args[2][0]["layer_detail"]["exchanges"] for call in writer.write.call_args_list
    ]
    assert len(exchanges) == 3
    assert all(
        each["combine_backward"]["seconds"] > 0.001 and each["dispatch"]["seconds"] == 0
        for each in exchanges
    )


def test_loop_shutdown_at_an_evaluations_step_saves_without_it(tmp_path, monkeypatch) -> None:
    """Of what a batch system gives, minutes, an evaluation would take hours."""
    happened: list[tuple[str, int]] = []
    trainer = made_up_trainer(lambda trainer: result(stop_requested=trainer.step == 4))

    def note(what: str) -> dict[str, float]:
        happened.append((what, trainer.step))
        return {}

    pretend_one_rank(monkeypatch)
    writer, saver = MagicMock(), MagicMock()
    writer.write = lambda *unused: note("log")
    saver.save = lambda: note("save")
    with pytest.raises(Preempted, match="step 4 of 10"):
        run._Actions(
            trainer, writer, saver, Supervisor(SupervisionConfig()), lambda _: note("evaluation")
        ).loop().run()
    assert happened == [("evaluation", 2), ("log", 2), ("log", 4), ("save", 4)]


def test_loop_every_runs_actions_in_order_and_at_the_end_where_asked() -> None:
    happened: list[tuple[str, int]] = []
    loop = TrainingLoop(made_up_trainer(lambda trainer: result(), max_steps=5), MagicMock())
    loop.every(2, lambda done: done.figures.update(seen=done.step), at_end=False)
    loop.every(2, lambda done: happened.append((str(done.figures), done.step)))
    loop.run()
    assert happened == [("{'seen': 2}", 2), ("{'seen': 4}", 4), ("{}", 5)]


def test_loop_ends_after_too_many_bad_steps_in_a_row() -> None:
    trainer = made_up_trainer(
        lambda trainer: result(problem="" if trainer.step in (3, 7) else "bad")
    )
    with pytest.raises(TrainingError, match="max_nonfinite_steps=3"):
        TrainingLoop(trainer, MagicMock()).run()
    assert trainer.step == 6


def test_loop_reads_results_a_step_late_where_the_device_decides() -> None:
    """A shutdown is then learned of one step later; skipped steps are counted all the same."""
    read: list[tuple[int, int]] = []
    trainer = made_up_trainer(lambda trainer: None)
    trainer.results_behind = 1

    def step() -> StepResult:
        trainer.step += 1
        made = trainer.step

        def verdict() -> Verdict:
            read.append((made, trainer.step))
            return Verdict(1.0, "bad" if made in (2, 3) else "", stop_requested=made == 5)

        return StepResult({}, 1.0, verdict)

    trainer.train_step = step
    loop, ends = TrainingLoop(trainer, MagicMock()), []
    loop.every(4, lambda done: ends.append((done.step, done.result.verdict.problem)))
    with pytest.raises(Preempted, match="step 6 of 10"):
        loop.run()
    assert ends == [(4, ""), (6, "")]
    assert read == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 6)]
