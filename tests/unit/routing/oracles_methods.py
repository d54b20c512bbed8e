"""Whole routers as plain Python loops over floats: what each method does to a batch, written from
its paper.

A batch comes as nested lists: samples[b][s][d]. Expert choices are lists of (token, expert, gate)
rows, where token is b * S + s; nothing here uses torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from . import oracles
from .oracles import Matrix, Vector

Row = tuple[int, int, float]


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
    """Samples, which of them are routed, and the label of each."""

    samples: list[Matrix]
    routed: list[int]
    labels: list[int]

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


def linear_gate(
    batch: Batch, weight: Matrix, *, top_k: int, balance_weight: float, level: str
) -> Expected:
    """DiT-MoE: each token takes its K most probable experts."""
    probabilities = [
        [oracles.softmax(oracles.linear(token, weight)) for token in sample]
        for sample in batch.samples
    ]
    rows = [
        (place * batch.tokens + s, expert, probabilities[place][s][expert])
        for place in batch.routed
        for s in range(batch.tokens)
        for expert in oracles.best(probabilities[place][s], top_k)
    ]
    is_routed = [place in batch.routed for place in range(len(batch.samples))]
    balance = oracles.balance_loss(
        probabilities,
        counts_of(rows, batch, len(weight)),
        is_routed,
        top_k=top_k,
        level=level,
        scores_are_probabilities=True,
    )
    return Expected(rows, {"balance": balance_weight * balance})


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


def linear_expert_choice(batch: Batch, weight: Matrix, *, top_k: int) -> Expected:
    """EC-DiT: softmax over experts, floor(S * K / E) tokens each."""
    scores = [
        [oracles.softmax(oracles.linear(token, weight)) for token in batch.samples[place]]
        for place in batch.routed
    ]
    return Expected(
        choose_per_sample(scores, batch, math.floor(batch.tokens * top_k / len(weight)))[0]
    )


def prototype_expert_choice(
    batch: Batch,
    prototypes: Matrix,
    *,
    top_k: int,
    scale: float,
    activation: str,
    rcl_weight: float,
    temperature: float,
) -> Expected:
    """ProMoE with expert choice: cosines, a softmax over tokens, at least one token each."""
    capacity = min(max(1, math.floor(batch.tokens * top_k / len(prototypes))), batch.tokens)
    scores = []
    for place in batch.routed:
        columns = [
            oracles.activated(
                [scale * oracles.cosine(token, prototype) for token in batch.samples[place]],
                activation,
            )
            for prototype in prototypes
        ]
        scores.append([list(row) for row in zip(*columns, strict=True)])
    rows, chosen = choose_per_sample(scores, batch, capacity)
    loss = expert_choice_contrast(
        [batch.samples[place] for place in batch.routed], chosen, prototypes, temperature
    )
    return Expected(rows, {"rcl": rcl_weight * loss})


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


@dataclass(frozen=True)
class Predictor:
    """DiffMoE's capacity predictor."""

    up: Matrix
    up_bias: Vector
    down: Matrix
    down_bias: Vector

    def probabilities(self, token: Vector) -> Vector:
        hidden = [oracles.silu(value) for value in oracles.linear(token, self.up, self.up_bias)]
        return [
            oracles.sigmoid(value) for value in oracles.linear(hidden, self.down, self.down_bias)
        ]


def batch_pool(
    batch: Batch,
    weight: Matrix,
    predictor: Predictor,
    thresholds: Vector,
    *,
    top_k: int,
    capacity_weight: float,
    training: bool,
) -> Expected:
    """DiffMoE: each expert takes floor(T * K / E) tokens of the pool, in evaluation as many as its
    predictor says.
    """
    pool, experts = batch.pool(), len(weight)
    scores = [oracles.softmax(oracles.linear(token, weight)) for _, token in pool]
    predicted = [predictor.probabilities(token) for _, token in pool]
    capacity = math.floor(len(pool) * top_k / experts)
    rows, lowest, entropy = [], [], 0.0
    for expert in range(experts):
        wanted = (
            capacity if training else sum(row[expert] > thresholds[expert] for row in predicted)
        )
        taken = oracles.best([row[expert] for row in scores], wanted)
        rows += [(pool[i][0], expert, scores[i][expert]) for i in taken]
        lowest.append(
            sorted((row[expert] for row in predicted), reverse=True)[capacity - 1]
            if capacity
            else 0.0
        )
        entropy -= sum(
            math.log(row[expert] if i in taken else 1 - row[expert])
            for i, row in enumerate(predicted)
        )
    if not training:
        return Expected(rows)
    loss = entropy / (len(pool) * experts) if pool else 0.0
    return Expected(
        rows, {"capacity": capacity_weight * loss}, observation=[*lowest, 1.0 if capacity else 0.0]
    )


@dataclass(frozen=True)
class RaceNetwork:
    """Expert Race's router: hidden layer, gate and the head that predicts the target."""

    hidden: Matrix
    hidden_bias: Vector
    gate: Matrix
    target: Matrix
    target_bias: Vector

    def hidden_of(self, token: Vector) -> Vector:
        return [
            oracles.gelu_tanh(value)
            for value in oracles.linear(token, self.hidden, self.hidden_bias)
        ]


def expert_race(
    batch: Batch,
    network: RaceNetwork,
    threshold: float,
    *,
    top_k: int,
    activation: str,
    similarity_weight: float,
    training: bool,
) -> Expected:
    """Expert Race: the K * T highest of all pairs of a token and an expert; in evaluation those
    over the threshold.
    """
    pool = batch.pool()
    logits = [oracles.linear(network.hidden_of(token), network.gate) for _, token in pool]
    scores = [oracles.activated(row, activation) for row in logits]
    pairs = [(i, expert, score) for i, row in enumerate(scores) for expert, score in enumerate(row)]
    winners = [pair for pair in pairs if pair[2] > threshold]
    if training:
        winners = sorted(pairs, key=lambda pair: -pair[2])[: top_k * len(pool)]
    rows = [(pool[i][0], expert, score) for i, expert, score in winners]
    if not training:
        return Expected(rows)
    chosen = [
        [(i, expert) in {pair[:2] for pair in winners} for expert in range(len(network.gate))]
        for i in range(len(pool))
    ]
    loss = similarity_loss([oracles.softmax(row) for row in logits], chosen, len(network.gate))
    target = [
        [
            oracles.linear(network.hidden_of(token), network.target, network.target_bias)
            for token in sample
        ]
        for sample in batch.samples
    ]
    observation = [winners[-1][2], 1.0] if winners else [0.0, 0.0]
    return Expected(rows, {"similarity": similarity_weight * loss}, observation, target)


def similarity_loss(probabilities: Matrix, chosen: list[list[bool]], experts: int) -> float:
    """Expert Race's router similarity loss: sum over i, j of W_ij * (P^T P)_ij / T."""
    tokens = len(probabilities)
    joint = [
        [sum(row[i] and row[j] for row in chosen) for j in range(experts)] for i in range(experts)
    ]
    load = sum(joint[i][i] for i in range(experts))
    pairs = sum(joint[i][j] for i in range(experts) for j in range(experts) if i != j)
    total = 0.0
    for i in range(experts):
        for j in range(experts):
            similarity = sum(row[i] * row[j] for row in probabilities) / tokens if tokens else 0.0
            if i == j and load:
                total += experts * joint[i][i] / load * similarity
            if i != j and pairs:
                total += (experts**2 - experts) * joint[i][j] / pairs * similarity
    return total


def classification(
    batch: Batch,
    weight: Matrix,
    bias: Vector,
    superclass_of: list[int],
    *,
    null_label: int,
    loss_weight: float,
    training: bool,
) -> Expected:
    """Sec. 4.2, explicit: a sample's mean token is classified, all its tokens follow."""
    rows, losses = [], []
    for place, sample in enumerate(batch.samples):
        probabilities = oracles.softmax(oracles.linear(oracles.mean(sample), weight, bias))
        expert = oracles.best(probabilities, 1)[0]
        if place in batch.routed:
            rows += [
                (place * batch.tokens + s, expert, probabilities[expert])
                for s in range(batch.tokens)
            ]
        if batch.labels[place] != null_label:
            losses.append(-math.log(probabilities[superclass_of[batch.labels[place]]]))
    loss = sum(losses) / len(losses) if losses else 0.0
    return Expected(rows, {"classification": loss_weight * loss} if training else {})


def kmeans(batch: Batch, centroids: Matrix, *, training: bool) -> Expected:
    """Sec. 4.2, implicit: each token goes to its nearest centroid; sums and counts are what the
    centroids learn.
    """
    rows = []
    observation = [[0.0] * (len(centroids[0]) + 1) for _ in centroids]
    for place, token in batch.pool():
        scores = oracles.softmax(
            [
                -oracles.length([x - c for x, c in zip(token, centroid, strict=True)])
                for centroid in centroids
            ]
        )
        expert = oracles.best(scores, 1)[0]
        rows.append((place, expert, scores[expert]))
        observation[expert] = [
            old + new for old, new in zip(observation[expert], [*token, 1.0], strict=True)
        ]
    return Expected(rows, observation=observation if training else None)
