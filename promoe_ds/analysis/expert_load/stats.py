"""What the arrays of a log say: evenness, dead and starving experts, time lost. Formulas in docs/routing_stats.md.

Letters: T log intervals, L MoE layers, Q timestep bins, E routed experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.analysis.expert_load.log import RoutingLog
from promoe_ds.config import RunConfig, training_flops_per_image
from promoe_ds.config.accounting import count_parameters
from promoe_ds.config.loader import read_saved
from promoe_ds.errors import PromoeError

#: An expert starves below this part of an even share.
STARVING_SHARE = 0.1
#: It is dead without a token in the whole window, or in so many of the newest intervals that span such a part of the steps.
_DEAD_INTERVALS, _DEAD_SPAN = 3, 0.01


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run's other files say; None where they are missing.

    images_per_second: median over the window's log steps.
    """

    name: str
    config: RunConfig | None
    images_per_second: float | None
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Lack:
    """An expert without tokens, or with hardly any.

    since: the step after which it has had none (or stayed below STARVING_SHARE); where the log begins if is_always.
    """

    layer: int
    expert: int
    is_dead: bool
    share: float
    since: int
    is_always: bool


def read_facts(log: RoutingLog, window: slice) -> RunFacts:
    """Read config.yaml and metrics.jsonl beside a log; what is missing or unreadable is noted."""
    folder, notes = log.path.parent, []
    config = None
    try:
        config = read_saved(folder / "config.yaml")
    except (OSError, PromoeError) as error:
        reason = "is missing" if isinstance(error, OSError) else "cannot be understood"
        notes.append(f"config.yaml {reason}: sizes, and what depends on them (time lost to imbalance), are left out")
    if config is not None and (list(config.moe_block_indices) != log.layers or config.routing.num_experts != log.experts):
        config = None
        notes.append("config.yaml describes other layers or experts than the log: it is not used")
    return RunFacts(name=folder.resolve().name, config=config, images_per_second=_speed(folder / "metrics.jsonl", log, window),
                    notes=notes)


def _speed(path: Path, log: RoutingLog, window: slice) -> float | None:
    first, speeds = int(log.steps_T[window][0]), []
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["step"] >= first and values.get("images_per_second"):
                speeds.append(float(values["images_per_second"]))
        except (ValueError, KeyError, TypeError):
            continue  # a broken line of another file: the speed is a median
    return float(np.median(speeds)) if speeds else None


def shares(tokens_E: np.ndarray) -> np.ndarray:
    """Return loads over their sum, along the last dimension; NaN without tokens."""
    total = tokens_E.sum(axis=-1, keepdims=True)
    return np.divide(tokens_E, total, out=np.full(tokens_E.shape, np.nan), where=total > 0)


def max_over_mean(tokens_E: np.ndarray) -> np.ndarray:
    """Return the largest load over the mean one: 1 is even, E is all on one expert; NaN without tokens."""
    return shares(tokens_E).max(axis=-1) * tokens_E.shape[-1]


def variation(tokens_E: np.ndarray) -> np.ndarray:
    """Return the loads' standard deviation over their mean; NaN without tokens."""
    return shares(tokens_E).std(axis=-1) * tokens_E.shape[-1]


def entropy(tokens_E: np.ndarray) -> np.ndarray:
    """Return the entropy of the shares over log E: 1 is even, 0 is all on one; NaN without tokens."""
    experts = tokens_E.shape[-1]
    part = shares(tokens_E)
    if experts == 1:
        return part[..., 0]
    logs = np.log(part, out=np.zeros_like(part), where=part > 0)
    return -(part * logs).sum(axis=-1) / np.log(experts)


def find_lacks(log: RoutingLog, window: slice) -> list[Lack]:
    """Return the dead and starving experts, dead ones first: of the window, and those that died within it."""
    found = []
    for row, layer in enumerate(log.layers):
        held_T = log.tokens_TLE[:, row].any(axis=1)
        if not held_T[window].any():
            continue
        # What an interval without tokens says of its experts is nothing.
        steps_t, tokens_tE = log.steps_T[held_T], log.tokens_TLE[held_T, row]
        part_tE, now_E = shares(tokens_tE), shares(log.tokens_TLE[window, row].sum(axis=0))
        for expert in range(log.experts):
            since, intervals = _last(tokens_tE[:, expert] > 0, steps_t, log)
            is_dead = now_E[expert] == 0 or (intervals >= _DEAD_INTERVALS and steps_t[-1] - since >= _DEAD_SPAN * steps_t[-1])
            if not is_dead and now_E[expert] * log.experts >= STARVING_SHARE:
                continue
            if not is_dead:
                since, intervals = _last(part_tE[:, expert] * log.experts >= STARVING_SHARE, steps_t, log)
            found.append(Lack(layer=layer, expert=expert, is_dead=bool(is_dead), share=float(now_E[expert]), since=since,
                              is_always=intervals == len(steps_t)))
    return sorted(found, key=lambda lack: (not lack.is_dead, lack.layer, lack.expert))


def _last(was_T: np.ndarray, steps_T: np.ndarray, log: RoutingLog) -> tuple[int, int]:
    """Return the step at which something was last so (where the log begins if never), and how many intervals came after."""
    places = np.flatnonzero(was_T)
    if not len(places):
        return int(log.steps_T[0] - log.covered_T[0]), len(was_T)
    return int(steps_T[places[-1]]), len(was_T) - 1 - int(places[-1])


def share_of_time_lost(config: RunConfig, log: RoutingLog, uneven_L: np.ndarray, window: slice) -> float | None:
    """Return the estimated share of a step for which ranks wait because the fullest one has more rows than the mean.

    With x = (operations of the rows above the mean on the fullest rank, all layers) / (operations of a rank's share of the
    batch), x / (1 + x) of the time is lost, at equal speed per operation. None without tokens or with no exchange.
    """
    steps = int(log.covered_T[window].sum())
    if not steps or np.isnan(uneven_L).all():
        return None
    per_row = 6.0 * count_parameters(config).routed_per_expert
    rows_L = log.tokens_TLE[window].sum(axis=(0, 2)) / steps
    # Operations over all ranks, had they all the fullest one's rows, above what they really do.
    extra = float(np.nansum(rows_L * (uneven_L - 1.0)) * per_row)
    x = extra / (training_flops_per_image(config) * config.train.global_batch_size)
    return x / (1.0 + x)
