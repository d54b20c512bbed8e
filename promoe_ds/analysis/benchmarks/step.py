"""Time of a real optimizer step: a recipe beside the dense network of the same activated size, by the trainer's own step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from promoe_ds.analysis.benchmarks.contenders import LIBRARIES, single_process, with_dispatch
from promoe_ds.analysis.benchmarks.layers import mixture_recipe
from promoe_ds.analysis.benchmarks.timing import BenchmarkResult, interleave, keep_freed_memory
from promoe_ds.config import RunConfig, config_from_dict, count_parameters, plan_batches, resolve_deepspeed
from promoe_ds.errors import PromoeError

_T = TypeVar("_T")


def benchmark_step(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> BenchmarkResult:
    """Time whole steps (data, noise, passes, clipping, ZeRO 2, AdamW, moving average, statistics) on this process's device.

    Contenders: `dense`, the recipe without experts; `moe`; and the recipe over the libraries' layers, where there are any.
    On a CPU freed memory stays with the process, as it does on a GPU: else the system clears gigabytes of pages a step.
    Args:
        tokens: of a step, which is one pass; whole images.
    """
    config = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    micro = max(1, tokens // config.model.tokens_per_image)
    config = for_timing(config, micro_batch=micro)
    dense = without_experts(config)
    with single_process() as device:
        bf16 = device.type == "cuda"
        if not bf16:
            keep_freed_memory()
        sessions = {"dense": session_of(dense, bf16=bf16), "moe": session_of(config, bf16=bf16)}
        missing: dict[str, str] = {}
        for dispatch in LIBRARIES:
            try:
                sessions[dispatch] = session_of(with_dispatch(config, dispatch), bf16=bf16)
            except (PromoeError, ImportError) as error:
                missing[dispatch] = str(error)
        timings = interleave({name: step_call(session) for name, session in sessions.items()}, rounds=rounds, warmup=1)
    counts = {name: count_parameters(c) for name, c in (("dense", dense), ("moe", config))}
    return BenchmarkResult(
        suite="step", baseline="dense", rounds=rounds, timings=timings, not_available=missing,
        settings={"recipe": config.name, "images": micro, "zero_stage": 2,
                  "precision": "bf16" if bf16 else "fp32",
                  "activated_parameters": {name: count.activated for name, count in counts.items()},
                  "total_parameters": {name: count.total for name, count in counts.items()}})


def for_timing(config: RunConfig, *, micro_batch: int) -> RunConfig:
    """Return a config for one process on synthetic samples, with steps of one pass."""
    values = config.model_dump(mode="json")
    values["data"] |= {"dataset": "synthetic", "path": None, "synthetic_samples": micro_batch}
    values["train"] |= {"global_batch_size": micro_batch, "micro_batch_size": micro_batch}
    values["parallel"] |= {"ep_size": 1}
    return config_from_dict(values, source=config.name)


def without_experts(config: RunConfig) -> RunConfig:
    """Return the dense network of a recipe's size: that of the same activated parameters, but for prototypes and biases."""
    values = config.model_dump(mode="json")
    values["routing"] = {"method": "dense"}
    values["parallel"] |= {"dispatch": "auto", "expert_backend": "auto"}
    return config_from_dict(values | {"name": f"{config.name}_dense"}, source=config.name)


def session_of(config: RunConfig, *, bf16: bool) -> Any:
    """Build the trainer's session of a config for this process, which is a group of its own."""
    from promoe_ds.data import build_dataset
    from promoe_ds.distributed.context import DistributedContext
    from promoe_ds.train.trainer import Trainer

    batches = plan_batches(config, 1)
    values = {"zero_optimization": {"stage": 2, "overlap_comm": bf16}, "bf16": {"enabled": bf16}}
    plan = resolve_deepspeed(values, config, batches, source="benchmark")
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    return Trainer.build(config, plan, DistributedContext(rank=0, world_size=1, device=device), build_dataset(config))


def in_session(config: RunConfig, body: Callable[[Any], _T], *, bf16: bool) -> _T:
    """Return body(session) for a session of its own, of which nothing is left in memory afterwards.

    A session is full of references to itself and can be collected only when no frame holds it any more: neither the body's nor,
    after an error, those that the error keeps until it has been dealt with. So collection comes after, and again before the next.
    """
    free_memory()
    try:
        return _run_in_session(config, body, bf16)
    finally:
        free_memory()


def _run_in_session(config: RunConfig, body: Callable[[Any], _T], bf16: bool) -> _T:
    session = session_of(config, bf16=bf16)
    try:
        return body(session)
    finally:
        session.engine.destroy()  # its hooks tie it to the process


def free_memory() -> None:
    """Collect what nobody holds any more, and give the device's cached blocks back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_call(session: Any) -> Any:
    """Return what runs one optimizer step."""
    return session.train_step
