"""What a reader should know first: each pathology with its number, place and remedy
(docs/guides/profiling.md has the reasons).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from promoe_ds.errors import first_few
from promoe_ds.load_stats import max_over_mean
from promoe_ds.reports.load.run import STARVED_SHARE, RunView, Starved

#: Beyond these, something is to be done.
UNEVEN, VERY_UNEVEN = 1.5, 2.5
TIME_LOST, MUCH_TIME_LOST = 0.05, 0.15
ALIKE_PROTOTYPES = 0.5
_UNEVEN_BIN = 3.0
#: Part of a step that another placement has to gain.
_WORTH_A_RESUME = 0.01
#: What a finding asks for, by its level.
TAGS = {"bad": "act", "warn": "watch", "good": "fine"}


@dataclass(frozen=True)
class Finding:
    """One sentence with a remedy; level is bad, warn or good."""

    level: str
    title: str
    text: str


def find(view: RunView) -> list[Finding]:
    """Return what is to be said of a run, the worst first; one good word where nothing is wrong."""
    if not view.tokens_LE.any():
        text = (
            f"All samples of the last {view.window_steps:,} steps were unconditional: look at the"
            " labels and at diffusion.label_dropout, or take a longer window with --last-steps."
        )
        return [Finding("bad", "No token was routed", text)]
    found = [*_starved(view), *_unevenness(view), *_time(view), *_prototypes(view), *_noise(view)]
    nothing = Finding(
        "good",
        "Nothing wrong found",
        f"In the last {view.window_steps:,} steps every expert has tokens, no layer is far from"
        " even, prototypes stay apart and no rank makes the others wait for long.",
    )
    return sorted(found, key=lambda finding: finding.level) or [nothing]  # "bad" before "warn"


def _starved(view: RunView) -> Iterator[Finding]:
    little = (
        f"less than {STARVED_SHARE:.0%} of an even share in the last {view.window_steps:,} steps"
    )
    for is_dead, level, word, what in (
        (True, "bad", "dead", "no token any more"),
        (False, "warn", "starved", little),
    ):
        those = [each for each in view.starved if each.is_dead == is_dead]
        if those:
            places = [
                f"layer {each.layer} expert {each.expert} ({word} {_since(each)})" for each in those
            ]
            yield Finding(
                level,
                f"{len(those)} {word} expert{'s' if len(those) > 1 else ''}",
                f"{first_few(places)}: {what}. Raise routing.rcl_weight, or give a balance loss"
                " (routing.balance_weight) where the method takes one; an expert dead since the"
                " start has a prototype far from all tokens: start again with another train.seed or"
                " fewer experts.",
            )


def _since(each: Starved) -> str:
    if each.is_always and not each.since:
        return "from the start"
    return f"since step {each.since:,}{' or before' if each.is_always else ''}"


def _unevenness(view: RunView) -> Iterator[Finding]:
    uneven_L = max_over_mean(view.tokens_LE)
    worst = int(np.nanargmax(uneven_L))
    if uneven_L[worst] > UNEVEN:
        first, second = np.argsort(-view.tokens_LE[worst])[:2]
        yield Finding(
            "bad" if uneven_L[worst] > VERY_UNEVEN else "warn",
            f"Layer {view.log.layers[worst]} is uneven: {uneven_L[worst]:.2f} times the mean",
            f"Its expert {first} is the fullest, expert {second} next;"
            f" {int((uneven_L > UNEVEN).sum())} of {len(uneven_L)} layers are above {UNEVEN}."
            " Experts that follow what images show are uneven up to a point: add a balance loss or"
            " raise routing.rcl_weight only where it costs time (see placement) or grows.",
        )


def _time(view: RunView) -> Iterator[Finding]:
    lost = view.time_lost(view.present_uneven)
    if lost is None or lost < TIME_LOST or view.log.ep_size == 1:
        return
    kinds = (view.advised_uneven, view.present.uneven_L)
    advised, remaining = (view.time_lost(uneven_L) or 0.0 for uneven_L in kinds)
    advice = (
        "no other order of the experts on as many ranks was found that gains"
        f" {_WORTH_A_RESUME:.0%} of a step. Summed over log intervals {remaining:.1%} remains,"
        " of experts heavier than others; the rest of what is measured changes from pass to"
        " pass. A smaller parallel.ep_size or a larger micro-batch helps"
    )
    if lost - advised >= _WORTH_A_RESUME:
        advice = (
            f"the advised placement is estimated to bring that to {advised:.1%}: write it with"
            " --placement FILE and resume with parallel.expert_placement=FILE"
        )
    yield Finding(
        "bad" if lost > MUCH_TIME_LOST else "warn",
        f"About {lost:.0%} of a step is lost to imbalance",
        f"Ranks wait for the one whose experts have most rows; {advice}.",
    )


def _prototypes(view: RunView) -> Iterator[Finding]:
    log, newest = view.log, view.newest(view.log.similarity_TL)
    alike = [f"layer {log.layers[row]}" for row in np.flatnonzero(newest > ALIKE_PROTOTYPES)]
    if alike:
        yield Finding(
            "warn",
            f"Prototypes look alike in {first_few(alike)}",
            f"Their mean cosine is above {ALIKE_PROTOTYPES}: experts compete for the same"
            " tokens. Raise routing.rcl_weight or lower routing.rcl_temperature.",
        )
    own, others = view.newest(log.to_centroid_TLE), view.newest(log.to_others_TLE)
    away = [f"layer {log.layers[row]} expert {expert}" for row, expert in np.argwhere(own < others)]
    if away:
        yield Finding(
            "warn",
            "Prototypes away from their own tokens",
            f"{first_few(away)}: nearer to the other experts' centroids than to their own. Right"
            " after the start this is normal; later it says that the contrastive loss is too"
            " weak.",
        )


def _noise(view: RunView) -> Iterator[Finding]:
    by_bin_LQ, whole_L = max_over_mean(view.tokens_LQE), max_over_mean(view.tokens_LE)
    places = np.argwhere((by_bin_LQ > _UNEVEN_BIN) & (whole_L <= UNEVEN)[:, None])
    for row, bin_ in places[:1]:
        yield Finding(
            "warn",
            "Even on the whole, uneven at some noise levels",
            f"Layer {view.log.layers[row]} at sigma {bin_ / view.log.bins:.1f} to"
            f" {(bin_ + 1) / view.log.bins:.1f} has {by_bin_LQ[row, bin_]:.1f} times the mean on"
            f" one expert ({len(places)} such places). Experts divide the noise levels among them;"
            " sampling visits one level at a time, so its steps are less even than training's.",
        )
