"""Whole routers as plain Python loops over floats: what each method does to a batch, written from
its paper.

A batch comes as nested lists: samples[b][s][d]. Expert choices are lists of (token, expert, gate)
rows, where token is b * S + s; nothing here uses torch. An oracle takes the batch, the router's
state by name, its settings, and whether it trains; in evaluation its losses do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from promoe_ds.config.routing import RoutingConfig

from . import oracles
from .oracles import Matrix, Vector

Row = tuple[int, int, float]
State = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """What a plan must hold: rows in any order, losses by name, what the running state learns, the
    predicted target.
    """

    rows: list[Row]
    losses: dict[str, float] = field(default_factory=dict)
    observation: Any = None
    target: list[Matrix] | None = None


@dataclass(frozen=True)
class Batch:
    """Samples, which of them are routed, and each one's superclass, None for a null label."""

    samples: list[Matrix]
    routed: list[int]
    superclasses: list[int | None]

    @property
    def tokens(self) -> int:
        return len(self.samples[0])

    def pool(self) -> list[tuple[int, Vector]]:
        """The tokens of the routed samples with their places in the batch."""
        return [
            (place * self.tokens + s, token)
            for place in self.routed
            for s, token in enumerate(self.samples[place])
        ]


def counts_of(rows: list[Row], batch: Batch, experts: int) -> list[list[int]]:
    """How often each sample meets each expert."""
    counts = [[0] * experts for _ in batch.samples]
    for token, expert, _ in rows:
        counts[token // batch.tokens][expert] += 1
    return counts


def gate_sums_of(rows: list[Row], batch: Batch) -> Vector:
    return [
        sum(gate for token, _, gate in rows if token // batch.tokens == place)
        for place in range(len(batch.samples))
    ]


def choose_per_token(
    scores: list[Matrix], batch: Batch, settings: RoutingConfig, *, probabilities: bool
) -> tuple[list[Row], dict[str, float]]:
    """Each token takes its K best experts; scores[b][s][e]. Also the load-balancing loss, if
    asked for.
    """
    rows = [
        (place * batch.tokens + s, expert, scores[place][s][expert])
        for place in batch.routed
        for s in range(batch.tokens)
        for expert in oracles.best(scores[place][s], settings.top_k)
    ]
    if settings.balance_weight == 0:
        return rows, {}
    balance = oracles.balance_loss(
        scores,
        counts_of(rows, batch, settings.num_experts),
        [place in batch.routed for place in range(len(batch.samples))],
        top_k=settings.top_k,
        level=settings.balance_level,
        scores_are_probabilities=probabilities,
    )
    return rows, {"balance": settings.balance_weight * balance}


def token_choice(batch: Batch, state: State, settings: RoutingConfig, training: bool) -> Expected:
    """ProMoE, Algorithm 1: each token takes the K prototypes of the highest activated cosine."""
    scores = [
        [
            oracles.scores(token, state["prototypes"], settings.score_scale, settings.activation)
            for token in sample
        ]
        for sample in batch.samples
    ]
    rows, losses = choose_per_token(
        scores, batch, settings, probabilities=settings.activation == "softmax"
    )
    if settings.rcl_weight > 0:
        counted = settings.top_k if settings.rcl_assignments == "all" else 1
        membership = [
            [
                place in batch.routed and expert in oracles.best(token_scores, counted)
                for expert in range(settings.num_experts)
            ]
            for place, sample in enumerate(scores)
            for token_scores in sample
        ]
        losses["rcl"] = settings.rcl_weight * oracles.contrastive_loss(
            [token for sample in batch.samples for token in sample],
            membership,
            state["prototypes"],
            settings.rcl_temperature,
        )
    return Expected(rows, losses)


def linear_gate(batch: Batch, state: State, settings: RoutingConfig, training: bool) -> Expected:
    """DiT-MoE: each token takes its K most probable experts."""
    probabilities = [
        [oracles.softmax(oracles.linear(token, state["gate_weight"])) for token in sample]
        for sample in batch.samples
    ]
    return Expected(*choose_per_token(probabilities, batch, settings, probabilities=True))


def choose_per_sample(
    scores: list[Matrix], batch: Batch, capacity: int
) -> tuple[list[Row], list[list[list[int]]]]:
    """Each expert takes its best tokens of every routed sample; scores[r][s][e] of the r-th routed
    sample.
    """
    rows, chosen = [], []
    for place, sample in zip(batch.routed, scores, strict=True):
        columns = [list(column) for column in zip(*sample, strict=True)]
        chosen.append([oracles.best(column, capacity) for column in columns])
        rows += [
            (place * batch.tokens + s, expert, columns[expert][s])
            for expert, taken in enumerate(chosen[-1])
            for s in taken
        ]
    return rows, chosen


def linear_expert_choice(
    batch: Batch, state: State, settings: RoutingConfig, training: bool
) -> Expected:
    """EC-DiT: softmax over experts, floor(S * K / E) tokens each."""
    scores = [
        [
            oracles.softmax(oracles.linear(token, state["gate_weight"]))
            for token in batch.samples[place]
        ]
        for place in batch.routed
    ]
    capacity = math.floor(batch.tokens * settings.top_k / settings.num_experts)
    return Expected(choose_per_sample(scores, batch, capacity)[0])


def prototype_expert_choice(
    batch: Batch, state: State, settings: RoutingConfig, training: bool
) -> Expected:
    """ProMoE with expert choice: cosines, a softmax over tokens, at least one token each."""
    prototypes = state["prototypes"]
    share = math.floor(batch.tokens * settings.top_k / settings.num_experts)
    scores = []
    for place in batch.routed:
        columns = [
            oracles.activated(
                [
                    settings.score_scale * oracles.cosine(token, prototype)
                    for token in batch.samples[place]
                ],
                settings.activation,
            )
            for prototype in prototypes
        ]
        scores.append([list(row) for row in zip(*columns, strict=True)])
    rows, chosen = choose_per_sample(scores, batch, min(max(1, share), batch.tokens))
    if settings.rcl_weight == 0:
        return Expected(rows)
    loss = expert_choice_contrast(
        [batch.samples[place] for place in batch.routed],
        chosen,
        prototypes,
        settings.rcl_temperature,
    )
    return Expected(rows, {"rcl": settings.rcl_weight * loss})


def expert_choice_contrast(
    samples: list[Matrix], chosen: list[list[list[int]]], prototypes: Matrix, temperature: float
) -> float:
    """Eq. 6 with every sample's own centroids, averaged over samples and experts; 0 without
    samples.
    """
    terms = []
    for sample, taken in zip(samples, chosen, strict=True):
        centroids = [oracles.mean([sample[s] for s in places]) for places in taken]
        for expert, prototype in enumerate(prototypes):
            logits = [oracles.cosine(prototype, centroid) / temperature for centroid in centroids]
            terms.append(-math.log(oracles.softmax(logits)[expert]))
    return sum(terms) / len(terms) if terms else 0.0


def batch_pool(batch: Batch, state: State, settings: RoutingConfig, training: bool) -> Expected:
    """DiffMoE: each expert takes floor(T * K / E) tokens of the pool, in evaluation as many as its
    predictor says.
    """
    pool, experts = batch.pool(), settings.num_experts
    scores = [oracles.softmax(oracles.linear(token, state["gate_weight"])) for _, token in pool]
    predicted = [_predicted(token, state) for _, token in pool]
    capacity = math.floor(len(pool) * settings.top_k / experts)
    rows, lowest, entropy = [], [], 0.0
    for expert in range(experts):
        column = [row[expert] for row in predicted]
        wanted = sum(value > state["thresholds"][expert] for value in column)
        taken = oracles.best([row[expert] for row in scores], capacity if training else wanted)
        rows += [(pool[i][0], expert, scores[i][expert]) for i in taken]
        lowest.append(sorted(column, reverse=True)[capacity - 1] if capacity else 0.0)
        entropy -= sum(
            math.log(value if i in taken else 1 - value) for i, value in enumerate(column)
        )
    loss = entropy / (len(pool) * experts) if pool else 0.0
    observation = [*lowest, 1.0 if capacity else 0.0]
    return Expected(rows, {"capacity": settings.capacity_weight * loss}, observation)


def _predicted(token: Vector, state: State) -> Vector:
    """DiffMoE's capacity predictor."""
    up, down = (
        (state[f"predictor.{name}.weight"], state[f"predictor.{name}.bias"])
        for name in ("up", "down")
    )
    hidden = [oracles.silu(value) for value in oracles.linear(token, *up)]
    return [oracles.sigmoid(value) for value in oracles.linear(hidden, *down)]


def expert_race(batch: Batch, state: State, settings: RoutingConfig, training: bool) -> Expected:
    """Expert Race: the K * T highest of all pairs of a token and an expert; in evaluation those
    over the threshold.
    """

    def hidden(token: Vector) -> Vector:
        values = oracles.linear(token, state["hidden.weight"], state["hidden.bias"])
        return [oracles.gelu_tanh(value) for value in values]

    pool, experts = batch.pool(), settings.num_experts
    logits = [oracles.linear(hidden(token), state["gate_weight"]) for _, token in pool]
    scores = [oracles.activated(row, settings.activation) for row in logits]
    pairs = [(i, expert, score) for i, row in enumerate(scores) for expert, score in enumerate(row)]
    if training:
        winners = sorted(pairs, key=lambda pair: -pair[2])[: settings.top_k * len(pool)]
    else:
        winners = [pair for pair in pairs if pair[2] > state["threshold"][0]]
    rows = [(pool[i][0], expert, score) for i, expert, score in winners]
    won = {pair[:2] for pair in winners}
    chosen = [[(i, expert) in won for expert in range(experts)] for i in range(len(pool))]
    loss = oracles.similarity_loss([oracles.softmax(row) for row in logits], chosen, experts)
    head = state["target_head.weight"], state["target_head.bias"]
    target = [
        [oracles.linear(hidden(token), *head) for token in sample] for sample in batch.samples
    ]
    observation = [winners[-1][2], 1.0] if winners else [0.0, 0.0]
    losses = {"similarity": settings.similarity_weight * loss}
    return Expected(rows, losses if settings.similarity_weight else {}, observation, target)


def classification(batch: Batch, state: State, settings: RoutingConfig, training: bool) -> Expected:
    """Sec. 4.2, explicit: a sample's mean token is classified, all its tokens follow."""
    rows, losses = [], []
    for place, sample in enumerate(batch.samples):
        logits = oracles.linear(
            oracles.mean(sample), state["classifier.weight"], state["classifier.bias"]
        )
        probabilities, superclass = oracles.softmax(logits), batch.superclasses[place]
        expert = oracles.best(probabilities, 1)[0]
        if place in batch.routed:
            rows += [
                (place * batch.tokens + s, expert, probabilities[expert])
                for s in range(batch.tokens)
            ]
        if superclass is not None:
            losses.append(-math.log(probabilities[superclass]))
    loss = sum(losses) / len(losses) if losses else 0.0
    return Expected(rows, {"classification": settings.classification_weight * loss})


def kmeans(batch: Batch, state: State, settings: RoutingConfig, training: bool) -> Expected:
    """Sec. 4.2, implicit: each token goes to its nearest centroid; sums and counts are what the
    centroids learn.
    """
    rows, centroids = [], state["centroids"]
    observation = [[0.0] * (len(centroids[0]) + 1) for _ in centroids]
    for place, token in batch.pool():
        scores = oracles.softmax([-oracles.distance(token, centroid) for centroid in centroids])
        expert = oracles.best(scores, 1)[0]
        rows.append((place, expert, scores[expert]))
        observation[expert] = [
            old + new for old, new in zip(observation[expert], [*token, 1.0], strict=True)
        ]
    return Expected(rows, observation=observation)


def hash_layers(batch: Batch, state: State, settings: RoutingConfig, training: bool) -> Expected:
    """Each position goes to the K experts of the lowest of E draws, the same in every image; here
    of block 0.
    """
    random, rows = Random(0), []
    for s in range(batch.tokens):
        chosen = oracles.best(
            [-random.random() for _ in range(settings.num_experts)], settings.top_k
        )
        for place in batch.routed:
            rows += [(place * batch.tokens + s, expert, 1 / settings.top_k) for expert in chosen]
    return Expected(rows)


ORACLES: dict[str, Callable[[Batch, State, RoutingConfig, bool], Expected]] = {
    "token_choice": token_choice,
    "expert_choice": prototype_expert_choice,
    "dit_moe": linear_gate,
    "ec_dit": linear_expert_choice,
    "diff_moe": batch_pool,
    "expert_race": expert_race,
    "classification": classification,
    "kmeans": kmeans,
    "hash": hash_layers,
}
