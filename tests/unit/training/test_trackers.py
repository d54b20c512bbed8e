"""What TensorBoard and Weights & Biases get of a log step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from promoe_ds.errors import ConfigError
from promoe_ds.training.trackers import flatten, open_trackers, read_wandb_id

from ..builders import small_config
from ..reports.routing_logs import interval

LINE = {"step": 5, "loss": 0.5, "mfu": None}


def test_flatten_sums_bins_and_takes_layers_once() -> None:
    scalars, histograms = flatten(LINE, interval(5, tokens=[6, 0, 2, 0]))
    assert histograms == {
        "expert_load/layer_1": [12, 0, 4, 0],
        "expert_load/layer_3": [12, 0, 4, 0],
    }
    assert scalars["train/loss"] == 0.5 and "train/mfu" not in scalars
    assert scalars["load_max_over_mean/layer_1"] == 3.0
    assert scalars["load_max_over_mean/layer_1/bin_1"] == 3.0
    assert scalars["load_cv/layer_1"] == pytest.approx(24**0.5 / 4)
    assert scalars["dead_experts/layer_3"] == 2
    assert scalars["exchange_wait_seconds/layer_1"] == 1.25
    assert scalars["rank_load/layer_1"] == 1.2
    assert scalars["prototype_to_centroid/layer_1"] == pytest.approx(0.15)


def test_flatten_without_tokens_leaves_out_what_has_no_value() -> None:
    scalars, histograms = flatten(LINE, interval(5, tokens=[0, 0, 0, 0]))
    assert histograms["expert_load/layer_1"] == [0] * 4
    assert "load_cv/layer_1" not in scalars and scalars["dead_experts/layer_1"] == 4


def test_tensorboard_gets_a_bucket_an_expert(tmp_path: Path) -> None:
    trackers = open_trackers(small_config(logging={"tensorboard": True}), tmp_path, 0)
    trackers.write(5, LINE, interval(5, tokens=[6, 0, 2, 0]))
    trackers.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    load = board.Histograms("expert_load/layer_1")[0]
    assert (load.step, load.histogram_value.bucket, load.histogram_value.num) == (
        5,
        [12, 0, 4, 0],
        16,
    )
    assert board.Scalars("load_max_over_mean/layer_1")[0].value == 3.0


class FakeWandb:
    """Notes what it is given; raises in the method that is named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: str = "") -> None:
        self.calls, self._broken, self.Histogram = (
            [],
            broken,
            lambda np_histogram: np_histogram[0].tolist(),
        )
        monkeypatch.setitem(sys.modules, "wandb", self)

    def __getattr__(self, name: str):
        def call(*args: Any, **given: Any) -> FakeWandb:
            if name == self._broken:
                raise RuntimeError("no network")
            self.calls.append((name, *args, given))
            return self

        return call

    def ids(self) -> list[str]:
        return [call[-1]["id"] for call in self.calls if call[0] == "init"]


WANDB = {"tensorboard": False, "wandb": True, "wandb_project": "mine"}


def test_wandb_gets_the_same_over_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb(monkeypatch)
    trackers = open_trackers(small_config(logging=WANDB), tmp_path, 0)
    trackers.write(5, LINE, interval(5, tokens=[6, 0, 2, 0]))
    trackers.close()
    assert [call[0] for call in fake.calls] == [
        "init",
        "define_metric",
        "define_metric",
        "log",
        "finish",
    ]
    assert fake.calls[2] == ("define_metric", "*", {"step_metric": "step"})
    assert (fake.calls[0][-1]["project"], fake.calls[0][-1]["name"]) == ("mine", tmp_path.name)
    values = fake.calls[3][1]
    assert (values["step"], values["expert_load/layer_1"], values["train/loss"]) == (
        5,
        [12, 0, 4, 0],
        0.5,
    )


def test_wandb_run_goes_on_where_its_directory_or_checkpoint_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, config = FakeWandb(monkeypatch), small_config(logging=WANDB)
    for _ in range(2):
        open_trackers(config, tmp_path, 0)
    known = read_wandb_id(tmp_path)
    (tmp_path / "wandb_run_id").unlink()
    open_trackers(config, tmp_path, 0)  # the folder was emptied
    (tmp_path / "restored").mkdir()
    open_trackers(config, tmp_path / "restored", 0, known)
    ids = fake.ids()
    assert (
        ids[0] == ids[1] == ids[3] == known != ids[2]
        and read_wandb_id(tmp_path / "restored") == known
    )


@pytest.mark.parametrize(
    ("broken", "calls"), [("init", 0), ("define_metric", 1), ("log", 3), ("finish", 5)]
)
def test_tracker_that_fails_is_off_with_one_warning(
    tmp_path: Path, monkeypatch, caplog, broken: str, calls: int
) -> None:
    fake = FakeWandb(monkeypatch, broken)
    trackers = open_trackers(small_config(logging=WANDB), tmp_path, 0)
    for step in range(2 if broken == "log" else 1):
        trackers.write(step, LINE, interval(5, tokens=[6, 0, 2, 0]))
    trackers.close()
    assert [
        record.levelname for record in caplog.records if "Weights & Biases" in record.message
    ] == ["WARNING"]
    assert len(fake.calls) == calls - (broken == "finish")


def test_tensorboard_that_cannot_write_is_off(tmp_path: Path, caplog) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    open_trackers(small_config(logging={"tensorboard": True}), tmp_path, 0).write(1, LINE, [])
    assert [record.levelname for record in caplog.records if "TensorBoard" in record.message] == [
        "WARNING"
    ]


def test_wandb_asked_for_and_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb=true"):
        open_trackers(small_config(logging=WANDB), tmp_path, 0)
