"""TensorBoard and Weights & Biases: the same scalars and load histograms to either, where asked
for.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.checkpoint.manifest import WANDB_ID, read_wandb_id
from promoe_ds.config import RunConfig
from promoe_ds.errors import ConfigError
from promoe_ds.load_stats import max_over_mean, variation
from promoe_ds.logs import get_logger

_LOG = get_logger("metrics")


class Trackers:
    """Those of a run; one that raises is given up with a warning: no record is worth a training."""

    def __init__(self, trackers: dict[str, _TensorBoard | _Wandb]) -> None:
        """Write to trackers, by name."""
        self._trackers = trackers

    def write(self, step: int, line: dict[str, Any], routing_lines: list[dict[str, Any]]) -> None:
        """Record a log step: its line of metrics.jsonl, its lines of routing.jsonl."""
        self._try_each(lambda tracker: tracker.write(step, *flatten(line, routing_lines)))

    def close(self) -> None:
        """Flush and close."""
        self._try_each(lambda tracker: tracker.close())

    def _try_each(self, action: Callable[[_TensorBoard | _Wandb], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                _warn(name, error)


def open_trackers(
    config: RunConfig, run_dir: Path, start_step: int, wandb_id: str = ""
) -> Trackers:
    """Return the trackers that a run asks for; one that cannot start is left out with a warning.

    Args:
        wandb_id: of the checkpoint that the run resumes from, "" where there is none.
    Raises: ConfigError if one is asked for and its library is missing.
    """
    openers: dict[str, Callable[[], _TensorBoard | _Wandb | None]] = {
        "TensorBoard": lambda: _open_tensorboard(config, run_dir, start_step),
        "Weights & Biases": lambda: (
            _Wandb(config, run_dir, wandb_id) if config.logging.wandb else None
        ),
    }
    trackers: dict[str, _TensorBoard | _Wandb] = {}
    for name, opener in openers.items():
        try:
            if (tracker := opener()) is not None:
                trackers[name] = tracker
        except ConfigError:
            raise
        except Exception as error:
            _warn(name, error)
    return Trackers(trackers)


def _warn(name: str, error: Exception) -> None:
    _LOG.warning(
        "%s fails (%s: %s): it records nothing more, training continues",
        name,
        type(error).__name__,
        error,
    )


def flatten(
    line: dict[str, Any], routing_lines: list[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Return the scalars and histograms of a log step, by name.

    Args:
        line: of metrics.jsonl; routing_lines: of routing.jsonl.
    """
    scalars = {
        f"train/{name}": value
        for name, value in line.items()
        if name != "step" and value is not None
    }
    histograms: dict[str, list[int]] = {}
    for entry in routing_lines:
        layer = f"layer_{entry['layer']}"
        if entry["load_max_over_mean"] is not None:
            scalars[f"load_max_over_mean/{layer}/bin_{entry['timestep_bin']}"] = entry[
                "load_max_over_mean"
            ]
        before = histograms.get(f"expert_load/{layer}", [0] * len(entry["tokens_per_expert"]))
        histograms[f"expert_load/{layer}"] = [
            a + b for a, b in zip(before, entry["tokens_per_expert"], strict=True)
        ]
        if detail := entry.get("layer_detail"):
            scalars[f"prototype_similarity/{layer}"] = entry["prototype_similarity"]
            own = [value for value in detail["prototype_to_centroid"] if value is not None]
            scalars |= {f"prototype_to_centroid/{layer}": sum(own) / len(own)} if own else {}
            if detail["ep_size"] > 1:
                scalars[f"exchange_bytes/{layer}"] = entry["layer_bytes_exchanged"]
                waits = [each["seconds"] for each in detail["exchanges"].values()]
                scalars |= {} if None in waits else {f"exchange_wait_seconds/{layer}": sum(waits)}
                scalars |= (
                    {}
                    if detail["rank_max_over_mean"] is None
                    else {f"rank_load/{layer}": detail["rank_max_over_mean"]}
                )
    for name, tokens in histograms.items():
        layer = name.rpartition("/")[2]
        scalars[f"dead_experts/{layer}"] = tokens.count(0)
        if any(tokens):
            load = {
                "load_max_over_mean": max_over_mean(np.array(tokens)),
                "load_cv": variation(np.array(tokens)),
            }
            scalars |= {f"{field}/{layer}": float(value) for field, value in load.items()}
    return scalars, histograms


class _TensorBoard:
    def __init__(self, board: Any) -> None:
        self._board = board

    def write(self, step: int, scalars: dict[str, float], histograms: dict[str, list[int]]) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        for name, tokens in histograms.items():
            # A bucket an expert: the height is its load, not a distribution of loads.
            edges = [expert + 0.5 for expert in range(len(tokens))]
            self._board.add_histogram_raw(
                name,
                min=-0.5,
                max=edges[-1],
                num=sum(tokens),
                sum=sum(expert * count for expert, count in enumerate(tokens)),
                sum_squares=sum(expert**2 * count for expert, count in enumerate(tokens)),
                bucket_limits=edges,
                bucket_counts=tokens,
                global_step=step,
            )

    def close(self) -> None:
        self._board.close()


class _Wandb:
    def __init__(self, config: RunConfig, run_dir: Path, inherited_id: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "logging.wandb=true needs wandb: pip install 'promoe_ds[tracking]'"
            ) from None
        self._wandb = wandb
        # Random, not of the path: an emptied folder is another run, a moved or restored one is the
        # same.
        name = read_wandb_id(run_dir) or inherited_id or secrets.token_hex(8)
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=run_dir.name,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            resume="allow",
            id=name,
        )
        (run_dir / WANDB_ID).write_text(f"{name}\n", encoding="utf-8")
        # W&B's own count only grows: it would refuse the steps that a resumed run repeats.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: dict[str, float], histograms: dict[str, list[int]]) -> None:
        bars = {
            name: self._wandb.Histogram(
                np_histogram=(np.array(tokens), np.arange(len(tokens) + 1) - 0.5)
            )
            for name, tokens in histograms.items()
        }
        self._run.log({"step": step, **scalars, **bars})

    def close(self) -> None:
        self._run.finish()


def _open_tensorboard(config: RunConfig, run_dir: Path, start_step: int) -> _TensorBoard | None:
    if config.logging.tensorboard is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if config.logging.tensorboard is True:
            raise ConfigError(
                "logging.tensorboard=true needs tensorboard: pip install 'promoe_ds[tracking]'"
            ) from None
        _LOG.info("logging.tensorboard=auto: tensorboard is not installed, off")
        return None
    return _TensorBoard(SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1))
