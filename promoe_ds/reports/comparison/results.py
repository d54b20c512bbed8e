"""A run's figures, read from what training and judging left, and their statistics over seeds.

Of comparison.json: `settings` are those of the newest call; `missing` lists runs without a result
(`contender`, `seed`, `reason`); `contenders` are the candidates in the order of the command line,
the first is the baseline. A candidate has `name`, `recipe`, `overrides`, `config` (with train.seed
0), `parameters` (`total`, and `activated`, which one conditional token uses),
`training_gflops_per_image` (10⁹ operations, forward and backward), `seeds` (a result each),
`summary` (by metric `n`, `mean`, `sd` over n - 1, `min`, `max`) and `difference_to_first` (the same
of the differences to the baseline's run of the same seed). A result, also kept as result.json, has
the metrics of `metrics_of`, `loss_curve` (pairs of step and loss_diffusion), `layers` (loads by MoE
block), `images` (the judge's whole report), `checkpoint_step` and `environment`: times compare
between equal ones only. What there is none of is null.

Metrics: `final_loss`, mean over the last tenth of the log lines; `heldout_loss` of the averaged
weights on images never trained on, each under its own condition, equal noise for all; those of
samples by the data set's judge; loads of the last fifth of the steps, averaged over MoE blocks;
`information_...`, what class or group of captions, and noise level, say of a token's expert beyond
chance, of 128 training images; `step_ms`, median wall time of a step after the first log line.
"""

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
from promoe_ds.evaluation.judges.table import figures_of
from promoe_ds.load_stats import entropy, max_over_mean, shares
from promoe_ds.reports.log import load_log
from promoe_ds.reports.records import Metrics, read_lines

#: Of result.json and comparison.json.
SCHEMA_VERSION = 1
JUDGEMENT_FILE = "judgement.json"
#: What the experts are chosen by: the judgement's entry by the metric's name.
INFORMATION = {"information_group": "group", "information_noise": "noise level"}
_FINAL_SHARE_OF_LINES = 0.1
_LOAD_SHARE_OF_STEPS = 0.2

Result = dict[str, Any]
Summary = dict[str, dict[str, Any] | None]


def metrics_of(dataset: str) -> tuple[str, ...]:
    """Return the metrics that are summarised over seeds, in the order of the report."""
    of_images = (figure.name for figure in figures_of(dataset))
    of_experts = ("load_max_over_mean", "load_entropy", "dead_experts", *INFORMATION)
    return ("final_loss", *of_images, *of_experts, "step_ms")


def collect_result(run_dir: Path, config: RunConfig) -> Result:
    """Read one finished run's figures; those that it has none of are None.

    Raises: DataError if a file is missing or damaged, or the training did not reach its last step.
    """
    judgement = read_json(run_dir / JUDGEMENT_FILE, has_schema=False)
    step, images = judgement["checkpoint_step"], judgement["images"]
    judged, information = {**(images or {}), **judgement}, judgement["information"] or {}
    if step != config.train.max_steps:
        raise DataError(
            f"{run_dir}: the newest checkpoint is of step {step}, not of the last one,"
            f" {config.train.max_steps}: train it to its end"
        )
    curve, times = read_metrics(run_dir / "metrics.jsonl", config.train.global_batch_size)
    last = max(1, round(_FINAL_SHARE_OF_LINES * len(curve)))
    layers = load_by_layer(run_dir, config) if config.moe_block_indices else None
    return {
        "final_loss": statistics.fmean(loss for _, loss in curve[-last:]),
        **{figure.name: judged[figure.name] for figure in figures_of(config.data.dataset)},
        "layers": layers,
        "load_max_over_mean": _mean(layers, "max_over_mean"),
        "load_entropy": _mean(layers, "entropy"),
        "dead_experts": _mean(layers, "dead_experts"),
        **{metric: information.get(kind) for metric, kind in INFORMATION.items()},
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
    lines = []
    for number, _, line, problem in read_lines(path, kind=Metrics):
        if problem:
            raise DataError(f"{path}: line {number}: {problem}")
        if line is not None and line.loss_diffusion is not None:
            lines.append(line)
    if not lines:
        raise DataError(f"{path}: no line with a finite loss_diffusion")
    speeds = [line.images_per_second for line in lines[1:] if line.images_per_second]
    return [[line.step, line.loss_diffusion] for line in lines], [
        1e3 * global_batch_size / speed for speed in speeds
    ]


def load_by_layer(run_dir: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Return each layer's evenness over the tokens of the last fifth of the steps.

    Raises: DataError without a routing log.
    """
    log = load_log(run_dir)
    window = log.window(max(1, math.ceil(_LOAD_SHARE_OF_STEPS * config.train.max_steps)))
    return [
        {
            "layer": layer,
            "max_over_mean": float(max_over_mean(tokens_E)) if tokens_E.any() else None,
            "entropy": float(entropy(tokens_E)) if tokens_E.any() else None,
            "dead_experts": int((tokens_E == 0).sum()),
            "shares": np.nan_to_num(shares(tokens_E)).tolist(),
        }
        for layer, tokens_E in zip(log.layers, log.tokens_TLE[window].sum(axis=0), strict=True)
    ]


def _mean(layers: Sequence[Mapping[str, Any]] | None, name: str) -> float | None:
    values = [layer[name] for layer in layers or () if layer[name] is not None]
    return statistics.fmean(values) if values else None


def read_json(path: Path, *, has_schema: bool = True) -> dict[str, Any]:
    """Read a JSON object that this package wrote.

    Raises: DataError naming the file, also if it is of another version of the format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if has_schema and value.get("schema") != SCHEMA_VERSION:
            raise ValueError(f"format {value.get('schema')} is not {SCHEMA_VERSION}")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); remove it, and the same command makes it again"
        ) from None
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


def summarise(
    results: Mapping[int, Result],
    metrics: Sequence[str],
    baseline: Mapping[int, Result] | None = None,
) -> Summary:
    """Describe every metric over the seeds that have it; None if none has.

    Runs of one seed share data order, noise and label dropout: what these vary cancels in the
    difference to a baseline's run of the same seed.
    Args:
        results: by seed; baseline: describe the differences to these results, over the seeds that
        both have.
    """
    nothing = dict.fromkeys(metrics, 0)
    pairs = [
        (result, nothing if baseline is None else baseline[seed])
        for seed, result in results.items()
        if baseline is None or seed in baseline
    ]
    return {
        metric: describe(
            [
                mine[metric] - base[metric]
                for mine, base in pairs
                if mine.get(metric) is not None and base.get(metric) is not None
            ]
        )
        for metric in metrics
    }
