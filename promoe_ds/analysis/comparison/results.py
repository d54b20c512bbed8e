"""A run's figures, read from what training and judging left, and their statistics over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promoe_ds.analysis.expert_load import LayerLoad, read_routing_log, summarise_load
from promoe_ds.config import RunConfig
from promoe_ds.errors import DataError

#: Of result.json and comparison.json; docs/comparison_format.md describes both.
SCHEMA_VERSION = 1
RESULT_FILE = "result.json"
JUDGEMENT_FILE = "judgement.json"
#: Data sets whose samples `evaluation` can judge without downloads.
JUDGED_DATASETS = {"digits"}
#: The figures that are summarised over seeds, in the order of the report.
METRICS = ("final_loss", "heldout_loss", "frechet", "accuracy", "load_max_over_mean", "load_entropy", "dead_experts", "step_ms")
_FINAL_SHARE_OF_LINES = 0.1
_LOAD_SHARE_OF_STEPS = 0.2

Result = dict[str, Any]


def collect_result(run_dir: Path, config: RunConfig) -> Result:
    """Read one finished run's figures; those that it has none of are None.

    Raises: DataError if a file is missing or damaged, or the training did not reach its last step.
    """
    judgement = read_json(run_dir / JUDGEMENT_FILE, has_schema=False)
    if judgement["checkpoint_step"] != config.train.max_steps:
        raise DataError(f"{run_dir}: the newest checkpoint is of step {judgement['checkpoint_step']}, not of the last one, "
                        f"{config.train.max_steps}")
    lines = read_metrics(run_dir / "metrics.jsonl")
    images = judgement["images"]
    return {
        "final_loss": final_loss(lines), "heldout_loss": judgement["heldout_loss"],
        "frechet": images and images["frechet"], "accuracy": images and images["accuracy"],
        **_load_figures(run_dir, config), "step_ms": step_milliseconds(lines, config.train.global_batch_size),
        "checkpoint_step": judgement["checkpoint_step"], "device": judgement["device"], "images": images,
        "loss_curve": [[line["step"], line["loss_diffusion"]] for line in lines],
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl whose diffusion loss is finite, a last one cut off left out.

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
    return lines


def final_loss(lines: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean diffusion loss over the last tenth of the log lines, at least one."""
    count = max(1, round(_FINAL_SHARE_OF_LINES * len(lines)))
    return statistics.fmean(line["loss_diffusion"] for line in lines[-count:])


def step_milliseconds(lines: Sequence[Mapping[str, Any]], global_batch_size: int) -> float | None:
    """Return the median wall time of a step over the log lines after the first, which includes starting up."""
    times = [1e3 * global_batch_size / line["images_per_second"] for line in lines[1:] if line.get("images_per_second")]
    return statistics.median(times) if times else None


def _load_figures(run_dir: Path, config: RunConfig) -> Result:
    if not config.moe_block_indices:
        return {"load_max_over_mean": None, "load_entropy": None, "dead_experts": None, "layers": None}
    last_steps = max(1, math.ceil(_LOAD_SHARE_OF_STEPS * config.train.max_steps))
    layers = [describe_layer(load) for load in summarise_load(read_routing_log(run_dir), last_steps=last_steps)]
    return {"layers": layers, "load_max_over_mean": _mean_of(layers, "max_over_mean"), "load_entropy": _mean_of(layers, "entropy"),
            "dead_experts": _mean_of(layers, "dead_experts")}


def describe_layer(load: LayerLoad) -> dict[str, Any]:
    """Return a layer's evenness over the tokens of all the steps that `load` sums."""
    used = any(load.tokens_per_expert)
    return {"layer": load.layer, "max_over_mean": load.max_over_mean if used else None, "entropy": load.entropy if used else None,
            "dead_experts": load.tokens_per_expert.count(0), "shares": load.shares}


def _mean_of(layers: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [layer[name] for layer in layers if layer[name] is not None]
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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it, and the same command makes it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: is no JSON object; remove it, and the same command makes it again")
    if has_schema and value.get("schema") != SCHEMA_VERSION:
        raise DataError(f"{path}: format {value.get('schema')} is not {SCHEMA_VERSION}; remove it, and the same command makes it "
                        "again")
    return value


def describe(values: Sequence[float]) -> dict[str, Any]:
    """Return number, mean, sample standard deviation (n - 1; None of one value), smallest and largest."""
    return {"n": len(values), "mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            "min": min(values), "max": max(values)}


def summarise(results: Mapping[int, Result]) -> dict[str, dict[str, Any] | None]:
    """Describe every metric over the seeds that have it; None where none has.

    Args:
        results: by seed.
    """
    columns = {metric: [result[metric] for result in results.values() if result.get(metric) is not None] for metric in METRICS}
    return {metric: describe(values) if values else None for metric, values in columns.items()}


def paired_differences(results: Mapping[int, Result], baseline: Mapping[int, Result]) -> dict[str, dict[str, Any] | None]:
    """Describe every metric's difference to the baseline's run of the same seed, over the seeds that both have.

    Runs of one seed share data order, noise and label dropout: what these vary cancels in the difference.
    """
    differences: dict[str, dict[str, Any] | None] = {}
    for metric in METRICS:
        values = [results[seed][metric] - baseline[seed][metric] for seed in results if seed in baseline
                  and results[seed].get(metric) is not None and baseline[seed].get(metric) is not None]
        differences[metric] = describe(values) if values else None
    return differences
