"""Classifier-free guidance: its formula and its passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.diffusion.guidance import GuidedDenoiser, choose_scale
from promoe_ds.errors import ConfigError

from ..builders import random_tensor, small_config

NULL = 10


LATENTS, TIMESTEP = random_tensor(3, 2, 4, 4), torch.tensor([1.0, 0.5, 0.25])
LABELS, NULLS = torch.tensor([0, 3, 9]), torch.full((3,), NULL)


def answer(latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """Depend on all inputs, in twice the channels."""
    factor = ((labels + 1) * timestep).view(-1, 1, 1, 1)
    return torch.cat([latents * factor, latents - factor], dim=1)


def run(
    scale: float,
    *,
    labels: Tensor = LABELS,
    channels: int = 2,
    negative: Tensor | None = None,
    guide: bool = True,
    **options: Any,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, list[int]]]]:
    """Return the guided prediction, and what the denoiser was asked for."""
    calls = []

    def denoiser(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        calls.append((latents, timestep, condition.labels_B.tolist()))
        return answer(latents, timestep, condition.labels_B)

    away = None if negative is None else ClassCondition(negative, NULL)
    guided = GuidedDenoiser(
        denoiser, ClassCondition(labels, NULL), scale=scale, negative=away, **options
    )
    return guided(LATENTS, TIMESTEP, channels=channels, guide=guide), calls


@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("scale", [1.5, 4.0])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_guidance_is_null_plus_scale_times_the_difference_on_its_channels(
    scale: float, channels: int, two_passes: bool
) -> None:
    result, calls = run(scale, channels=channels, two_passes=two_passes)
    conditional, null = (answer(LATENTS, TIMESTEP, labels) for labels in (LABELS, NULLS))
    moved = null + scale * (conditional - null)
    expected = torch.cat([moved[:, :channels], conditional[:, channels:]], dim=1)
    assert result.shape == (3, 4, 4, 4) and torch.equal(result, expected)
    halves = [[0, 3, 9], [NULL] * 3]
    assert [call[2] for call in calls] == (halves if two_passes else [[*halves[0], *halves[1]]])
    if not two_passes:
        assert torch.equal(calls[0][0], torch.cat([LATENTS, LATENTS]))
        assert torch.equal(calls[0][1], torch.cat([TIMESTEP, TIMESTEP]))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_guidance_scale_up_to_one_makes_one_conditional_pass(scale: float) -> None:
    result, calls = run(scale)
    assert [labels for _, _, labels in calls] == [[0, 3, 9]]
    assert torch.equal(result, answer(LATENTS, TIMESTEP, LABELS))


@pytest.mark.parametrize("two_passes", [False, True])
def test_outside_its_interval_guidance_makes_one_conditional_pass(two_passes: bool) -> None:
    result, calls = run(3.0, guide=False, two_passes=two_passes)
    assert [labels for _, _, labels in calls] == [[0, 3, 9]]
    assert torch.equal(result, answer(LATENTS, TIMESTEP, LABELS))


@pytest.mark.parametrize("two_passes", [False, True])
def test_negative_condition_takes_the_place_of_the_null_one(two_passes: bool) -> None:
    away = torch.tensor([5, NULL, 5])
    result, calls = run(2.0, negative=away, two_passes=two_passes)
    conditional, negative = (answer(LATENTS, TIMESTEP, labels)[:, :2] for labels in (LABELS, away))
    assert torch.equal(result[:, :2], negative + 2.0 * (conditional - negative))
    assert [label for call in calls for label in call[2]] == [0, 3, 9, 5, NULL, 5]


@pytest.mark.parametrize(
    ("options", "prepared"),
    [({}, [[4, 10]]), ({"two_passes": True}, [[4], [10]]), ({"scale": 1.0}, [[4]])],
)
def test_conditions_are_prepared_once_a_sampling_call(options: dict, prepared: list) -> None:
    seen, asked = [], []

    def prepare(condition: ClassCondition) -> ClassCondition:
        seen.append(condition.labels_B.tolist())
        return ClassCondition(condition.labels_B + 100, NULL + 100)

    def denoiser(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        asked.extend(condition.labels_B.tolist())
        return latents

    guided = GuidedDenoiser(
        denoiser,
        ClassCondition(torch.tensor([4]), NULL),
        prepare=prepare,
        **{"scale": 2, **options},
    )
    for guide in (True, False, True):
        guided(LATENTS[:1], TIMESTEP[:1], channels=2, guide=guide)
    assert seen == prepared and min(asked) == 104  # nothing unprepared, the lone passes included


def test_guidance_of_null_labels_changes_nothing() -> None:
    result, _ = run(3.0, labels=NULLS)
    assert torch.equal(result, answer(LATENTS, TIMESTEP, NULLS))


@pytest.mark.parametrize(
    ("dropout", "recipe", "asked", "scale", "reason"),
    [
        (0.1, 1.5, None, 1.5, False),
        (0.1, 1.5, 4.0, 4.0, False),
        (0.1, 0.0, None, 0.0, False),
        (0.0, 1.5, None, 1.0, True),
        (1.0, 1.5, None, 1.0, True),
        (0.0, 1.0, None, 1.0, False),
        (0.0, 1.5, 1.0, 1.0, False),
    ],
)
def test_scale_is_the_recipes_unless_the_null_label_is_untrained(
    dropout, recipe, asked, scale, reason
) -> None:
    config = small_config(diffusion={"label_dropout": dropout}, sampling={"cfg_scale": recipe})
    found, why = choose_scale(config, asked, "--cfg-scale")
    assert (found, "label_dropout" in why) == (scale, reason)


@pytest.mark.parametrize(
    ("dropout", "asked"),
    [
        (0.0, 1.5),
        (1.0, 2.0),
        (0.1, 0.5),
        (0.1, 0.0),
        (0.1, -1.0),
        (0.1, float("nan")),
        (0.1, float("inf")),
    ],
)
def test_scale_that_cannot_be_is_refused_by_name(dropout: float, asked: float) -> None:
    with pytest.raises(ConfigError, match="--cfg-scale"):
        choose_scale(small_config(diffusion={"label_dropout": dropout}), asked, "--cfg-scale")
