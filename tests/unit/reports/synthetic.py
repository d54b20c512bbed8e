"""Made-up results of a comparison: what comparison.json holds, without any training."""

from __future__ import annotations

import math
from typing import Any

from promoe_ds.config import count_parameters, load_config, training_flops_per_image
from promoe_ds.evaluation.judges.table import JUDGES
from promoe_ds.reports.comparison.results import metrics_of, summarise

ENVIRONMENT = {
    "jobs": 2,
    "ranks": 1,
    "versions": {"promoe_ds": "0.1.0", "torch": "2.13.0"},
    "machine": {"processor": "a processor", "cores": 2, "system": "Linux"},
}


def synthetic_result(
    seed: int, quality: float = 0.0, *, experts: bool = True, images: bool = True, points: int = 40
) -> dict[str, Any]:
    """Return one run's result; a larger `quality` gives a lower loss."""
    curve = [
        [
            10 * (i + 1),
            0.4 - 0.02 * quality + 1.2 * math.exp(-i / 8) + 0.03 * math.sin(7 * i + seed),
        ]
        for i in range(points)
    ]
    layers = (
        [
            {
                "layer": layer,
                "max_over_mean": 1.2 + 0.1 * layer - 0.05 * quality + 0.02 * seed,
                "entropy": 0.97,
                "dead_experts": 0,
                "shares": [0.25] * 4,
            }
            for layer in (1, 3, 5)
        ]
        if experts
        else None
    )
    judged = {
        "samples": 500,
        "accuracy": 0.95 + 0.01 * quality - 0.002 * seed,
        "accuracy_by_class": {},
        "accuracy_on_real": 0.992,
        "frechet": 0.4 - 0.05 * quality + 0.01 * seed,
        "frechet_of_training_digits": 0.09,
        "frechet_of_noise": 9.9,
    }
    return {
        "seed": seed,
        "samples": 500,
        "sample_seed": 0,
        "environment": ENVIRONMENT,
        "device": "cpu",
        "checkpoint_step": 400,
        "final_loss": sum(value for _, value in curve[-4:]) / 4,
        "heldout_loss": 0.45 - 0.02 * quality + 0.001 * seed if images else None,
        "frechet": judged["frechet"] if images else None,
        "accuracy": judged["accuracy"] if images else None,
        "images": judged if images else None,
        "load_max_over_mean": 1.5 if experts else None,
        "load_entropy": 0.97 if experts else None,
        "dead_experts": 0.0 if experts else None,
        "information_group": 0.2 if experts else None,
        "information_noise": 0.1 if experts else None,
        "layers": layers,
        "step_ms": 80.0 + 5 * quality + seed,
        "loss_curve": curve,
    }


def synthetic_comparison(
    candidates: dict[str, dict[int, dict[str, Any]]],
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    dataset: str = "digits",
) -> dict[str, Any]:
    """Return a comparison of results by candidate and seed; runs without a result are stated as
    missing.
    """
    config = load_config("digits_promoe", ["parallel.ep_size=1"])
    count = count_parameters(config)
    first, metrics = next(iter(candidates)), metrics_of(dataset)
    entries = [
        {
            "name": name,
            "recipe": "digits_promoe",
            "overrides": ["parallel.ep_size=1"],
            "config": config.model_dump(mode="json"),
            "parameters": {"total": count.total, "activated": count.activated},
            "summary": summarise(results, metrics),
            "training_gflops_per_image": training_flops_per_image(config) / 1e9,
            "difference_to_first": (
                None if name == first else summarise(results, metrics, candidates[first])
            ),
            "seeds": {str(seed): result for seed, result in results.items()},
        }
        for name, results in candidates.items()
    ]
    return {
        "schema": 1,
        "dataset": dataset,
        "judges_images": dataset in JUDGES,
        "contenders": entries,
        "settings": {
            "steps": 400,
            "seeds": list(seeds),
            "samples": 500,
            "sample_seed": 0,
            "ranks": 1,
            "jobs": 2,
            "tolerance": 0.05,
            "deepspeed_config": "ds_configs/zero2_fp32.json",
            "deepspeed": {},
        },
        "missing": [
            {
                "contender": name,
                "seed": seed,
                "reason": "training ended with exit code 5; log: somewhere.log",
            }
            for name, results in candidates.items()
            for seed in seeds
            if seed not in results
        ],
    }
