"""What TensorBoard and Weights & Biases get of a log step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from promoe_ds.errors import ConfigError
from promoe_ds.train.trackers import flatten, open_trackers

from ..builders import small_config
from ..reports.routing_logs import interval

LINE = {"step": 5, "loss": 0.5, "mfu": None}


def test_flatten_sums_bins_and_takes_layers_once() -> None:
    scalars, histograms = flatten(LINE, interval(5, tokens=[6, 0, 2, 0]))
    assert histograms == {"expert_load/layer_1": [12, 0, 4, 0], "expert_load/layer_3": [12, 0, 4, 0]}
    assert scalars["train/loss"] == 0.5 and "train/mfu" not in scalars
    assert scalars["load_max_over_mean/layer_1"] == 3.0
    assert scalars["load_max_over_mean/layer_1/bin_1"] == 3.0
    assert scalars["load_cv/layer_1"] == pytest.approx(24 ** 0.5 / 4)
    assert scalars["dead_experts/layer_3"] == 2
    assert scalars["exchange_wait_seconds/layer_1"] == 1.25
    assert scalars["rank_load/layer_1"] == 1.2
    assert scalars["prototype_to_centroid/layer_1"] == pytest.approx(0.15)


def test_flatten_without_tokens_leaves_out_what_has_no_value() -> None:
    scalars, histograms = flatten(LINE, interval(5, tokens=[0, 0, 0, 0]))
    assert histograms["expert_load/layer_1"] == [0] * 4
    assert "load_cv/layer_1" not in scalars and scalars["dead_experts/layer_1"] == 4


def test_tensorboard_gets_a_bucket_an_expert(tmp_path: Path) -> None:
    tracker, = open_trackers(small_config(logging={"tensorboard": True}), tmp_path, 0)
    tracker.write(5, *flatten(LINE, interval(5, tokens=[6, 0, 2, 0])))
    tracker.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    load = board.Histograms("expert_load/layer_1")[0]
    assert (load.step, load.histogram_value.bucket, load.histogram_value.num) == (5, [12, 0, 4, 0], 16)
    assert board.Scalars("load_max_over_mean/layer_1")[0].value == 3.0


def test_wandb_gets_the_same_and_a_resumed_run_its_name_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished"))
    stand_in = SimpleNamespace(init=lambda **given: started.append(given) or run, Error=RuntimeError,
                               Histogram=lambda np_histogram: np_histogram[0].tolist())
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    config = small_config(logging={"tensorboard": False, "wandb": True, "wandb_project": "mine"})
    for _ in range(2):
        tracker, = open_trackers(config, tmp_path / "run", 0)
        tracker.write(5, *flatten(LINE, interval(5, tokens=[6, 0, 2, 0])))
        tracker.close()
    assert started[0] == started[1] and (started[0]["project"], started[0]["name"]) == ("mine", "run")
    step, values = logged[0]
    assert (step, values["expert_load/layer_1"], values["train/loss"], logged[1]) == (5, [12, 0, 4, 0], 0.5, "finished")


def test_wandb_asked_for_and_missing_or_failing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(logging={"tensorboard": False, "wandb": True})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb=true needs wandb: pip install"):
        open_trackers(config, tmp_path, 0)

    def _refuse(**given):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=_refuse, Error=RuntimeError))
    with pytest.raises(ConfigError, match=r"does not start: no API key\. Log in with"):
        open_trackers(config, tmp_path, 0)
