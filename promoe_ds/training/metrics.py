"""What a run records: metrics.jsonl, routing.jsonl, trackers, the progress line. Rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from mmap import MAP_PRIVATE, PROT_READ, mmap
from pathlib import Path
from typing import Any

import torch

from promoe_ds.backends.devices import find_device
from promoe_ds.config import RunConfig, training_flops_per_image
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import CheckpointError
from promoe_ds.files import json_text
from promoe_ds.logs import duration, get_logger
from promoe_ds.training.trackers import Trackers, open_trackers

_LOG = get_logger("metrics")


class MetricsWriter:
    """Writes one line per log step, on rank 0; on the other ranks it does nothing."""

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        context: DistributedContext,
        *,
        start_step: int,
        wandb_id: str = "",
    ) -> None:
        """Open the files; lines of steps after `start_step`, left by an interrupted process, are
        dropped.

        Raises: ConfigError if a tracker is asked for and missing; CheckpointError if a log cannot
        be written.
        """
        self._config, self._context, self._run_dir = config, context, run_dir
        self._flops = training_flops_per_image(config)
        self._peak = _peak_flops(context.device)
        self._step, self._since = start_step, time.perf_counter()
        self._trackers = Trackers({})
        if not context.is_main:
            return
        for name in ("metrics.jsonl", "routing.jsonl"):
            drop_lines_after(run_dir / name, start_step)
        self._trackers = open_trackers(config, run_dir, start_step, wandb_id)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens meanwhile, an evaluation or a checkpoint, out of the speed of
        training.
        """
        since = time.perf_counter()
        yield
        self._since += time.perf_counter() - since

    def write(
        self, step: int, scalars: dict[str, float], routing_lines: list[dict[str, Any]]
    ) -> None:
        """Record a log step.

        Args:
            step: steps finished.
            scalars: loss, its terms, lr, grad_norm, and what an evaluation found.
            routing_lines: of `RoutingAccumulator.reduce`.
        """
        now, batch = time.perf_counter(), self._config.train.global_batch_size
        images_per_second = (step - self._step) * batch / (now - self._since)
        self._step, self._since = step, now
        if not self._context.is_main:
            return
        flops = images_per_second * self._flops
        line = {
            "step": step,
            **scalars,
            "images_per_second": images_per_second,
            "tflops": flops / 1e12,
            "mfu": flops / (self._peak * self._context.world_size) if self._peak else None,
            **_memory(self._context.device),
        }
        append_lines(self._run_dir / "metrics.jsonl", [line])
        append_lines(self._run_dir / "routing.jsonl", routing_lines)
        self._trackers.write(step, line, routing_lines)
        terms = "  ".join(
            f"{name} {value:.4f}"
            for name, value in scalars.items()
            if name.startswith("loss") or name == "frechet_distance"
        )
        left = (self._config.train.max_steps - step) * batch / images_per_second
        _LOG.info(
            "step %d/%d  %s  grad_norm %.3f  lr %.2e  %.0f images/s  %s left",
            step,
            self._config.train.max_steps,
            terms,
            scalars["grad_norm"],
            scalars["lr"],
            images_per_second,
            duration(left),
        )

    def close(self) -> None:
        """Flush and close."""
        self._trackers.close()


def append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append objects to a JSON-lines file; NaN and infinities become null.

    Raises: CheckpointError naming the file and why it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json_text(line) + "\n" for line in lines)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error.strerror}): free or enlarge the disk, then resume"
            " with --resume auto"
        ) from None


def drop_lines_after(path: Path, step: int) -> None:
    """Cut off the lines of steps after `step`, and broken ones among them.

    Steps only grow in a log, so it is read from its end, back to the newest line that stays: a
    resume takes no longer and no more memory however long the run has been.
    Raises: CheckpointError if it cannot be read or written.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        with path.open("r+b") as file:
            with mmap(file.fileno(), 0, flags=MAP_PRIVATE, prot=PROT_READ) as log:
                end = _end_of_step(path, log, step)
                is_cut = end > 0 and log[end - 1 : end] != b"\n"
            file.truncate(end)
            file.seek(end)
            file.write(b"\n" if is_cut else b"")
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error.strerror}): correct its rights, or free the disk"
        ) from None


def _end_of_step(path: Path, log: mmap, step: int) -> int:
    """Return where the newest line of a step up to `step` ends, 0 if there is none."""
    end = len(log)
    while end:
        start = log.rfind(b"\n", 0, end - 1) + 1
        try:
            if json.loads(log[start:end])["step"] <= step:
                break
        except (ValueError, KeyError, TypeError):
            _LOG.warning("%s: dropped a broken line at byte %d", path, start)
        end = start
    return end


def _memory(device: torch.device) -> dict[str, float]:
    gigabytes = {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if device.type == "cuda":
        gigabytes["device_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return gigabytes


def _peak_flops(device: torch.device) -> float | None:
    found = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return found.flops["bf16"] if found else None
