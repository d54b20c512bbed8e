"""Training runs over every expert path, and with every option of scale: the same losses, norms,
weights and averages.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from promoe_ds import load_model
from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.checkpoint.manifest import list_checkpoints

from .jobs import (
    Job,
    assert_near_state,
    assert_same_state,
    assert_same_steps,
    losses,
    metrics,
    routing,
    run_jobs,
    state,
)

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None, reason="needs megatron-core: pip install '.[megatron]'"
)

STEPS = 8
CAPACITY, MEGATRON, GATHER = (
    ("parallel.dispatch=deepspeed_moe",),
    ("parallel.dispatch=megatron",),
    ("parallel.dispatch=megatron", "parallel.megatron_dispatcher=allgather"),
)
TWO_CHOICES = ("routing.top_k=2", "routing.balance_weight=0.01")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
#: Name -> ranks, ep_size, overrides, ZeRO section. Each is held against `plain` (or `plain_k2`).
RUNS: dict[str, tuple[int, int, tuple[str, ...], dict]] = {
    "plain": (2, 2, (), {}),
    "plain_k2": (2, 2, TWO_CHOICES, {}),
    "capacity": (2, 2, CAPACITY, {}),
    "capacity_k2": (2, 2, (*CAPACITY, *TWO_CHOICES), {}),
    "capacity_selective": (2, 2, (*CAPACITY, "parallel.activation_checkpointing=selective"), {}),
    "megatron": (2, 2, MEGATRON, {}),
    "megatron_k2": (2, 2, (*MEGATRON, *TWO_CHOICES), {}),
    "megatron_full": (2, 2, (*MEGATRON, "parallel.activation_checkpointing=full"), {}),
    "megatron_whole": (2, 1, MEGATRON, {"stage": 0}),
    "gather": (2, 2, GATHER, {}),
    "selective": (2, 2, ("parallel.activation_checkpointing=selective",), {}),
    "offload": (2, 2, (), {"stage": 2, **OFFLOAD}),
    "offload_stage1": (2, 1, (), {"stage": 1, **OFFLOAD}),
    "one_host": (2, 2, ("parallel.expert_groups=node",), {}),
    "wire_bf16": (2, 2, ("parallel.comm_dtype=bf16",), {}),
    "wire_fp8": (2, 2, ("parallel.comm_dtype=fp8",), {}),
    "capacity_tight": (2, 2, (*CAPACITY, "parallel.capacity_factor=0.5"), {}),
    "capacity4": (4, 2, CAPACITY, {}),
    "megatron4": (4, 4, MEGATRON, {}),
    "gather4": (4, 2, GATHER, {}),
}
ROUNDED = ("wire_bf16", "wire_fp8", "capacity_tight")
EXACT = tuple(name for name in RUNS if name not in (*ROUNDED, "plain", "plain_k2"))


def _job(folder: Path, name: str, *more: str) -> Job:
    _, ep_size, overrides, zero = RUNS[name]
    deepspeed = {"zero_optimization": {"stage": 2, **zero}} if zero else {}
    return Job(
        run_dir=folder,
        deepspeed=deepspeed,
        zero_stage=zero.get("stage", 2),
        overrides=(f"parallel.ep_size={ep_size}", f"train.max_steps={STEPS}", *overrides, *more),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("paths")
    for ranks in (2, 4):
        jobs = [_job(folder / name, name) for name, run in RUNS.items() if run[0] == ranks]
        assert run_jobs(ranks, jobs, folder) == [""] * len(jobs)
    return {name: folder / name for name in RUNS}


@pytest.mark.parametrize("name", EXACT)
def test_run_any_path_equals_plain(runs, name) -> None:
    expected, found = runs["plain_k2" if name.endswith("_k2") else "plain"], runs[name]
    assert_same_steps(expected, found)
    assert any(line["grad_norm"] > 0.5 for line in metrics(found)), "clipping was never active"
    assert_near_state(expected, found, "weights", "ema")


@pytest.mark.parametrize(("name", "close"), [("wire_bf16", 2e-3), ("wire_fp8", 2e-2)])
def test_run_narrow_wire_stays_near_and_moves_less(runs, name, close) -> None:
    assert losses(runs[name]) == pytest.approx(losses(runs["plain"]), rel=close)
    assert losses(runs[name]) != losses(runs["plain"])
    moved = {
        run: sum(
            line["layer_bytes_exchanged"]
            for line in routing(runs[run])
            if (line["step"], line["timestep_bin"]) == (1, 0)
        )
        for run in ("plain", name)
    }
    ratio = {"wire_bf16": 1 / 2, "wire_fp8": (32 + 4) / (4 * 32)}[name]  # rows of 32 fp32 numbers
    assert moved[name] == ratio * moved["plain"]


def test_run_tight_capacity_drops_rows_and_moves_fixed_slots(runs) -> None:
    assert losses(runs["capacity_tight"]) != pytest.approx(losses(runs["plain"]), rel=1e-5)
    moved = [
        line["layer_bytes_exchanged"]
        for line in routing(runs["capacity_tight"])
        if line["timestep_bin"] == 0
    ]
    slots = (
        16  # 0.5 * 8 images * 16 tokens / 4 experts, from each rank to the two experts elsewhere
    )
    assert set(moved) == {2 * 2 * slots * 4 * 32 * 4}


@pytest.mark.parametrize("name", ["megatron", "capacity", "offload"])
def test_run_path_interrupted_goes_on_over_another(runs, tmp_path, name) -> None:
    """Half over one path, half over the default one: the run is the uninterrupted one."""
    half = _job(tmp_path / "run", name, "train.stop_after_steps=4")
    rest = _job(tmp_path / "run", "plain")
    again = _job(tmp_path / "whole", name, "train.stop_after_steps=4")
    assert run_jobs(2, [half, rest, again, again], tmp_path) == [""] * 4
    for folder in ("run", "whole"):
        assert losses(tmp_path / folder) == pytest.approx(losses(runs["plain"]), rel=1e-5)
    assert losses(tmp_path / "whole") == losses(runs[name])
    assert_same_state(runs[name], tmp_path / "whole", "weights")


@pytest.mark.parametrize("name", ["megatron", "capacity", "megatron_whole"])
def test_run_path_converts_to_one_file(runs, tmp_path, name) -> None:
    convert(
        list_checkpoints(runs[name] / "checkpoints")[0],
        Request(destination=tmp_path / "export", to="single", weights="raw"),
    )
    found, expected = load_model(tmp_path / "export").state_dict(), state(runs[name])
    assert all(torch.equal(found[parameter], value) for parameter, value in expected.items())


def test_run_path_in_bf16_stays_near_the_default_one(tmp_path) -> None:
    folders = {
        name: tmp_path / name for name in ("plain", "megatron", "capacity", "wire_fp8", "offload")
    }
    jobs = [
        Job(
            run_dir=folder,
            overrides=(
                "parallel.ep_size=2",
                "train.max_steps=4",
                "precision.compute=bf16",
                *RUNS[name][2],
            ),
            deepspeed={
                "bf16": {"enabled": "auto"},
                "zero_optimization": {"stage": 2, **RUNS[name][3]},
            },
        )
        for name, folder in folders.items()
    ]
    assert run_jobs(2, jobs, tmp_path) == [""] * len(jobs)
    for folder in folders.values():
        assert losses(folder) == pytest.approx(losses(folders["plain"]), rel=2e-2)


def test_run_megatron_flex_without_device_is_refused(tmp_path) -> None:
    job = Job(
        run_dir=tmp_path / "run",
        overrides=("parallel.ep_size=2", *MEGATRON, "parallel.megatron_dispatcher=flex"),
    )
    eight = Job(
        run_dir=tmp_path / "fp8",
        overrides=("precision.compute=fp8",),
        deepspeed={"bf16": {"enabled": True}},
    )
    flex, fp8 = run_jobs(2, [job, eight], tmp_path)
    assert (
        flex
        == "parallel.megatron_dispatcher=flex is DeepEP's, which runs on CUDA devices alone: use"
        " alltoall or allgather"
    )
    assert fp8.startswith(
        "precision.compute=fp8, precision.kernels=auto: Transformer Engine runs on CUDA devices"
        " alone, this process runs on the cpu"
    )
