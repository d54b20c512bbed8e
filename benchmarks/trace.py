"""What a GPU would be asked to do in a training step, and a prediction of its time: no GPU needed.

The step runs on fake CUDA tensors in a process of its own (`benchmarks.fake_cuda`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fake_cuda.device import build_guard
from benchmarks.timing import Result
from promoe_ds.config import DS_CONFIGS_DIR
from promoe_ds.errors import ConfigError, TrainingError

_ROOT = Path(__file__).resolve().parents[1]
ZERO_2_BF16 = DS_CONFIGS_DIR / "zero2_bf16.json"
_GIGA, _TERA = 1e9, 1e12


def trace(
    requests: Sequence[dict[str, Any]],
    library: Path,
    folder: Path,
    *,
    process: Sequence[str] = ("benchmarks.fake_cuda",),
) -> list[dict[str, Any]]:
    """Trace each request (`recipe`; `overrides`, `world_size`, `deepspeed`, `depth` if needed)
    in one other process.

    Args:
        library: from `build_guard`; folder: for the process's files.
        process: the module that traces, and arguments of its own.
    Returns: for each, what `fake_cuda.step.trace_step` found; or `refused`, the reason of a recipe
    that this installation cannot run; or `failed`, the traceback.
    Raises: TrainingError if the process ends without an answer.
    """
    defaults = {"overrides": [], "world_size": 1, "deepspeed": str(ZERO_2_BF16)}
    asked, answer = folder / "requests.json", folder / "answers.json"
    asked.write_text(json.dumps([defaults | one for one in requests]), encoding="utf-8")
    answer.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", *process, library, asked, answer],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if not answer.is_file():
        raise TrainingError(f"tracing ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(answer.read_text(encoding="utf-8"))


def benchmark_trace(
    recipe: str, overrides: Sequence[str], *, ranks: int, deepspeed: Path | None = None
) -> Result:
    """Trace one step of a recipe on rank 0 of `ranks` H100 that do not exist.

    Raises: ConfigError without a compiler, or for a recipe that cannot be traced here;
    TrainingError for a step that fails.
    """
    request = {"recipe": recipe, "overrides": list(overrides), "world_size": ranks}
    if deepspeed is not None:
        request["deepspeed"] = str(deepspeed)
    with tempfile.TemporaryDirectory() as folder:
        (found,) = trace([request], build_guard(Path(folder)), Path(folder))
    if "refused" in found:
        raise ConfigError(found["refused"])
    if "failed" in found:
        raise TrainingError(f"the step of {recipe} fails on fake tensors:\n{found['failed']}")
    settings = {
        key: found.pop(key) for key in ("recipe", "overrides", "world_size", "images", "parameters")
    }
    return Result(suite="trace", settings=settings, figures=found, text=_lines(found))


def _lines(found: dict[str, Any]) -> list[str]:
    """Return a trace as tables for a reader."""
    rows = [*found["categories"].items(), ("total", found["totals"])]
    lines = [
        "predicted from shares of an H100's peaks, not measured; no collective counted",
        f"{'':40}{'ms':>9}{'%':>7}{'kernels':>9}{'GB':>9}{'TFLOP':>9}",
    ]
    lines += [
        f"{name:40}{one['ms']:>9.2f}{100 * one['ms'] / found['totals']['ms']:>7.1f}"
        f"{one['kernels']:>9}{one['bytes'] / _GIGA:>9.2f}{one['flops'] / _TERA:>9.2f}"
        for name, one in rows
    ]
    for title, key, label in (
        ("host reads of the device", "host_reads", None),
        ("waits of the host", "waits", "for"),
        ("copies", "copies", "way"),
    ):
        lines += ["", f"{title}: {sum(one['count'] for one in found[key])}"]
        lines += [
            f"{one['count']:>6}  {f'{one[label]}: ' if label else ''}{one['line']}  {one['place']}"
            for one in found[key]
        ]
    lines += ["", f"collectives: {sum(one['count'] for one in found['collectives'])}"]
    lines += [
        f"{one['count']:>6}  {one['name']} of {one['bytes']:,} bytes over {one['ranks']} ranks: "
        f"{one['place']}"
        for one in found["collectives"]
    ]
    lines += ["", f"events left unread: {found['events_unread']}"]
    lines += [f"without a gradient: {name}" for name in found["without_gradient"]]
    return lines
