"""The order of things in the training loop; step, writer and saver are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from promoe_ds.config import SupervisionConfig
from promoe_ds.engine import loop
from promoe_ds.engine.supervision import Supervisor
from promoe_ds.errors import Preempted


def test_loop_stop_agreed_at_an_evaluations_step_saves_without_it(tmp_path, monkeypatch) -> None:
    """Of what a batch system gives, minutes, an evaluation would take hours."""
    happened: list[tuple[str, int]] = []
    train = SimpleNamespace(max_steps=10, stop_after_steps=None, log_every=2, checkpoint_every=100, max_nonfinite_steps=3)
    session = SimpleNamespace(step=0, config=SimpleNamespace(train=train, evaluation=SimpleNamespace(every=2)),
                              health=SimpleNamespace(stop_agreed=False), ranks=SimpleNamespace(is_main=True),
                              routing=SimpleNamespace(reduce=lambda **unused: []))

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
