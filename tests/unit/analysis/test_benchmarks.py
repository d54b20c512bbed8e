"""The benchmark suites, small: what they need a GPU or minutes for runs here in seconds on a CPU."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from promoe_ds.analysis.benchmarks import BenchmarkResult, gpu, interleave
from promoe_ds.analysis.benchmarks.contenders import LIBRARIES, library_layers, single_process
from promoe_ds.analysis.benchmarks.dispatch import _check_ranks, benchmark_dispatch
from promoe_ds.analysis.benchmarks.gpu import GpuReport, report
from promoe_ds.analysis.benchmarks.layers import _layer_call, _loop_call, initialised
from promoe_ds.analysis.benchmarks.stats import MadeUpRun, benchmark_report
from promoe_ds.analysis.benchmarks.step import for_timing, in_session, step_call, without_experts
from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig, count_parameters, load_config
from promoe_ds.errors import ConfigError
from promoe_ds.model.build import build_moe_layer
from promoe_ds.routing import partition_samples

from ...processes import REPOSITORY, environment, run_python
from ..builders import small_config


def small() -> RunConfig:
    return small_config(model={"hidden_size": 32}, diffusion={})


@pytest.fixture(scope="module")
def self_test() -> GpuReport:
    with single_process() as device:
        return report(device, steps={}, layer_recipe=small(), parity_recipe=small(), layer_images=2, training_steps=6)


def test_gpu_self_test_on_a_cpu_finds_every_backend_near_float64(self_test: GpuReport) -> None:
    assert {"layer, grouped_mm", "layer, loop", "network, fp32", "network, bf16"} <= self_test.parity.keys()
    assert self_test.parity["network, fp32"] < 1e-4
    assert all(0 < error < 0.05 for error in self_test.parity.values())


def test_gpu_self_test_on_a_cpu_trains_alike_in_every_precision(self_test: GpuReport) -> None:
    assert self_test.losses["bf16"] == pytest.approx(self_test.losses["fp32"], rel=0.05)


def test_gpu_self_test_on_a_cpu_reports_kernels_and_contenders(self_test: GpuReport) -> None:
    assert sum(self_test.kernels.values()) > 0
    assert {"dense", "moe", "per_expert_loop"} <= self_test.layer.keys()
    text = "\n".join(self_test.lines())
    for name in LIBRARIES:
        assert (name in self_test.layer) != (name in self_test.not_available)
        assert name in text


def test_gpu_self_test_goes_on_after_parts_that_fail_and_tells_what_it_found(monkeypatch) -> None:
    """Each failing part is one of another kind: out of memory down to one image, an error of a kernel, a missing library."""
    def out_of_memory(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch more")

    def kernel(*args: object) -> float:
        raise RuntimeError("no kernel image")

    def absent(*args: object, steps: int) -> float:
        raise ConfigError("not for this device")

    images, told = [], []
    monkeypatch.setattr(gpu, "_step_speed", lambda config, n, *args: (images.append(n), out_of_memory()))
    monkeypatch.setattr(gpu, "network_parity", kernel)
    monkeypatch.setattr(gpu, "mean_loss", absent)
    monkeypatch.setattr(gpu, "kernel_times", lambda config, n, device: {"gemm": float(n)})
    monkeypatch.setattr(gpu, "_config", lambda recipe: small())
    monkeypatch.setattr(gpu, "layer_comparisons", lambda *args: ({"layer, loop": lambda: 0.5}, {"megatron": "is missing"}))
    monkeypatch.setattr(gpu, "layer_contenders", lambda *args: ({"dense": lambda: None, "moe": kernel}, {}))
    found = report(torch.device("cpu"), steps={"tiny": 4}, layer_recipe="", parity_recipe="", layer_images=2, training_steps=6,
                   tell=told.append)
    assert images == [4, 2, 1] * 3
    assert found.failed == {**{f"network, {name}": "RuntimeError: no kernel image" for name in gpu.PRECISIONS},
                            **{f"tiny{kind}": "OutOfMemoryError: CUDA out of memory. Tried to allocate"
                               for kind in (", bf16", ", fp8", " without experts, bf16")},
                            "layer, moe": "RuntimeError: no kernel image"}
    assert found.not_available == {"megatron": "is missing", **{f"training, {n}": "not for this device" for n in gpu.PRECISIONS}}
    assert (found.parity, found.kernels, list(found.layer)) == ({"layer, loop": 0.5}, {"gemm": 2.0}, ["dense"])
    assert all(any(reason in line for line in told) for reason in {**found.failed, **found.not_available}.values())
    assert found.lines()[3] in told


def test_session_is_gone_before_the_next_one_is_built() -> None:
    seen: list[weakref.ref] = []
    alive: list[bool] = []

    def body(session: Any) -> None:
        alive.extend(each() is not None for each in seen)
        seen.append(weakref.ref(session.module))
        step_call(session)()
        if len(seen) == 2:
            raise MemoryError("as if memory had run out")

    with single_process():
        for attempt in range(3):
            try:
                in_session(for_timing(small(), micro_batch=2), body, bf16=False)
            except MemoryError:
                assert attempt == 1
    assert (len(seen), alive) == (3, [False] * 3)
    assert seen[-1]() is None


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    return run_python([str(REPOSITORY / "tools" / "benchmark.py"), *arguments], cwd=REPOSITORY, env=environment(), timeout=500)


def test_gpu_suite_without_a_device_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = run_tool("gpu")
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr


@pytest.mark.parametrize("option", [("--out", "{}/result.json"), ("--folder", "{}")], ids=["out", "folder"])
def test_folder_that_is_not_there_is_named_before_anything_runs(tmp_path: Path, option: tuple[str, str]) -> None:
    main = runpy.run_path(str(REPOSITORY / "tools" / "benchmark.py"))["main"]
    name, path = option[0], option[1].format(tmp_path / "none")
    with pytest.raises(ConfigError) as error:
        main(["report", name, path])
    assert str(error.value) == f"{name} {path}: there is no folder {tmp_path / 'none'}: make it first"


def test_exchange_of_more_ranks_than_devices_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--ranks 2: every rank takes a CUDA device of its own and this machine shows 1: use at"):
        benchmark_dispatch(tokens=32, rounds=2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    _check_ranks(2)


@pytest.mark.parametrize("routing", [{"top_k": 2}, {"expert_type": "swiglu"}, {"top_k": 3, "expert_type": "swiglu"}],
                         ids=["two choices", "swiglu", "both"])
def test_per_expert_loop_computes_what_the_layer_computes(routing: dict[str, Any]) -> None:
    config = small_config(model={"hidden_size": 32}, routing=routing)
    torch.manual_seed(0)
    layer = initialised(build_moe_layer(config))
    tokens = torch.randn(3, config.model.tokens_per_image, 32)
    partition = partition_samples(ClassCondition(torch.zeros(3, dtype=torch.int64), config.model.null_label))
    found, expected = (call(layer, partition)(tokens)[0] for call in (_loop_call, _layer_call))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_libraries_layers_of_a_recipe_over_several_ranks_are_built_for_this_process() -> None:
    config = load_config("digits_promoe")
    assert config.parallel.ep_size > 1
    with single_process() as device:
        layers, missing = library_layers(config, device, torch.float32)
    assert set(layers) | set(missing) == set(LIBRARIES)
    assert layers["deepspeed_moe"].routed.num_local_experts == config.routing.num_experts


@pytest.mark.parametrize("suite", ["moe-layer", "step", "dispatch"])
def test_suite_from_the_command_line_names_contenders_and_what_is_missing(tmp_path: Path, suite: str) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "result.json"
    recipe.write_text("base: promoe_b\nmodel: {preset: null, hidden_size: 32, depth: 2, num_heads: 2, input_size: 8}\n")
    done = run_tool(suite, "--tokens", "32", "--rounds", "2", "--recipe", str(recipe), "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["timings"][result["baseline"]]["cpu_ratio"] == 1.0
    assert set(result["timings"]) | set(result["not_available"]) >= {*LIBRARIES, result["baseline"]}
    assert all(name in done.stdout for name in LIBRARIES)
    if suite == "step":
        counts, width, prototypes_and_bias = result["settings"]["activated_parameters"], 32, 13
        assert counts["moe"] - counts["dense"] == width * prototypes_and_bias
    if suite == "dispatch":
        sent = result["settings"]["bytes_sent"]
        assert sent["alltoall"] == sent["exchange_limit"] == sent["ideal"] > 0


def test_dense_twin_of_promoe_s_is_dit_s() -> None:
    assert count_parameters(without_experts(load_config("promoe_s"))) == count_parameters(load_config("dit_s"))


def test_interleave_takes_ratios_round_by_round() -> None:
    timings = interleave({"a": lambda: None, "b": lambda: sum(range(20000))}, rounds=5)
    assert timings["a"].wall_ratio == timings["a"].cpu_ratio == 1.0
    assert timings["b"].wall_ratio > 1.0
    assert math.isfinite(timings["b"].cpu_ms)
    assert json.dumps(BenchmarkResult(suite="s", baseline="a", rounds=5, timings={}, settings={}).machine)


def test_report_of_a_made_up_run_is_measured_and_told(tmp_path: Path) -> None:
    result = benchmark_report(MadeUpRun(steps=500, layers=(1, 3), experts=4, bins=2), tmp_path)
    assert result.log_lines == 10 * 2 * 2
    assert result.report_bytes == (tmp_path / "expert_load.html").stat().st_size
    assert "500 steps × 2 layers × 4 experts × 2 bins: 40 lines" in result.lines()[0]
