"""A run's figures, read from what training and judging left, and their statistics over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.config import RunConfig
from promoe_ds.errors import DataError
from promoe_ds.load_stats import entropy, max_over_mean, shares
from promoe_ds.reports.log import load_log

#: Of result.json and comparison.json; docs/comparison_format.md describes both.
SCHEMA_VERSION = 1
JUDGEMENT_FILE = "judgement.json"
#: Data sets whose samples `evaluation` can judge without downloads.
JUDGED_DATASETS = {"digits"}
#: The figures that are summarised over seeds, in the order of the report.
METRICS = (
    "final_loss",
    "heldout_loss",
    "frechet",
    "accuracy",
    "load_max_over_mean",
    "load_entropy",
    "dead_experts",
    "step_ms",
)
_FINAL_SHARE_OF_LINES = 0.1
_LOAD_SHARE_OF_STEPS = 0.2

Result = dict[str, Any]
Summary = dict[str, dict[str, Any] | None]


def collect_result(run_dir: Path, config: RunConfig) -> Result:
    """Read one finished run's figures; those that it has none of are None.

    Raises: DataError if a file is missing or damaged, or the training did not reach its last step.
    """
    judgement = read_json(run_dir / JUDGEMENT_FILE, has_schema=False)
    step, images = judgement["checkpoint_step"], judgement["images"]
    if step != config.train.max_steps:
        raise DataError(
            f"{run_dir}: the newest checkpoint is of step {step}, not of the last one,"
            f" {config.train.max_steps}"
        )
    curve, times = read_metrics(run_dir / "metrics.jsonl", config.train.global_batch_size)
    last = max(1, round(_FINAL_SHARE_OF_LINES * len(curve)))
    layers = load_by_layer(run_dir, config) if config.moe_block_indices else None
    return {
        "final_loss": statistics.fmean(loss for _, loss in curve[-last:]),
        "heldout_loss": judgement["heldout_loss"],
        "frechet": images and images["frechet"],
        "accuracy": images and images["accuracy"],
        "layers": layers,
        **{
            f"load_{name}" if name != "dead_experts" else name: _mean(layers, name)
            for name in ("max_over_mean", "entropy", "dead_experts")
        },
        "step_ms": statistics.median(times) if times else None,
        "checkpoint_step": step,
        "device": judgement["device"],
        "images": images,
        "loss_curve": curve,
    }


def read_metrics(path: Path, global_batch_size: int) -> tuple[list[list[float]], list[float]]:
    """Return a metrics.jsonl's finite diffusion losses by step, and milliseconds a step without the
    first line, which includes starting up. A last line that is cut off is left out.

    Raises: DataError naming the file.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            if number < len(texts):
                raise DataError(f"{path}, line {number}: not JSON") from None
    lines = [line for line in lines if line.get("loss_diffusion") is not None]
    if not lines:
        raise DataError(f"{path}: no line with a finite loss_diffusion")
    times = [
        1e3 * global_batch_size / line["images_per_second"]
        for line in lines[1:]
        if line.get("images_per_second")
    ]
    return [[line["step"], line["loss_diffusion"]] for line in lines], times


def load_by_layer(run_dir: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Return each layer's evenness over the tokens of the last fifth of the steps.

    Raises: DataError without a routing log.
    """
    log = load_log(run_dir)
    window = log.window(max(1, math.ceil(_LOAD_SHARE_OF_STEPS * config.train.max_steps)))
    tokens_LE = log.tokens_TLE[window].sum(axis=0)
    columns = zip(
        log.layers,
        max_over_mean(tokens_LE),
        entropy(tokens_LE),
        tokens_LE,
        shares(tokens_LE),
        strict=True,
    )
    return [
        {
            "layer": layer,
            "max_over_mean": float(uneven) if tokens_E.any() else None,
            "entropy": float(evenness) if tokens_E.any() else None,
            "dead_experts": int((tokens_E == 0).sum()),
            "shares": np.nan_to_num(part_E).tolist(),
        }
        for layer, uneven, evenness, tokens_E, part_E in columns
    ]


def _mean(layers: Sequence[Mapping[str, Any]] | None, name: str) -> float | None:
    values = [layer[name] for layer in layers or () if layer[name] is not None]
    return statistics.fmean(values) if values else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one move, so that an interruption leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path, *, has_schema: bool = True) -> dict[str, Any]:
    """Read a JSON object that this package wrote.

    Raises: DataError naming the file, also if it is of another version of the format.
    """
    remedy = "remove it, and the same command makes it again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: is no JSON object; {remedy}")
    if has_schema and value.get("schema") != SCHEMA_VERSION:
        raise DataError(f"{path}: format {value.get('schema')} is not {SCHEMA_VERSION}; {remedy}")
    return value


def describe(values: Sequence[float]) -> dict[str, Any] | None:
    """Return number, mean, sample standard deviation (n - 1; None of one value), smallest and
    largest; None of no value.
    """
    if not values:
        return None
    return {
        "n": len(values),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


def summarise(results: Mapping[int, Result]) -> Summary:
    """Describe every metric over the seeds that have it; None if none has.

    Args:
        results: by seed.
    """
    return {
        metric: describe(
            [result[metric] for result in results.values() if result.get(metric) is not None]
        )
        for metric in METRICS
    }


def paired_differences(results: Mapping[int, Result], baseline: Mapping[int, Result]) -> Summary:
    """Describe every metric's difference to the baseline's run of the same seed, over the seeds
    that both have.

    Runs of one seed share data order, noise and label dropout: what these vary cancels in the
    difference.
    """
    pairs = [(result, baseline[seed]) for seed, result in results.items() if seed in baseline]
    return {
        metric: describe(
            [
                mine[metric] - base[metric]
                for mine, base in pairs
                if mine.get(metric) is not None and base.get(metric) is not None
            ]
        )
        for metric in METRICS
    }
