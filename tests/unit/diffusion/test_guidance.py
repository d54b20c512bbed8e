"""Classifier-free guidance: its formula and its passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.diffusion.guidance import choose_scale, guided
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
    scale: float, *, labels: Tensor = LABELS, channels: int = 2, two_passes: bool = False
) -> tuple[Tensor, list[tuple[Tensor, Tensor, list[int]]]]:
    """Return the guided prediction, and what the denoiser was asked for."""
    calls = []

    def denoiser(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        calls.append((latents, timestep, condition.labels_B.tolist()))
        return answer(latents, timestep, condition.labels_B)

    options = {"scale": scale, "channels": channels, "two_passes": two_passes}
    return guided(denoiser, LATENTS, TIMESTEP, ClassCondition(labels, NULL), **options), calls


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
