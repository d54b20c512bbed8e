"""What the routing statistics cost: their share of a training step, and the report of a long run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from promoe_ds.analysis.benchmarks import BenchmarkResult, interleave, machine_description
from promoe_ds.analysis.benchmarks.layers import mixture_recipe, training_module, training_pass
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.routing.assignment import sum_tokens_by_expert
from promoe_ds.train.routing_log import RoutingAccumulator


@dataclass(frozen=True, kw_only=True)
class MadeUpRun:
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
        random, lines = np.random.default_rng(self.seed), 0
        base_LE = random.dirichlet(np.full(self.experts, 8.0), size=len(self.layers))
        with path.open("w", encoding="utf-8") as file:
            for step in range(self.log_every, self.steps + 1, self.log_every):
                shares_LE = base_LE * np.exp(0.2 * random.standard_normal(base_LE.shape))
                shares_LE[0, 1] *= step < self.steps / 2
                shares_LE[-1, 2] *= 0.02
                shares_LE /= shares_LE.sum(axis=1, keepdims=True)
                tokens_LQE = random.poisson(shares_LE[:, None] * 3000.0, size=(len(self.layers), self.bins, self.experts))
                for row, layer in enumerate(self.layers):
                    file.writelines(self._lines(step, layer, tokens_LQE[row]))
                    lines += self.bins
        return lines

    def _lines(self, step: int, layer: int, tokens_QE: np.ndarray) -> list[str]:
        result, experts = [], self.experts
        for bin_, tokens in enumerate(tokens_QE.tolist()):
            total = sum(tokens)
            line = {"schema": 2, "step": step, "steps": self.log_every, "layer": layer, "timestep_bin": bin_,
                    "timestep_bins": self.bins, "tokens_per_expert": tokens,
                    "gate_sum_per_expert": [round(0.3 * n, 2) for n in tokens], "conditional_tokens": total,
                    "unconditional_tokens": total // 9, "gate_mean": 0.3, "load_max_over_mean": max(tokens) * experts / total,
                    "load_entropy": 0.9, "dead_experts": tokens.count(0), "load_cv": 0.2, "prototype_similarity": -0.08,
                    "layer_bytes_exchanged": 40 * total}
            if bin_ == 0:
                line["layer_detail"] = self._detail(tokens_QE.sum(axis=0))
            result.append(json.dumps(line) + "\n")
        return result

    def _detail(self, tokens_E: np.ndarray) -> dict[str, object]:
        experts = self.experts
        cosines = np.full((experts, experts), -0.08) + 1.08 * np.eye(experts)
        by_rank = tokens_E.reshape(self.ep_size, -1).sum(axis=1)
        names = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")
        return {"passes": self.log_every, "ranks": 2 * self.ep_size, "ep_size": self.ep_size,
                "tokens_per_ep_rank": by_rank.tolist(), "rank_max_over_mean": float(by_rank.max() / by_rank.mean()) + 0.1,
                "exchanges": {name: {"bytes": 1000, "seconds": 0.01} for name in names},
                "prototype_similarity_matrix": cosines.round(4).tolist(), "prototype_to_centroid": [0.7] * experts,
                "prototype_to_other_centroids": [-0.06] * experts}


def benchmark_stats(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> BenchmarkResult:
    """Time all that is done for routing.jsonl against a training step of a recipe, without the optimizer.

    Contenders: `training_step`, forward and backward pass of the whole network with what the plans carry for the log;
    `statistics`, that share of the plans (gates by expert, sums of tokens) once more and counting the pass, tables by class and
    patch included; `statistics_log_line`, reducing and describing an interval, which happens once in train.log_every steps.
    Args:
        tokens: conditional tokens of a pass, a multiple of the recipe's tokens per image.
    """
    config = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    with_tables = config.logging.model_copy(update={"class_counts": True, "position_counts": True, "counts_every": 1})
    one_rank = config.parallel.model_copy(update={"ep_size": 1, "dispatch": "local"})
    config = config.model_copy(update={"logging": with_tables, "parallel": one_rank})
    module, batch = training_module(config, tokens)
    accumulator = RoutingAccumulator(config, module.denoiser, DistributedContext(rank=0, world_size=1, device=torch.device("cpu")))
    plans = module(batch).plans
    ids_BN = torch.randint(config.routing.num_experts, (batch.labels_B.numel(),
                                                        config.model.tokens_per_image * config.routing.top_k))
    gates_BN = torch.rand(ids_BN.shape)
    entering_TD = torch.randn(batch.labels_B.numel() * config.model.tokens_per_image, config.model.hidden_size)

    def _count() -> None:
        for plan in plans.values():
            sum_tokens_by_expert(entering_TD, plan.assignment)
            torch.zeros(plan.stats.gate_sums_BE.shape).scatter_add_(1, ids_BN, gates_BN)
        accumulator.add(plans, batch.sigma_B, batch.labels_B)

    def _line() -> None:
        accumulator.add(plans, batch.sigma_B, batch.labels_B)
        accumulator.reduce(step=1, steps=1)

    contenders = {"training_step": lambda: training_pass(module, batch), "statistics": _count, "statistics_log_line": _line}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        timings = interleave(contenders, rounds=rounds, warmup=1)
    finally:
        dist.destroy_process_group()
    return BenchmarkResult(suite="stats", baseline="training_step", rounds=rounds, timings=timings,
                           settings={"recipe": config.name, "tokens": len(entering_TD), "classes": config.model.num_classes,
                                     "log_every": config.train.log_every})


@dataclass(frozen=True, kw_only=True)
class ReportBenchmark:
    """Seconds to build the report of a long run from its log, and sizes in bytes."""

    log_lines: int
    log_bytes: int
    report_bytes: int
    seconds: float
    settings: dict[str, object]
    machine: dict[str, object] = field(default_factory=machine_description)

    def lines(self) -> list[str]:
        """Return what was measured, for people."""
        return [f"report of {self.settings['steps']:,} steps × {len(self.settings['layers'])} layers × {self.settings['experts']} "
                f"experts × {self.settings['bins']} bins: {self.log_lines:,} lines, {self.log_bytes / 1e6:,.0f} MB",
                f"built in {self.seconds:.1f} s, {self.report_bytes / 1e6:.2f} MB"]


def benchmark_report(run: MadeUpRun, folder: Path) -> ReportBenchmark:
    """Write a long run's log into `folder` and build its report in a process of its own, as the tool does."""
    log = folder / "routing.jsonl"
    log_lines = run.write(log)
    code = ("from pathlib import Path\nfrom promoe_ds.analysis.expert_load.view import RunView\n"
            "from promoe_ds.analysis.expert_load.report import write_report\n"
            f"if __name__ == '__main__':\n    folder = Path({str(folder)!r})\n"
            "    write_report(folder / 'expert_load.html', [RunView.open(folder)])\n")
    script = folder / "build.py"
    script.write_text(code, encoding="utf-8")
    start = time.perf_counter()
    subprocess.run([sys.executable, str(script)], check=True)
    return ReportBenchmark(log_lines=log_lines, log_bytes=log.stat().st_size, seconds=time.perf_counter() - start,
                           report_bytes=(folder / "expert_load.html").stat().st_size, settings=asdict(run))
