"""Slow, obvious routing: plain Python loops over floats, written from the paper's equations.

Tensors come in as nested lists; nothing here uses torch.
"""

from __future__ import annotations

import math

Vector = list[float]
Matrix = list[Vector]


def partition(
    labels: list[int], null_label: int, *, has_unconditional_expert: bool
) -> tuple[list[int], list[int]]:
    """Algorithm 1, step 1: places of routed and of unconditional samples, in order."""
    routed, unconditional = [], []
    for place, label in enumerate(labels):
        if label == null_label and has_unconditional_expert:
            unconditional.append(place)
        else:
            routed.append(place)
    return routed, unconditional


def length(vector: Vector) -> float:
    return math.sqrt(sum(x * x for x in vector))


def distance(a: Vector, b: Vector) -> float:
    return length([x - y for x, y in zip(a, b, strict=True)])


def cosine(a: Vector, b: Vector) -> float:
    """Cosine of two vectors; 0 where one of them has no length."""
    if length(a) == 0 or length(b) == 0:
        return 0.0
    return sum(x * y for x, y in zip(a, b, strict=True)) / (length(a) * length(b))


def scores(token: Vector, prototypes: Matrix, scale: float, activation: str) -> Vector:
    """Eq. 4, then Eq. 2's activation over the experts."""
    return activated([scale * cosine(token, prototype) for prototype in prototypes], activation)


def activated(values: Vector, activation: str) -> Vector:
    """Eq. 2's activation A."""
    if activation == "identity":
        return values
    if activation == "sigmoid":
        return [sigmoid(value) for value in values]
    return softmax(values)


def linear(vector: Vector, weight: Matrix, bias: Vector | None = None) -> Vector:
    """weight @ vector + bias."""
    products = [sum(w * x for w, x in zip(row, vector, strict=True)) for row in weight]
    return products if bias is None else [x + b for x, b in zip(products, bias, strict=True)]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def silu(value: float) -> float:
    return value * sigmoid(value)


def gelu_tanh(value: float) -> float:
    return 0.5 * value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def mean(vectors: Matrix) -> Vector:
    return [sum(values) / len(vectors) for values in zip(*vectors, strict=True)]


def softmax(values: Vector) -> Vector:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def best(values: Vector, k: int) -> list[int]:
    """The places of the k largest values, the largest first; among equals the first place."""
    return sorted(range(len(values)), key=lambda place: (-values[place], place))[:k]


def assignment_rows(choices: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """(token, expert, gate) rows, sorted by expert and within an expert by token."""
    return sorted(choices, key=lambda row: (row[1], row[0]))


def contrastive_loss(
    tokens: Matrix, membership: list[list[bool]], prototypes: Matrix, temperature: float
) -> float:
    """Eq. 6: cross-entropy of each active prototype's own centroid among all active centroids,
    averaged.
    """
    centroids: dict[int, Vector] = {}
    for expert in range(len(prototypes)):
        members = [
            token for token, member in zip(tokens, membership, strict=True) if member[expert]
        ]
        if members:
            centroids[expert] = mean(members)
    if len(centroids) < 2:
        return 0.0
    total = 0.0
    for expert in centroids:
        logits = {
            other: cosine(prototypes[expert], centroid) / temperature
            for other, centroid in centroids.items()
        }
        total += math.log(sum(math.exp(value) for value in logits.values())) - logits[expert]
    return total / len(centroids)


def balance_loss(
    samples: list[Matrix],
    counts: list[list[int]],
    is_routed: list[bool],
    *,
    top_k: int,
    level: str,
    scores_are_probabilities: bool,
) -> float:
    """E * sum over experts of (fraction of choices) * (mean probability), over routed tokens
    only.
    """
    routed = [place for place, is_in in enumerate(is_routed) if is_in]
    if not routed:
        return 0.0
    groups = [[place] for place in routed] if level == "sample" else [routed]
    total = 0.0
    for group in groups:
        tokens = [token for place in group for token in samples[place]]
        probabilities = tokens if scores_are_probabilities else [softmax(token) for token in tokens]
        num_experts = len(tokens[0])
        for expert in range(num_experts):
            fraction = sum(counts[place][expert] for place in group) / (len(tokens) * top_k)
            probability = sum(row[expert] for row in probabilities) / len(tokens)
            total += num_experts * fraction * probability
    return total / len(groups)


def mean_similarity(prototypes: Matrix) -> float:
    """Mean cosine over pairs of different prototypes."""
    pairs = [
        cosine(a, b) for i, a in enumerate(prototypes) for j, b in enumerate(prototypes) if i != j
    ]
    return sum(pairs) / len(pairs) if pairs else 0.0


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
