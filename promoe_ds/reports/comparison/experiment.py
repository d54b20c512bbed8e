"""One folder, one experiment: later calls keep the settings of the first, and continue it."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from promoe_ds.config import (
    config_from_dict,
    count_parameters,
    training_flops_per_image,
)
from promoe_ds.errors import ConfigError, DataError, TrainingError, differences
from promoe_ds.evaluation.judges.table import JUDGES
from promoe_ds.files import write_json
from promoe_ds.reports.charts import DRAWING, require_libraries
from promoe_ds.reports.comparison.candidates import (
    Candidate,
    ComparisonRequest,
    check_fair,
    check_launch,
    flat_fields,
    load_candidates,
)
from promoe_ds.reports.comparison.results import (
    SCHEMA_VERSION,
    Result,
    metrics_of,
    read_json,
    summarise,
)
from promoe_ds.reports.comparison.runner import PlannedRun, do_all
from promoe_ds.reports.page import write_page
from promoe_ds.versions import processor_name, versions_of

JSON_FILE, HTML_FILE, _LOCK_FILE = "comparison.json", "comparison.html", "lock"
#: Settings that all runs of a folder share; seeds and candidates may be added, jobs and tolerance
#: change nothing.
_SETTLED = ("steps", "samples", "sample_seed", "ranks", "deepspeed")
#: Fields of a result that comparison.json has elsewhere.
_NOT_REPEATED = ("config", "contender", "schema")


def compare(request: ComparisonRequest) -> list[Path]:
    """Train every candidate with every seed, judge, and write comparison.json and comparison.html;
    return their paths.

    All is checked before anything is trained. Runs with a result are not repeated, others resume
    from their checkpoint.
    Raises: ConfigError for what cannot be compared; TrainingError, after the report is written, if
    runs failed.
    """
    candidates = load_candidates(request)
    check_fair(candidates, request.tolerance)
    settings = {
        "steps": request.steps,
        "seeds": list(request.seeds),
        "samples": request.samples,
        "sample_seed": request.sample_seed,
        "ranks": request.ranks,
        "jobs": request.jobs,
        "tolerance": request.tolerance,
        "deepspeed_config": str(request.deepspeed_config),
        "deepspeed": check_launch(request, candidates),
    }
    judge = JUDGES.get(candidates[0].config.data.dataset)
    require_libraries(DRAWING | (judge.libraries if judge else {}))
    with _locked(request.out) as lock:
        runs = [
            PlannedRun(candidate=candidate, seed=seed, root=request.out)
            for seed in request.seeds
            for candidate in candidates
        ]
        check_same_experiment(request.out, settings, runs)
        write = partial(_write, request.out, settings, candidates, runs)
        write({})
        failures = do_all(runs, request, environment_of(request), write, inherited=[lock])
        write(failures, with_report=True)
    if failures:
        reasons = "; ".join(f"{run.label}: {reason}" for run, reason in failures.items())
        raise TrainingError(
            f"{len(failures)} of {len(runs)} runs have no result: {reasons}. The report covers the"
            " others; the same command tries these again"
        )
    return [request.out / JSON_FILE, request.out / HTML_FILE]


def _write(
    folder: Path,
    settings: dict[str, Any],
    candidates: Sequence[Candidate],
    runs: Sequence[PlannedRun],
    failures: dict[PlannedRun, str],
    *,
    with_report: bool = False,
) -> None:
    # Needs libraries of the extra `report`, which were looked for before.
    from promoe_ds.reports.comparison.page import build_page

    try:
        comparison = assemble(settings, candidates, runs, failures)
        write_json(folder / JSON_FILE, comparison)
        if with_report:
            write_page(folder / HTML_FILE, build_page(comparison, folder))
    except (OSError, DataError) as error:
        raise TrainingError(
            f"--out {folder}: the report could not be written: {error}. Free the disk and run the"
            " same command again"
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Lock the folder; children inherit the descriptor, so it stays locked while one of them lives.

    Raises: ConfigError if the folder is another's, or another comparison uses it.
    """
    path = folder / _LOCK_FILE
    try:
        if folder.is_dir() and any(folder.iterdir()) and not path.is_file():
            raise ConfigError(
                f"--out {folder} is not empty and has no comparison: choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("ab")
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"--out {folder}: another comparison, or a run that one left behind, uses it: wait"
                " for it, or end it"
            ) from None
        yield lock.fileno()


def check_same_experiment(
    folder: Path, settings: dict[str, Any], runs: Sequence[PlannedRun]
) -> None:
    """Compare a call with what the folder has already.

    Raises: ConfigError naming every difference.
    """
    pairs = [
        (run.label, read_json(run.result_file)["config"], run.config)
        for run in runs
        if run.result_file.is_file()
    ]
    different: list[str] = []
    if (folder / JSON_FILE).is_file():
        before = read_json(folder / JSON_FILE)
        different = differences(_settled(before["settings"]), _settled(settings))
        saved = {entry["name"]: entry["config"] for entry in before["contenders"]}
        pairs += [
            (run.candidate.name, saved[run.candidate.name], run.candidate.config)
            for run in runs
            if run.candidate.name in saved and run.seed == runs[0].seed
        ]
    for name, config, current in pairs if not different else ():  # steps are in every config
        fields = flat_fields(config_from_dict(config, source=f"{folder}: {name}"))
        different += [f"{name}: {each}" for each in differences(fields, flat_fields(current))]
    if different:
        raise ConfigError(
            f"--out {folder} has another experiment: {'; '.join(different)}. Use another folder"
        )


def _settled(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what all runs of a folder share; how much travels at a time is no part of it."""
    settled = {name: settings[name] for name in _SETTLED}
    zero = settled["deepspeed"].get("zero_optimization", {})
    kept = {name: value for name, value in zero.items() if name != "reduce_bucket_size"}
    return settled | {"deepspeed": settled["deepspeed"] | {"zero_optimization": kept}}


def assemble(
    settings: dict[str, Any],
    candidates: Sequence[Candidate],
    runs: Sequence[PlannedRun],
    failures: dict[PlannedRun, str],
) -> dict[str, Any]:
    """Return the content of comparison.json from the results that are there."""
    results: dict[str, dict[int, Result]] = {candidate.name: {} for candidate in candidates}
    missing: list[dict[str, Any]] = []
    for run in runs:
        if run.result_file.is_file():
            result = read_json(run.result_file).items()
            kept = {name: value for name, value in result if name not in _NOT_REPEATED}
            results[run.candidate.name][run.seed] = kept
        else:
            reason = failures.get(run, "not finished yet")
            missing.append({"contender": run.candidate.name, "seed": run.seed, "reason": reason})
    baseline, dataset = results[candidates[0].name], candidates[0].config.data.dataset
    return {
        "schema": SCHEMA_VERSION,
        "settings": settings,
        "dataset": dataset,
        "judges_images": dataset in JUDGES,
        "missing": missing,
        "contenders": [_describe(each, results[each.name], baseline) for each in candidates],
    }


def _describe(
    candidate: Candidate, results: dict[int, Result], baseline: dict[int, Result]
) -> dict[str, Any]:
    count = count_parameters(candidate.config)
    metrics = metrics_of(candidate.config.data.dataset)
    return {
        "name": candidate.name,
        "recipe": candidate.recipe,
        "overrides": list(candidate.overrides),
        "parameters": {"total": count.total, "activated": count.activated},
        "training_gflops_per_image": training_flops_per_image(candidate.config) / 1e9,
        "summary": summarise(results, metrics),
        "difference_to_first": (
            None if results is baseline else summarise(results, metrics, baseline)
        ),
        "seeds": {str(seed): result for seed, result in sorted(results.items())},
        "config": candidate.config.model_dump(mode="json"),
    }


def environment_of(request: ComparisonRequest) -> dict[str, Any]:
    """Return what times depend on; every result holds what it was made under."""
    return {
        "jobs": request.jobs,
        "ranks": request.ranks,
        "versions": versions_of("deepspeed"),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "system": platform.system(),
        },
    }
