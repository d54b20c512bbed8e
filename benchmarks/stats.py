"""What the routing statistics cost: their share of a training step, and the report of a long
run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.candidates import mixture_recipe
from benchmarks.layers import training_module, training_pass
from benchmarks.processes import in_fresh_process
from benchmarks.timing import Result, compare, wall_clock
from promoe_ds.config import change_config
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.routing.assignment import sum_tokens_by_expert
from promoe_ds.training.routing_log import RoutingAccumulator


@dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    """A long run's log: loads that drift, an expert that dies half-way, one that starves."""

    steps: int = 500_000
    log_every: int = 50
    layers: tuple[int, ...] = tuple(range(1, 28, 2))
    experts: int = 12
    bins: int = 10
    ep_size: int = 4
    seed: int = 0

    def write(self, path: Path) -> int:
        """Write routing.jsonl; return the number of lines."""
        random, shape = (
            np.random.default_rng(self.seed),
            (len(self.layers), self.bins, self.experts),
        )
        base_LE = random.dirichlet(np.full(self.experts, 8.0), size=len(self.layers))
        intervals = range(self.log_every, self.steps + 1, self.log_every)
        with path.open("w", encoding="utf-8") as file:
            for step in intervals:
                shares_LE = base_LE * np.exp(0.2 * random.standard_normal(base_LE.shape))
                shares_LE[0, 1] *= step < self.steps / 2
                shares_LE[-1, 2] *= 0.02
                shares_LE /= shares_LE.sum(axis=1, keepdims=True)
                tokens_LQE = random.poisson(shares_LE[:, None] * 3000.0, size=shape)
                for layer, tokens_QE in zip(self.layers, tokens_LQE, strict=True):
                    file.writelines(
                        json.dumps(self._line(step, layer, number, tokens_QE)) + "\n"
                        for number in range(self.bins)
                    )
        return len(intervals) * len(self.layers) * self.bins

    def _line(self, step: int, layer: int, number: int, tokens_QE: np.ndarray) -> dict[str, object]:
        tokens = tokens_QE[number].tolist()
        total = sum(tokens)
        detail = {"layer_detail": self._detail(tokens_QE.sum(axis=0))} if number == 0 else {}
        return {
            "schema": 2,
            "step": step,
            "steps": self.log_every,
            "layer": layer,
            "timestep_bin": number,
            "timestep_bins": self.bins,
            "tokens_per_expert": tokens,
            "gate_sum_per_expert": [round(0.3 * n, 2) for n in tokens],
            "conditional_tokens": total,
            "unconditional_tokens": total // 9,
            "gate_mean": 0.3,
            "load_max_over_mean": max(tokens) * self.experts / total,
            "load_entropy": 0.9,
            "dead_experts": tokens.count(0),
            "load_cv": 0.2,
            "prototype_similarity": -0.08,
            "layer_bytes_exchanged": 40 * total,
            **detail,
        }

    def _detail(self, tokens_E: np.ndarray) -> dict[str, object]:
        experts = self.experts
        by_rank = tokens_E.reshape(self.ep_size, -1).sum(axis=1)
        names = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")
        return {
            "passes": self.log_every,
            "ranks": 2 * self.ep_size,
            "ep_size": self.ep_size,
            "tokens_per_ep_rank": by_rank.tolist(),
            "rank_max_over_mean": float(by_rank.max() / by_rank.mean()) + 0.1,
            "exchanges": {name: {"bytes": 1000, "seconds": 0.01} for name in names},
            "prototype_similarity_matrix": (1.08 * np.eye(experts) - 0.08).round(4).tolist(),
            "prototype_to_centroid": [0.7] * experts,
            "prototype_to_other_centroids": [-0.06] * experts,
        }


def benchmark_stats(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> Result:
    """Time all that is done for routing.jsonl against a training step without the optimizer.

    Candidates: `training_step`, forward and backward pass of the whole network with what the plans
    carry for the log; `statistics`, that share of the plans (gates by expert, sums of tokens) once
    more and counting the pass, tables by class and patch included; `statistics_log_line`, reducing
    and describing an interval, which happens once in train.log_every steps.
    Args:
        tokens: conditional tokens of a pass, a multiple of the recipe's tokens per image.
    """
    recipe_config, images = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    config = change_config(
        recipe_config,
        parallel={"ep_size": 1, "dispatch": "local"},
        logging={
            "class_counts": recipe_config.num_groups > 0,
            "position_counts": True,
            "counts_every": 1,
        },
    )
    module, batch = training_module(config, images)
    ranks = DistributedContext(rank=0, world_size=1, device=torch.device("cpu"))
    accumulator = RoutingAccumulator(config, module.denoiser, ranks)
    plans, model = module(batch).plans, config.model
    shape = (images, model.tokens_per_image * config.routing.top_k)
    ids_BN, gates_BN = torch.randint(config.routing.num_experts, shape), torch.rand(shape)
    entering_TD = torch.randn(images * model.tokens_per_image, model.hidden_size)

    def count() -> None:
        for plan in plans.values():
            sum_tokens_by_expert(entering_TD, plan.assignment)
            torch.zeros(plan.stats.gate_sums_BE.shape).scatter_add_(1, ids_BN, gates_BN)
        accumulator.add(plans, batch.sigma_B, batch.condition.group_B)

    def line() -> None:
        accumulator.add(plans, batch.sigma_B, batch.condition.group_B)
        accumulator.reduce(step=1, steps=1)

    settings = {
        "recipe": config.name,
        "tokens": len(entering_TD),
        "classes": config.num_groups,
        "log_every": config.train.log_every,
    }
    candidates = {
        "training_step": lambda: training_pass(module, batch),
        "statistics": count,
        "statistics_log_line": line,
    }
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        return compare("stats", candidates, rounds=rounds, warmup=1, settings=settings)
    finally:
        dist.destroy_process_group()


def benchmark_report(run: SyntheticRun, folder: Path) -> Result:
    """Write a long run's log into `folder` and build its report in a process of its own."""
    log, settings = folder / "routing.jsonl", asdict(run)
    figures = {"log_lines": run.write(log), "log_bytes": log.stat().st_size}
    start = wall_clock()
    page = in_fresh_process(_build_report, folder)
    figures |= {"seconds": wall_clock() - start, "report_bytes": page.stat().st_size}
    return Result(
        suite="report",
        settings=settings,
        figures=figures,
        text=[
            (
                f"report of {run.steps:,} steps × {len(run.layers)} layers × {run.experts} experts"
                f" × {run.bins} bins: {figures['log_lines']:,} lines,"
                f" {figures['log_bytes'] / 1e6:,.0f} MB"
            ),
            f"built in {figures['seconds']:.1f} s, {figures['report_bytes'] / 1e6:.2f} MB",
        ],
    )


def _build_report(folder: Path) -> Path:
    from promoe_ds.reports.load.page import write_report
    from promoe_ds.reports.load.run import RunView

    page = folder / "expert_load.html"
    write_report(page, [RunView.open(folder)])
    return page
