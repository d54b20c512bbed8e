"""The search for a layout, and the command: what fits, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from promoe_ds.backends.devices import DEVICES, find_device
from promoe_ds.cli.plan import main
from promoe_ds.config import count_parameters, load_config
from promoe_ds.errors import ConfigError
from promoe_ds.planning.planner import RESERVE, StepPlan
from promoe_ds.planning.search import _estimate, best_layout, choice_lines

from .scenes import cluster, config, layout, planned


@pytest.mark.usefixtures("ranks")
def test_search_estimate_of_a_deep_network_is_that_of_its_full_trace() -> None:
    run = config(model={"hidden_size": 32, "depth": 12})
    plan = planned(run, micro_batch=64)
    estimate = _estimate(run, layout(micro_batch=64), cluster())
    assert estimate == pytest.approx((plan.total_memory, plan.total_seconds), rel=0.02)


def searched(images: int = 64, experts: int = 2, **device: float) -> tuple[StepPlan, list]:
    run = config(
        model={"hidden_size": 32, "depth": 2},
        train={"global_batch_size": images},
        routing={"num_experts": experts},
    )
    return best_layout(run, layout(), cluster(**device))


@pytest.mark.usefixtures("ranks")
def test_search_takes_the_largest_micro_batch_that_fits() -> None:
    roomy, _ = searched()
    tight, tried = searched(memory=0.8 * roomy.total_memory)
    assert roomy.layout.micro_batch == tight.layout.micro_batch * tight.layout.accumulation == 16
    assert tight.fits and tight.total_memory < roomy.total_memory
    assert [choice.seconds for choice in tried] == sorted(choice.seconds for choice in tried)
    capacity = (1 - RESERVE) * tight.cluster.device.memory
    assert {choice.fits for choice in tried} == {True, False}
    assert all(choice.fits == (choice.bytes <= capacity) for choice in tried)
    assert len(choice_lines(tried, limit=3)) == 4


@pytest.mark.usefixtures("ranks")
def test_search_where_nothing_fits_names_the_smallest_need() -> None:
    with pytest.raises(ConfigError, match=r"smallest need is .* GB \(ep_size=4"):
        searched(images=4, experts=4, memory=1000.0)


def test_peak_of_a_device_is_found_by_its_drivers_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200 NVL": "h200-nvl",
    }
    assert {name: find_device(name) for name in names} == {
        name: DEVICES[key] for name, key in names.items()
    }
    assert find_device("Tesla T4") is None


def test_tool_prints_tables_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    size = [
        "train.global_batch_size=8",
        "model.preset=null",
        "model.hidden_size=64",
        "model.num_heads=2",
        "model.depth=2",
    ]
    main(
        [
            "--recipe",
            "promoe_s",
            "--gpus-per-node",
            "4",
            "--gpu",
            "H200",
            "--out",
            str(tmp_path / "plan.json"),
            "--set",
            *size,
        ]
    )
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert (
        plans["recipe"]["parameters"]["total"]
        == count_parameters(load_config("promoe_s", size)).total
    )
    assert plans["recipe"]["cluster"]["device"]["name"] == "h200"
    kinds = plans["best"]["memory_bytes"]
    names = ("weights", "gradients", "optimizer", "ema", "activations", "exchange", "buckets")
    assert kinds["total"] == sum(kinds[name] for name in names)
    estimate = min(choice["seconds"] for choice in plans["tried"])
    assert plans["best"]["predicted"]["seconds"]["total"] == pytest.approx(estimate, rel=0.02)
    assert "fits" in capsys.readouterr().out


def test_tool_names_what_it_cannot_plan(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=256 .* 21 "):
        main(["--recipe", "promoe_s", "--nodes", "3", "--gpus-per-node", "7"])
    for option, name in (("--gpu", "h10"), ("--network", "infiniband"), ("--nodes", "0")):
        with pytest.raises(SystemExit) as stop:
            main(["--recipe", "promoe_s", option, name])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and f"argument {option}: " in said and name in said
