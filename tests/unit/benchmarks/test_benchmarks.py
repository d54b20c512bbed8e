"""The benchmark suites, small: what they need a GPU or minutes for runs here in seconds on a
CPU.
"""

from __future__ import annotations

import json
import runpy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.candidates import (
    LIBRARIES,
    build_each,
    for_timing,
    initialised,
    layer_of,
    with_dispatch,
    with_trainer,
    without_experts,
)
from benchmarks.data import benchmark_data
from benchmarks.dispatch import _check_ranks
from benchmarks.gpu import self_test
from benchmarks.layers import conditional, layer_call, loop_call
from benchmarks.processes import in_fresh_process, on_ranks, single_process
from benchmarks.published import PublishedNetwork
from benchmarks.stats import SyntheticRun, benchmark_report
from benchmarks.timing import interleave
from promoe_ds.config import RunConfig, count_parameters, load_config
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, TrainingError
from promoe_ds.model import build_model
from promoe_ds.model.build import build_moe_layer

from ..builders import small_config

CPU = torch.device("cpu")


def small() -> RunConfig:
    return small_config(model={"hidden_size": 32}, diffusion={})


def tool(*arguments: str) -> None:
    runpy.run_path(str(Path(__file__).parents[3] / "tools" / "benchmark.py"))["main"](arguments)


# The self-test for a GPU.


def test_self_test_on_a_cpu_fills_every_part() -> None:
    with single_process() as device:
        test = self_test(
            device,
            steps={},
            layer_config=small(),
            parity_config=small(),
            layer_images=2,
            training_steps=6,
        )
    found = test.found
    assert {"layer, grouped_mm", "layer, loop", "network, fp32", "network, bf16"} <= found[
        "parity"
    ].keys()
    assert found["parity"]["network, fp32"] < 1e-4
    assert all(0 < error < 0.05 for error in found["parity"].values())
    assert found["losses"]["bf16"] == pytest.approx(found["losses"]["fp32"], rel=0.05)
    assert sum(found["kernels"].values()) > 0
    assert {"dense", "moe", "per_expert_loop"} <= found["layer"].keys()
    assert all((name in found["layer"]) != (name in found["not_available"]) for name in LIBRARIES)
    assert {name.partition(": ")[2] for name in found["counts"]} == {
        "kernels",
        "host ms",
        "ms a step",
    }
    test.predicted = {"layer, moe: ms": 2 * found["layer"]["moe"].wall_ms}
    text = "\n".join(test.result().lines())
    assert "| 0.50 |" in next(line for line in text.splitlines() if "| layer, moe: ms |" in line)
    assert all(name[:60] in text for values in found.values() for name in values)
    assert json.dumps(test.result().as_json())


def test_self_test_runs_on_after_parts_that_fail_and_reports_what_it_finds(monkeypatch) -> None:
    """Each failing part is one of another kind: out of memory down to one image, an error of a
    kernel, a missing library.
    """

    def out_of_memory(config: object, images: int, device: object, **options: object) -> None:
        tried.append(images)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch more")

    def kernel(*args: object) -> float:
        raise RuntimeError("no kernel image")

    def absent(*args: object) -> float:
        raise ConfigError("not for this device")

    tried, reported = [], []
    monkeypatch.setattr(gpu, "timed_step", out_of_memory)
    monkeypatch.setattr(gpu, "network_parity", kernel)
    monkeypatch.setattr(gpu, "mean_loss", absent)
    monkeypatch.setattr(gpu, "kernel_times", lambda config, images, device: ({"gemm": images}, 7))
    monkeypatch.setattr(gpu, "load_config", lambda recipe: small())
    monkeypatch.setattr(
        gpu,
        "layer_comparisons",
        lambda *args: ({"layer, loop": lambda: 0.5}, {"megatron": "is missing"}),
    )
    monkeypatch.setattr(
        gpu, "layer_candidates", lambda *args: ({"dense": lambda: None, "moe": kernel}, {})
    )
    found = self_test(
        CPU,
        steps={"tiny": 4},
        layer_config=small(),
        parity_config=small(),
        layer_images=2,
        training_steps=6,
        report=reported.append,
    ).found
    assert tried == [4, 2, 1] * 3 + [1]
    assert {name: reason.split(":")[0] for name, reason in found["failed"].items()} == {
        **{f"network, {name}": "RuntimeError" for name in gpu.PRECISIONS},
        "layer, moe": "RuntimeError",
        **{f"tiny, {kind}": "OutOfMemoryError" for kind in ("bf16", "fp8", "without experts")},
        "small, bf16: host ms": "OutOfMemoryError",
    }
    assert found["not_available"].keys() == {"megatron", *gpu.PRECISIONS}
    assert (found["parity"], found["kernels"], list(found["layer"])) == (
        {"layer, loop": 0.5},
        {"gemm": 2.0},
        ["dense"],
    )
    assert all(
        any(name in line for line in reported) for values in found.values() for name in values
    )


def test_trainer_is_gone_before_the_next_one_is_built() -> None:
    seen: list[weakref.ref] = []
    alive: list[bool] = []

    def body(trainer: Any) -> None:
        alive.extend(each() is not None for each in seen)
        seen.append(weakref.ref(trainer.module))
        trainer.train_step()
        if len(seen) == 2:
            raise MemoryError("as if memory had run out")

    with single_process():
        for attempt in range(3):
            try:
                with_trainer(for_timing(small(), micro_batch=2), body, bf16=False)
            except MemoryError:
                assert attempt == 1
    assert (len(seen), alive) == (3, [False] * 3)
    assert seen[-1]() is None


# Candidates.


@pytest.mark.parametrize(
    "routing", [{"top_k": 2}, {"top_k": 3, "expert_type": "swiglu"}], ids=["two choices", "swiglu"]
)
def test_per_expert_loop_computes_what_the_layer_computes(routing: dict[str, Any]) -> None:
    config = small_config(model={"hidden_size": 32}, routing=routing)
    torch.manual_seed(0)
    layer, partition = initialised(build_moe_layer(config)), conditional(3, config)
    tokens = torch.randn(3, config.model.tokens_per_image, 32)
    found, expected = (call(layer, partition)(tokens)[0] for call in (loop_call, layer_call))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_libraries_layers_of_a_recipe_over_several_ranks_are_built_for_this_process() -> None:
    config = load_config("digits_promoe")
    assert config.parallel.ep_size > 1
    with single_process() as device:
        layers, missing = build_each(
            LIBRARIES, lambda name: layer_of(with_dispatch(config, name), device, torch.float32)
        )
    assert set(layers) | set(missing) == set(LIBRARIES)
    assert layers["deepspeed_moe"].routed.num_local_experts == config.routing.num_experts


@pytest.mark.parametrize("recipe", ["promoe_s", "ditmoe_s", "diffmoe_s"])
def test_dense_twin_of_a_recipe_is_dit_s(recipe: str) -> None:
    assert count_parameters(without_experts(load_config(recipe))) == count_parameters(
        load_config("dit_s")
    )


# Timing and processes.


def test_interleave_takes_ratios_round_by_round() -> None:
    order: list[str] = []
    timings = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b") or sum(range(200000))},
        rounds=4,
        warmup=1,
    )
    assert order == list("abbaabbaab")
    assert timings["a"].wall_ratio == timings["a"].cpu_ratio == 1.0 < timings["b"].wall_ratio
    assert timings["b"].wall_ms_low <= timings["b"].wall_ms <= timings["b"].wall_ms_high


def rank_of(ranks: DistributedContext, failing: int) -> tuple[int, int]:
    if ranks.rank == failing:
        raise ValueError("as it was asked")
    return ranks.rank, ranks.world_size


def test_work_on_ranks_returns_in_their_order_and_names_what_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert on_ranks(2, rank_of, -1) == [(0, 2), (1, 2)]
    with pytest.raises(TrainingError, match="ValueError: as it was asked"):
        on_ranks(2, rank_of, 1)
    assert in_fresh_process(max, 1, 2) == 2


# Suites.


def test_report_of_a_synthetic_run_is_measured(tmp_path: Path) -> None:
    figures = benchmark_report(
        SyntheticRun(steps=500, layers=(1, 3), experts=4, bins=2), tmp_path
    ).figures
    assert (
        figures["log_lines"]
        == len((tmp_path / "routing.jsonl").read_text().splitlines())
        == 10 * 2 * 2
    )
    assert figures["report_bytes"] == (tmp_path / "expert_load.html").stat().st_size


def test_data_are_timed_by_loader_and_the_index_is_opened(tmp_path: Path) -> None:
    result = benchmark_data(tmp_path, rounds=1, records=256, images=5, index_records=5000)
    assert (
        result.figures["wall"].keys()
        == result.figures["cpu"].keys()
        == {"packed, means", "packed", "npz, 8 threads", "npz, 1 thread"}
    )
    assert all(rate > 0 for rate in result.figures["wall"].values())
    assert result.figures["images"].keys() == {"tree", "parquet", "tar"}
    assert (result.figures["index_shards"], result.figures["index_megabytes"] > 0) == (2, True)


@pytest.mark.parametrize(
    "suite",
    [
        "moe-layer",
        "router",
        "stats",
        "dispatch",
        pytest.param("step", marks=pytest.mark.combinations),
    ],
)
def test_suite_from_the_command_line_names_candidates_and_what_is_missing(
    suite: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "result.json"
    size = "hidden_size: 32, depth: 2, num_heads: 2"
    recipe.write_text(
        f"base: emoji_promoe\nmodel: {{{size}}}\nrouting: {{top_k: 2}}\n"
        if suite in ("router", "stats")
        else f"base: promoe_b\nmodel: {{preset: null, input_size: 8, {size}}}\n"
    )
    tool(suite, "--tokens", "32", "--rounds", "2", "--recipe", str(recipe), "--out", str(out))
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert (result["suite"], result["rounds"]) == (suite, 2)
    assert result["timings"][result["baseline"]]["cpu_ratio"] == 1.0
    names = {*result["timings"], *result["not_available"]}
    assert suite in ("router", "stats") or names >= {*LIBRARIES, result["baseline"]}
    assert all(name in printed for name in names)
    if suite == "step":
        counts, width, prototypes_and_bias = result["settings"]["activated_parameters"], 32, 13
        assert counts["moe"] - counts["dense"] == width * prototypes_and_bias
        assert result["peak_bytes"].keys() == result["timings"].keys() >= {"moe_zero2", "published"}
        assert all(ratio > 0 for ratio in result["moe_to_published"].values())
    if suite == "dispatch":
        sent = result["settings"]["bytes_sent"]
        assert sent["alltoall"] == sent["exchange_limit"] == sent["ideal"] > 0


def test_published_network_has_our_parameters() -> None:
    config = load_config("promoe_s")
    with torch.device("meta"):
        theirs, ours = PublishedNetwork(config), build_model(config)
    count, same = (sum(p.numel() for p in network.parameters()) for network in (theirs, ours))
    assert count == same


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_gpu_suite_without_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="CUDA device"):
        tool("gpu")


@pytest.mark.parametrize(("option", "path"), [("--out", "{}/result.json"), ("--folder", "{}")])
def test_folder_that_is_not_there_is_named_before_anything_runs(
    tmp_path: Path, option: str, path: str
) -> None:
    with pytest.raises(ConfigError, match=f"{option} {path.format(tmp_path / 'none')}"):
        tool("report", option, path.format(tmp_path / "none"))


@pytest.mark.parametrize(("ranks", "ep_size"), [("3", "2"), ("2", "4"), ("0", "1")])
def test_checkpoint_of_ranks_that_experts_are_not_shared_by_is_refused(
    ranks: str, ep_size: str
) -> None:
    with pytest.raises(ConfigError, match=f"--ranks {ranks}: .* --ep-size {ep_size}"):
        tool("checkpoint", "--recipe", "digits_promoe", "--ranks", ranks, "--ep-size", ep_size)


def test_exchange_of_more_ranks_than_devices_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--ranks 2"):
        tool("dispatch")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    _check_ranks(2)
