"""TensorBoard and Weights & Biases: the same scalars and load histograms to either, where asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from promoe_ds.config import RunConfig
from promoe_ds.errors import ConfigError
from promoe_ds.load_stats import max_over_mean, variation
from promoe_ds.logs import get_logger

_LOG = get_logger("metrics")


class Tracker(Protocol):
    """Takes what a log step recorded."""

    def write(self, step: int, scalars: dict[str, float], histograms: dict[str, list[int]]) -> None:
        """Record scalars and, by name, the tokens of each expert."""

    def close(self) -> None:
        """Flush and close."""


def open_trackers(config: RunConfig, run_dir: Path, start_step: int) -> list[Tracker]:
    """Return the trackers that a run asks for.

    Raises: ConfigError if one is asked for and its library is missing or cannot start.
    """
    trackers: list[Tracker] = []
    if (board := _open_tensorboard(config, run_dir, start_step)) is not None:
        trackers.append(board)
    if config.logging.wandb:
        trackers.append(_Wandb(config, run_dir))
    return trackers


def flatten(line: dict[str, Any], routing_lines: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Return the scalars and histograms of a log step, by name.

    Args:
        line: of metrics.jsonl; routing_lines: of routing.jsonl.
    """
    scalars = {f"train/{name}": value for name, value in line.items() if name != "step" and value is not None}
    histograms: dict[str, list[int]] = {}
    for entry in routing_lines:
        layer = f"layer_{entry['layer']}"
        if entry["load_max_over_mean"] is not None:
            scalars[f"load_max_over_mean/{layer}/bin_{entry['timestep_bin']}"] = entry["load_max_over_mean"]
        before = histograms.get(f"expert_load/{layer}", [0] * len(entry["tokens_per_expert"]))
        histograms[f"expert_load/{layer}"] = [a + b for a, b in zip(before, entry["tokens_per_expert"], strict=True)]
        if detail := entry.get("layer_detail"):
            scalars[f"prototype_similarity/{layer}"] = entry["prototype_similarity"]
            own = [value for value in detail["prototype_to_centroid"] if value is not None]
            scalars |= {f"prototype_to_centroid/{layer}": sum(own) / len(own)} if own else {}
            if detail["ep_size"] > 1:
                scalars[f"exchange_bytes/{layer}"] = entry["layer_bytes_exchanged"]
                waits = [each["seconds"] for each in detail["exchanges"].values()]
                scalars |= {} if None in waits else {f"exchange_wait_seconds/{layer}": sum(waits)}
                scalars |= {} if detail["rank_max_over_mean"] is None else {f"rank_load/{layer}": detail["rank_max_over_mean"]}
    for name, tokens in histograms.items():
        layer = name.rpartition("/")[2]
        scalars[f"dead_experts/{layer}"] = tokens.count(0)
        if any(tokens):
            load = {"load_max_over_mean": max_over_mean(np.array(tokens)), "load_cv": variation(np.array(tokens))}
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
            sums = sum(expert * count for expert, count in enumerate(tokens))
            squares = sum(expert**2 * count for expert, count in enumerate(tokens))
            self._board.add_histogram_raw(name, min=-0.5, max=edges[-1], num=sum(tokens), sum=sums, sum_squares=squares,
                                          bucket_limits=edges, bucket_counts=tokens, global_step=step)

    def close(self) -> None:
        self._board.close()


class _Wandb:
    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("logging.wandb=true needs wandb: pip install 'promoe_ds[tracking]'") from None
        self._wandb = wandb
        try:
            self._run = wandb.init(project=config.logging.wandb_project, name=run_dir.name, dir=str(run_dir),
                                   config=config.model_dump(mode="json"), resume="allow", id=_identity(run_dir))
        except wandb.Error as error:
            raise ConfigError(f"logging.wandb=true: Weights & Biases does not start: {error}. Log in with `wandb login`, set "
                              "WANDB_MODE=offline, or leave logging.wandb out") from None

    def write(self, step: int, scalars: dict[str, float], histograms: dict[str, list[int]]) -> None:
        bars = {name: self._wandb.Histogram(np_histogram=(np.array(tokens), np.arange(len(tokens) + 1) - 0.5))
                for name, tokens in histograms.items()}
        self._run.log({**scalars, **bars}, step=step)

    def close(self) -> None:
        self._run.finish()


def _identity(run_dir: Path) -> str:
    """Return a name that a resumed run has again and no other run on this machine does."""
    return xxhash.xxh64_hexdigest(str(run_dir.resolve()).encode())


def _open_tensorboard(config: RunConfig, run_dir: Path, start_step: int) -> _TensorBoard | None:
    if config.logging.tensorboard is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if config.logging.tensorboard is True:
            raise ConfigError("logging.tensorboard=true needs tensorboard: pip install 'promoe_ds[tracking]'") from None
        _LOG.info("logging.tensorboard=auto: tensorboard is not installed, off")
        return None
    return _TensorBoard(SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1))
