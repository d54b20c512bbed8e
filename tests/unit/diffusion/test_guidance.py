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


class Recorder:
    """A denoiser whose answer depends on all of its inputs, and which keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        self.calls.append((latents, timestep, condition.labels_B))
        return self.answer(latents, timestep, condition.labels_B)

    @staticmethod
    def answer(latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        factor = ((labels + 1) * timestep).view(-1, 1, 1, 1)
        return torch.cat([latents * factor, latents - factor], dim=1)  # twice the channels


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return random_tensor(3, 2, 4, 4), torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0, 3, 9])


@pytest.mark.parametrize("scale", [1.5, 4.0])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_guidance_is_null_plus_scale_times_the_difference_on_its_channels(
    scale: float, channels: int
) -> None:
    latents, timestep, labels = inputs()
    result = guided(
        Recorder(), latents, timestep, ClassCondition(labels, NULL), scale=scale, channels=channels
    )
    conditional = Recorder.answer(latents, timestep, labels)
    unconditional = Recorder.answer(latents, timestep, torch.full((3,), NULL))
    assert result.shape == (3, 4, 4, 4)
    assert torch.equal(
        result[:, :channels], (unconditional + scale * (conditional - unconditional))[:, :channels]
    )
    assert torch.equal(result[:, channels:], conditional[:, channels:])


def test_guidance_makes_one_call_with_both_halves() -> None:
    recorder = Recorder()
    latents, timestep, labels = inputs()
    guided(recorder, latents, timestep, ClassCondition(labels, NULL), scale=2.0, channels=2)
    ((both, timesteps, all_labels),) = recorder.calls
    assert torch.equal(both, torch.cat([latents, latents]))
    assert torch.equal(timesteps, torch.cat([timestep, timestep]))
    assert all_labels.tolist() == [0, 3, 9, NULL, NULL, NULL]


def test_guidance_in_two_passes_gives_the_same_formula_one_half_after_the_other() -> None:
    recorder = Recorder()
    latents, timestep, labels = inputs()
    result = guided(
        recorder,
        latents,
        timestep,
        ClassCondition(labels, NULL),
        scale=2.0,
        channels=2,
        two_passes=True,
    )
    assert [call[2].tolist() for call in recorder.calls] == [[0, 3, 9], [NULL] * 3]
    assert torch.equal(
        result,
        guided(Recorder(), latents, timestep, ClassCondition(labels, NULL), scale=2.0, channels=2),
    )


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_guidance_scale_up_to_one_makes_one_conditional_pass(scale: float) -> None:
    recorder = Recorder()
    latents, timestep, labels = inputs()
    result = guided(
        recorder, latents, timestep, ClassCondition(labels, NULL), scale=scale, channels=2
    )
    assert [labels.tolist() for _, _, labels in recorder.calls] == [[0, 3, 9]]
    assert torch.equal(result, Recorder.answer(*inputs()))


def test_guidance_of_null_labels_changes_nothing() -> None:
    latents, timestep, _ = inputs()
    labels = torch.full((3,), NULL)
    result = guided(
        Recorder(), latents, timestep, ClassCondition(labels, NULL), scale=3.0, channels=2
    )
    assert torch.equal(result, Recorder.answer(latents, timestep, labels))


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
