"""Memory and traffic of real ranks: against the plan, and against plain data parallelism."""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.candidates import build_trainer
from benchmarks.processes import on_ranks, process_memory
from benchmarks.timing import Result
from promoe_ds.backends.devices import DEVICES
from promoe_ds.config import RunConfig, change_config, load_config, plan_batches, resolve_deepspeed
from promoe_ds.data import build_dataset
from promoe_ds.diffusion import draw_batch
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError
from promoe_ds.model import build_model, initialise
from promoe_ds.planning.cluster import Cluster, layout_of
from promoe_ds.planning.planner import StepPlan, plan_step
from promoe_ds.planning.shapes import fake_world, trace_pass
from promoe_ds.planning.trace import CollectiveWatch
from promoe_ds.training.router_state import give_superclasses
from promoe_ds.training.step import TrainingModule

#: ZeRO 2 with buckets small enough to matter less than what they carry.
ZERO_2: dict[str, Any] = {
    "stage": 2,
    "contiguous_gradients": True,
    "overlap_comm": False,
    "reduce_bucket_size": 2_000_000,
}
#: glibc gives every block of this size or more back to the system when it is freed, so that
#: resident means live.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "32768",
    "MALLOC_TRIM_THRESHOLD_": "32768",
    "MALLOC_ARENA_MAX": "1",
    "DS_ACCELERATOR": "cpu",
}
#: Of a step over all ranks, and steps whose peak is measured.
_IMAGES, _STEPS = 4, 2


@dataclass(frozen=True)
class RankMeasurement:
    """One rank: resident bytes before the model and at the peak of later steps; what it sent."""

    baseline_bytes: int
    peak_bytes: int
    rows_leaving: int
    exchange_bytes: int

    @property
    def used_bytes(self) -> int:
        """What training added to interpreter, libraries, process group and data set."""
        return self.peak_bytes - self.baseline_bytes


@dataclass(frozen=True)
class Comparison:
    """A plan beside the ranks measured; planned_exchange: for the rows that were really routed."""

    plan: StepPlan
    ranks: list[RankMeasurement]
    planned_exchange: float
    measured_exchange: int

    @property
    def memory_ratio(self) -> float:
        """Largest measured rank over the plan."""
        return largest(self.ranks) / self.plan.total_memory


def benchmark_memory(*, recipe: str, ranks: int) -> Result:
    """Train a recipe on `ranks` processes with as large an `ep_size`, and as plain data
    parallelism, in fp32.
    """
    if ranks < 1 or _IMAGES % ranks:
        raise ConfigError(f"--ranks {ranks}: must divide the {_IMAGES} images of a step")
    common = [
        "data.dataset=synthetic",
        f"data.synthetic_samples={4 * _IMAGES}",
        f"train.global_batch_size={_IMAGES}",
    ]
    found = compare_with_measurement(
        load_config(recipe, [*common, f"parallel.ep_size={ranks}"]), ZERO_2, ranks
    )
    measured = largest(found.ranks)
    plain = largest(measure_ranks(load_config(recipe, common), ranks, zero=None))
    plan = found.plan
    kinds = ", ".join(f"{kind} {size / 1e6:,.0f}" for kind, size in plan.memory.items() if size)
    return Result(
        suite="memory",
        settings={
            "recipe": recipe,
            "ranks": ranks,
            "ep_size": ranks,
            "images": _IMAGES,
            "zero": ZERO_2,
            "precision": "fp32",
        },
        figures={
            "planned": {**plan.memory, "phase": plan.phase},
            "planned_bytes": plan.total_memory,
            "measured_bytes": measured,
            "plain_bytes": plain,
            "planned_exchange_bytes": found.planned_exchange,
            "measured_exchange_bytes": found.measured_exchange,
            "ranks": [asdict(rank) for rank in found.ranks],
        },
        text=[
            (
                f"planned   {plan.total_memory / 1e6:10,.1f} MB a rank ({kinds}; fullest:"
                f" {plan.phase})"
            ),
            f"measured  {measured / 1e6:10,.1f} MB, {found.memory_ratio:.3f} of the plan",
            (
                f"plain     {plain / 1e6:10,.1f} MB (data parallel, full copy as moving average): "
                f"measured is {measured / plain:.3f} of it"
            ),
            (
                f"exchange  {found.measured_exchange:,} bytes sent in a step, planned for the rows "
                f"routed {found.planned_exchange:,.0f}"
            ),
        ],
    )


def largest(ranks: list[RankMeasurement]) -> int:
    """Return what the rank that needs most uses."""
    return max(rank.used_bytes for rank in ranks)


def compare_with_measurement(
    config: RunConfig, zero: dict[str, Any], world_size: int
) -> Comparison:
    """Plan a config, train a few steps of it on `world_size` processes, and return both.

    Args:
        zero: the `zero_optimization` section of the DeepSpeed JSON; numbers are fp32.
    """
    batches = plan_batches(config, world_size)
    deepspeed = resolve_deepspeed(
        {"zero_optimization": zero}, config, batches, source="measurement"
    )
    layout = layout_of(batches, deepspeed, on_cpu=True)
    here = Cluster(nodes=1, gpus_per_node=world_size, device=DEVICES["h100"], network_bandwidth=1.0)
    with fake_world(world_size):
        plan, shapes = plan_step(config, layout, here), trace_pass(config, layout)
    ranks = measure_ranks(config, world_size, zero=zero)
    per_row = shapes.trace.rows_sent(0) / max(1, shapes.rows_leaving)
    return Comparison(
        plan,
        ranks,
        per_row * sum(rank.rows_leaving for rank in ranks),
        sum(rank.exchange_bytes for rank in ranks),
    )


def measure_ranks(
    config: RunConfig, world_size: int, *, zero: dict[str, Any] | None
) -> list[RankMeasurement]:
    """Train on real processes; zero=None: plain data parallelism of torch, AdamW and a full copy
    as moving average.

    Raises: TrainingError with the traceback of a process that failed.
    """
    return on_ranks(world_size, measure_rank, config, zero, environment=_ALLOCATOR)


def measure_rank(
    ranks: DistributedContext, config: RunConfig, zero: dict[str, Any] | None
) -> RankMeasurement:
    """Train a few steps as one rank and return its resident memory and traffic."""
    rows: list[int] = []
    # Libraries load and compile on first use: that is no cost of the model.
    tiny = change_config(
        config,
        model={"preset": None, "hidden_size": 32, "num_heads": 2, "depth": 2},
        routing={"expert_width": None, "shared_expert_width": None},
    )
    _prepared(zero, tiny, ranks, [])()
    _settle()
    baseline = process_memory("VmRSS")
    step = _prepared(zero, config, ranks, rows)
    step()  # moments and averages are made in the first step
    _settle()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew here
    for _ in range(_STEPS):
        step()
    peak = process_memory("VmHWM")
    rows.clear()
    with CollectiveWatch() as watch:
        step()
    return RankMeasurement(baseline, peak, sum(rows), watch.rows_sent(ranks.rank))


def _prepared(
    zero: dict[str, Any] | None, config: RunConfig, ranks: DistributedContext, rows: list[int]
) -> Callable[[], Any]:
    """Return what trains a step; `rows` gets the rows that each pass of a layer sends away."""
    if zero is None:
        return _plain(config, ranks)
    trainer = build_trainer(config, bf16=False, zero=zero)
    exchanges = config.parallel.resolved_dispatch == "alltoall"
    layers = trainer.module.denoiser.moe_layers().values()
    for layer in layers if exchanges else ():
        layer.router.register_forward_hook(
            lambda router, inputs, plan, layer=layer: rows.append(
                int(layer.dispatcher.rows_leaving(plan.assignment))
            )
        )
    return trainer.train_step


def _plain(config: RunConfig, ranks: DistributedContext) -> Callable[[], None]:
    """Train as published code does: every rank holds everything, the average is a second model."""
    network = build_model(config)
    initialise(network, config.train.seed)
    give_superclasses(network, config)
    module = DistributedDataParallel(TrainingModule(network).train(), gradient_as_bucket_view=True)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.optimizer.lr, fused=True)
    batches, dataset = plan_batches(config, ranks.world_size), build_dataset(config)

    def step() -> None:
        for micro_step in range(batches.accumulation):
            slots = batches.slots(micro_step, ranks.rank)
            batch = draw_batch(
                *dataset.take(list(slots)),
                module.module.objective,
                slots=slots,
                seed=config.train.seed,
                step=0,
            )
            module(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1e-4)

    return step


def _settle() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
