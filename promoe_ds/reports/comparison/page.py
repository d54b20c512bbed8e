"""comparison.html from the content of comparison.json, which `comparison` is everywhere here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from promoe_ds.errors import DataError
from promoe_ds.evaluation.grids import as_picture, captioned_grid, make_grid
from promoe_ds.evaluation.images import read_sample_prompts, read_samples
from promoe_ds.evaluation.judges.table import JUDGES, figures_of
from promoe_ds.reports.comparison.charts import charts, running_window
from promoe_ds.reports.page import Page, Part, figures, part
from promoe_ds.reports.theme import png_url

_GRID_COLUMNS, _GRID_PROMPTS, _GRID_ZOOM = 10, 40, 3
#: Column: metric of the results, heading, decimals, factor to its unit. Between them are those of
# the data set's judge.
_FIRST = ("final_loss", "final loss", 4, 1.0)
_LAST = (
    ("load_max_over_mean", "load max/mean", 2, 1.0),
    ("load_entropy", "load entropy", 3, 1.0),
    ("dead_experts", "dead experts", 2, 1.0),
    ("information_group", "expert by group", 3, 1.0),
    ("information_noise", "expert by noise", 3, 1.0),
    ("step_ms", "ms a step", 1, 1.0),
)


def build_page(comparison: Mapping[str, Any], folder: Path) -> Page:
    """Return the page.

    Args:
        folder: of the comparison; samples are taken from its runs.
    """
    entries, settings = comparison["contenders"], comparison["settings"]
    environments, seeds = _environments(entries), settings["seeds"]
    images, window = entries[0]["config"]["train"]["global_batch_size"], running_window(comparison)
    drawn = [[chart] for chart in charts(comparison) if chart is not None]
    running = f", running mean over {window} log lines" if window > 1 else ""
    legend = (
        f"Curves: mean over seeds{running}; bands one standard deviation. Points: one a seed; bar:"
        " their mean; line: one standard deviation."
    )
    return Page(
        "Comparison",
        f"{len(entries)} candidate{'s' if len(entries) > 1 else ''} on {comparison['dataset']}",
        facts=[
            f"{settings['steps']:,} steps of {images} images, seed{'s' if len(seeds) > 1 else ''}"
            f" {', '.join(map(str, seeds))}. All candidates saw the same images in the same order"
            " with the same noise for a given seed."
        ],
        parts=[
            *_warnings(comparison, environments),
            *_tables(entries, comparison["dataset"]),
            *part("heading", text="Figures"),
            *part("figures", items=figures(drawn, [""])),
            *part("text", text=legend if drawn else "No run has a result yet."),
            *_samples(entries, folder, comparison["dataset"]),
            *part("heading", text="How it was measured"),
            *part("terms", items=_terms(comparison, environments)),
            *part("heading", text="Settings"),
            *part("terms", items=_settings(comparison, environments)),
        ],
    )


def _settings(
    comparison: Mapping[str, Any], environments: Sequence[tuple]
) -> list[tuple[str, str]]:
    return [
        *(
            (entry["name"], f"recipe {entry['recipe']}, --set {' '.join(entry['overrides'])}")
            for entry in comparison["contenders"]
        ),
        ("DeepSpeed", comparison["settings"]["deepspeed_config"]),
        *(
            ("versions", ", ".join(map(" ".join, each["versions"].items())))
            for each, _ in environments
        ),
    ]


def _warnings(comparison: Mapping[str, Any], environments: Sequence[tuple]) -> list[Part]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for run in comparison["missing"]:
        by_reason.setdefault((run["contender"], run["reason"]), []).append(str(run["seed"]))
    planned = len(comparison["settings"]["seeds"]) * len(comparison["contenders"])
    missing = part(
        "warning",
        title=f"{len(comparison['missing'])} of {planned} runs are missing.",
        text="Everything below covers the others.",
        items=[
            f"{name}, seed {', '.join(seeds)}: {reason}"
            for (name, reason), seeds in by_reason.items()
        ],
    )
    mixed = part(
        "warning",
        title="Not all runs were made under the same conditions",
        items=[],
        text="(see the end of this page): times a step compare only within one of them.",
    )
    return [*(missing if by_reason else []), *(mixed if len(environments) > 1 else [])]


def _tables(entries: Sequence[Mapping[str, Any]], dataset: str) -> list[Part]:
    judged = [(each.name, each.heading, each.decimals, each.factor) for each in figures_of(dataset)]
    # Summaries of earlier versions lack what was not measured then.
    columns = [
        column
        for column in (_FIRST, *judged, *_LAST)
        if any(entry["summary"].get(column[0]) for entry in entries)
    ]
    headings = ["candidate", *(heading for _, heading, *_ in columns)]
    results: list[list[object]] = [
        [*headings, "parameters, millions active / all", "GFLOP an image", "seeds"]
    ]
    pairs: list[list[object]] = [[*headings, "pairs"]]
    for entry in entries:
        counts = (entry["parameters"][kind] / 1e6 for kind in ("activated", "total"))
        results.append(
            [
                entry["name"],
                *_cells(entry["summary"], columns),
                " / ".join(f"{count:.4g}" for count in counts),
                f"{entry['training_gflops_per_image']:.3g}",
                len(entry["seeds"]),
            ]
        )
        if paired := entry["difference_to_first"]:
            count = max((metric["n"] for metric in paired.values() if metric), default=0)
            pairs.append([entry["name"], *_cells(paired, columns, signed=True), count])
    parts = [
        *part("heading", text="Results"),
        *part("text", text="Mean ± standard deviation over seeds."),
        *part("table", rows=results),
    ]
    if len(entries) == 1:
        return parts
    words = (
        "Mean ± standard deviation of the differences between runs of the same seed. What data"
        " order and noise vary cancels here, so this is the table to judge by."
    )
    return [
        *parts,
        *part("heading", text=f"Difference to {entries[0]['name']}"),
        *part("text", text=words),
        *part("table", rows=pairs),
    ]


def _cells(
    summary: Mapping[str, Any], columns: Sequence[tuple], *, signed: bool = False
) -> list[str]:
    return [
        show(summary.get(metric), decimals, factor, signed=signed)
        for metric, _, decimals, factor in columns
    ]


def show(
    summary: Mapping[str, Any] | None, decimals: int, factor: float, *, signed: bool = False
) -> str:
    """Return `mean ± sd`, the mean alone of one value, a dash of none."""
    if summary is None:
        return "–"
    mean = f"{factor * summary['mean']:{'+' if signed else ''}.{decimals}f}".replace("-", "−")
    return mean if summary["sd"] is None else f"{mean} ± {factor * summary['sd']:.{decimals}f}"


def _samples(entries: Sequence[Mapping[str, Any]], folder: Path, dataset: str) -> list[Part]:
    """Show each candidate's samples of its first seed."""
    found = []
    for entry in entries:
        seed = next(iter(entry["seeds"]), None)
        run_dir = folder / "runs" / f"{entry['name']}-seed{seed}"
        with suppress(DataError):  # not judged, or cleared away
            grid = _grid(run_dir / "samples", entry["config"]["model"])
            found.append((f"{entry['name']}, seed {seed}", png_url(grid), *grid.size))
    judge = JUDGES.get(dataset)
    words = (
        "Each above its prompt, or one row a class. The same noise for every candidate, guidance"
        f" {_guidance(entries)}. {judge.attribution if judge else ''}"
    )
    return [
        *part("heading", text="Samples" if found else ""),
        *part("text", text=words if found else ""),
        *part("pictures", items=found),
    ]


def _grid(samples: Path, model: Mapping[str, Any]) -> Image.Image:
    """Return a few samples, row by row with their prompts, or one row a class.

    Raises: DataError if there are none.
    """
    images, labels = read_samples(samples)
    if model.get("condition") == "text":
        prompts = read_sample_prompts(samples, len(images))
        shown = range(0, len(images), -(-len(images) // _GRID_PROMPTS))
        return captioned_grid(images[shown], [prompts[index] for index in shown])
    columns = min(_GRID_COLUMNS, int(np.bincount(labels).max()))
    return as_picture(make_grid(images, labels, columns=columns, zoom=_GRID_ZOOM))


def _environments(entries: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], list[str]]]:
    """Return the different conditions under which results were made, and the runs of each."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for entry in entries:
        for seed, result in entry["seeds"].items():
            environment = {**result["environment"], "device": result["device"]}
            key = json.dumps(environment, sort_keys=True)
            found.setdefault(key, (environment, []))[1].append(f"{entry['name']}, seed {seed}")
    return list(found.values())


def _guidance(entries: Sequence[Mapping[str, Any]]) -> str:
    scales = {entry["name"]: f"{entry['config']['sampling']['cfg_scale']:g}" for entry in entries}
    if len(set(scales.values())) == 1:
        return next(iter(scales.values()))
    return ", ".join(f"{scale} ({name})" for name, scale in scales.items())


def _terms(comparison: Mapping[str, Any], environments: Sequence[tuple]) -> list[tuple[str, str]]:
    """Return what each figure is, and how it was measured."""
    entries, settings = comparison["contenders"], comparison["settings"]
    judged = {
        "samples": (
            f"{settings['samples']} a run, of the moving-average weights, guidance"
            f" {_guidance(entries)}, noise of seed {settings['sample_seed']}."
        ),
        **{figure.heading: figure.meaning for figure in figures_of(comparison["dataset"])},
    }
    not_judged = {
        "samples": (
            f"Not judged: without downloads only {' and '.join(JUDGES)} can be, and this is"
            f" {comparison['dataset']}."
        )
    }
    has_load = [entry["name"] for entry in entries if entry["summary"]["load_entropy"]]
    dense = [entry["name"] for entry in entries if entry["seeds"] and entry["name"] not in has_load]
    load = {
        "load": (
            "Tokens of each routed expert over the last fifth of the steps, by block; the table"
            " has the mean over blocks. max/mean: 1 is even; entropy: over the logarithm of the"
            " number of experts, 1 is even; dead: experts without a token."
            + (f" No experts: {', '.join(dense)}." if dense else "")
        )
    }
    information = {
        "expert by group, expert by noise": (
            "Mutual information of a token's expert with the class or the group of captions of its"
            " image, and with the noise level, over the entropy of the expert, minus that of"
            " shuffled data; mean over blocks. 0 is chance."
        )
    }
    terms = {
        "final loss": (
            "Mean diffusion loss over the last tenth of the log lines, auxiliary losses left out."
        ),
        **(judged if comparison["judges_images"] else not_judged),
        **(load if has_load else {}),
        **(information if any(e["summary"].get("information_group") for e in entries) else {}),
        "ms a step": (
            "Median over a run's log lines, without the first. It compares what was measured"
            f" alike: {'; '.join(_measured_with(environments))}."
        ),
        "parameters": (
            "Activated: what one conditional token uses. The comparison allowed them to be "
            f"{100 * settings['tolerance']:g} % apart."
        ),
    }
    return list(terms.items())


def _measured_with(environments: Sequence[tuple[dict[str, Any], list[str]]]) -> list[str]:
    return [
        f"{each['jobs']} run{'s' if each['jobs'] > 1 else ''} at a time of {each['ranks']}"
        f" rank{'s' if each['ranks'] > 1 else ''} with one thread each, on"
        f" {each['machine']['cores']} cores of {each['machine']['processor']}, device"
        f" {each['device']}" + (f" ({'; '.join(runs)})" if len(environments) > 1 else "")
        for each, runs in environments
    ]
