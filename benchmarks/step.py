"""Time of a real optimizer step: a recipe beside the dense network of the same activated size."""

from __future__ import annotations

from benchmarks.candidates import (
    LIBRARIES,
    build_each,
    for_timing,
    mixture_recipe,
    session_of,
    with_dispatch,
    without_experts,
)
from benchmarks.processes import single_process
from benchmarks.timing import Result, contest, interleave
from promoe_ds.config import count_parameters


def benchmark_step(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> Result:
    """Time whole steps (data, noise, passes, clipping, ZeRO 2, AdamW, moving average, statistics)
    on this process's device, with no setting that training does not make itself.

    Candidates: `dense`, the recipe without experts; `moe`; and the recipe over the libraries'
    layers, where there are any.
    Args:
        tokens: of a step, which is one pass; whole images.
    """
    config = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    images = max(1, tokens // config.model.tokens_per_image)
    config = for_timing(config, micro_batch=images)
    configs = {"dense": without_experts(config), "moe": config}
    with single_process() as device:
        bf16 = device.type == "cuda"
        sessions = {name: session_of(one, bf16=bf16) for name, one in configs.items()}
        libraries, missing = build_each(
            LIBRARIES, lambda name: session_of(with_dispatch(config, name), bf16=bf16)
        )
        steps = {name: session.train_step for name, session in (sessions | libraries).items()}
        timings = interleave(steps, rounds=rounds, warmup=1)
    counts = {name: count_parameters(one) for name, one in configs.items()}
    settings = {
        "recipe": config.name,
        "images": images,
        "zero_stage": 2,
        "precision": "bf16" if bf16 else "fp32",
        "activated_parameters": {name: count.activated for name, count in counts.items()},
        "total_parameters": {name: count.total for name, count in counts.items()},
    }
    return contest("step", timings, rounds=rounds, settings=settings, missing=missing)
