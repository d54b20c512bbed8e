"""Averages chosen after training: what is mixed from those kept is nearly what training itself
would have kept.
"""

from __future__ import annotations

import numpy as np
import pytest

from promoe_ds.checkpoint.conversion.posthoc import Profile, mixing_weights
from promoe_ds.config.optimizer import power_exponent


def profile(step: int, length: float) -> Profile:
    return Profile(step=step, exponent=power_exponent(length))


@pytest.mark.parametrize("length", [0.05, 0.2])
def test_profile_is_the_unrolled_average(length: float) -> None:
    """Run the average on the unit vectors: what each step contributed in the end."""
    steps, power = 30, power_exponent(length) + 1
    average = np.zeros(steps)
    for update in range(1, steps + 1):
        average += (1 - (1 - 1 / update) ** power) * (np.eye(steps)[update - 1] - average)
    one = profile(steps, length)
    np.testing.assert_allclose(
        np.concatenate([one.weights(0, 7), one.weights(7, steps)]), average, rtol=1e-10, atol=1e-15
    )
    assert one.weights(0, steps + 9).sum() == pytest.approx(1)
    deviation = np.sqrt(
        (average * np.arange(steps) ** 2).sum() - (average * np.arange(steps)).sum() ** 2
    )
    assert deviation / steps == pytest.approx(length, rel=0.05)  # continuous time against steps


def test_mixing_an_average_that_is_held_takes_it_alone() -> None:
    held = [profile(step, length) for step in (100, 80, 60) for length in (0.05, 0.1)]
    weights, misfit = mixing_weights(held, held[0])
    assert weights == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-6)
    assert misfit < 1e-4


def test_mixing_a_length_between_gives_nearly_its_average_of_any_sequence() -> None:
    """Hold the mix against the average kept in training, on a drifting, noisy sequence of
    weights.
    """
    steps = 2000
    weights = 100 + np.cumsum(np.random.default_rng(0).standard_normal((steps, 8)), axis=0)

    def average(step: int, length: float) -> np.ndarray:
        return profile(step, length).weights(0, steps) @ weights

    kept = [(step, length) for step in range(125, steps + 1, 125) for length in (0.05, 0.1)]
    mix, misfit = mixing_weights([profile(*one) for one in kept], profile(steps, 0.075))
    mixed = sum(weight * average(*one) for weight, one in zip(mix, kept, strict=True))
    expected = average(steps, 0.075)
    assert misfit < 0.02
    assert mix.sum() == pytest.approx(1)
    apart = np.abs(average(steps, 0.05) - expected).max()
    assert np.abs(mixed - expected).max() < 0.05 * apart


def test_mixing_a_length_far_from_those_held_says_so() -> None:
    assert mixing_weights([profile(100, 0.05)], profile(100, 0.2))[1] > 0.3
