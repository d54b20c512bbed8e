"""Time and memory of a real optimizer step: a recipe beside the dense network of the same activated
size and, on CPUs, beside a step as published code makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.candidates import (
    LIBRARIES,
    build_each,
    build_trainer,
    for_timing,
    mixture_recipe,
    with_dispatch,
    without_experts,
)
from benchmarks.processes import in_fresh_process, process_memory, single_process
from benchmarks.published import published_step
from benchmarks.timing import Result, compare
from promoe_ds.config import RunConfig, count_parameters

_STEPS_OF_A_PEAK = 3


def benchmark_step(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> Result:
    """Time whole steps (data, noise, passes, clipping, AdamW, moving average, statistics) on this
    process's device, with no setting that training does not make itself.

    Candidates: `dense`, the recipe without experts; `moe`, both under the ZeRO stage that fits one
    process (2 on a GPU, 0 on a CPU); and the recipe over the libraries' layers, where there are
    any. On a CPU also `moe_zero2` and `published`, and the peak of each in a process of its own.
    Args:
        tokens: of a step, which is one pass; whole images.
    """
    recipe_config, images = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    config = for_timing(recipe_config, micro_batch=images)
    counts = {
        name: count_parameters(one)
        for name, one in (("dense", without_experts(config)), ("moe", config))
    }
    with single_process() as device:
        on_cpu = device.type == "cpu"
        own = ("dense", "moe", "moe_zero2") if on_cpu else ("dense", "moe")
        others = ("published", *LIBRARIES) if on_cpu else LIBRARIES
        steps = {name: _candidate(name, config) for name in own}
        found, missing = build_each(others, lambda name: _candidate(name, config))
        settings = {
            "recipe": config.name,
            "images": images,
            "zero_stage": _stage_of_one_process(),
            "precision": "fp32" if on_cpu else "bf16",
            "activated_parameters": {name: count.activated for name, count in counts.items()},
            "total_parameters": {name: count.total for name, count in counts.items()},
        }
        steps |= found
        result = compare("step", steps, rounds=rounds, warmup=1, settings=settings, missing=missing)
    steps.clear()
    if on_cpu:
        _add_peaks(result, config)
    return result


def _add_peaks(result: Result, config: RunConfig) -> None:
    """Measure each timed candidate's peak of memory, and set ours beside the published step's."""
    timings = result.figures["timings"]
    peaks = {
        name: in_fresh_process(peak_of_steps, name, config, torch.get_num_threads())
        for name in timings
    }
    result.figures["peak_bytes"] = peaks
    result.text.extend(f"{name:30}{peak / 1e6:>10,.0f} MB peak" for name, peak in peaks.items())
    if "published" in peaks:
        ratios = {
            "cpu": timings["moe"]["cpu_ms"] / timings["published"]["cpu_ms"],
            "peak": peaks["moe"] / peaks["published"],
        }
        result.figures["moe_to_published"] = ratios
        result.text.append(
            f"moe to published: {ratios['cpu']:.3f} of the cpu time, {ratios['peak']:.3f} of the"
            " peak"
        )


def peak_of_steps(name: str, config: RunConfig, threads: int) -> int:
    """Return the most resident memory of this process, in bytes, with a few steps of a candidate:
    interpreter and libraries included.
    """
    torch.set_num_threads(threads)
    with single_process():
        step = _candidate(name, config)
        for _ in range(_STEPS_OF_A_PEAK):
            step()
        return process_memory("VmHWM")


def _candidate(name: str, config: RunConfig) -> Callable[[], Any]:
    """Build a candidate on this process's device; return its step.

    Raises: ConfigError where it is not for this recipe or installation.
    """
    if name == "published":
        return published_step(config)
    if name in LIBRARIES:
        config = with_dispatch(config, name)
    elif name == "dense":
        config = without_experts(config)
    stage = 2 if name == "moe_zero2" else _stage_of_one_process()
    bf16 = torch.cuda.is_available()
    zero = {"stage": stage, "overlap_comm": bf16}
    return build_trainer(config, bf16=bf16, zero=zero).train_step


def _stage_of_one_process() -> int:
    return 2 if torch.cuda.is_available() else 0
