"""The straight path, its velocity and the loss."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.condition import ClassCondition
from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.diffusion.objective import DiffusionBatch
from promoe_ds.diffusion.rectified_flow import RectifiedFlow

from ..builders import random_tensor

SHAPE = (2, 3, 3)
FLOW = RectifiedFlow(DiffusionConfig())


def make_batch(sigma: list[float]) -> DiffusionBatch:
    clean, noise = (random_tensor(len(sigma), *SHAPE, seed=s) for s in (0, 1))
    return DiffusionBatch(
        clean, noise, torch.tensor(sigma), ClassCondition(torch.arange(len(sigma)), 10**6)
    )


def loss_of(prediction: torch.Tensor, batch: DiffusionBatch) -> torch.Tensor:
    """Return the only term of the loss."""
    losses = FLOW.losses(prediction, batch)
    assert list(losses) == ["diffusion"]
    return losses["diffusion"]


def test_path_is_the_straight_line_of_each_image() -> None:
    batch = make_batch([0.0, 0.25, 0.5, 1.0])
    pairs = zip(batch.sigma_B.tolist(), batch.clean_BZHW, batch.noise_BZHW, strict=True)
    expected = torch.stack([(1 - sigma) * clean + sigma * noise for sigma, clean, noise in pairs])
    assert torch.equal(FLOW.noised(batch), expected)


def test_velocity_is_the_derivative_of_the_path() -> None:
    batch = make_batch([0.25, 0.5])
    assert torch.equal(FLOW.target(batch), batch.noise_BZHW - batch.clean_BZHW)
    further = DiffusionBatch(
        batch.clean_BZHW, batch.noise_BZHW, batch.sigma_B + 0.25, batch.condition
    )
    # fp32 rounding of the two points.
    torch.testing.assert_close(
        (FLOW.noised(further) - FLOW.noised(batch)) / 0.25, FLOW.target(batch), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("num_train_timesteps", [1, 1000])
def test_flow_timestep_is_sigma_times_num_train_timesteps_not_rounded(
    num_train_timesteps: int,
) -> None:
    flow = RectifiedFlow(DiffusionConfig(num_train_timesteps=num_train_timesteps))
    batch = make_batch([0.0, 0.12345678, 1.0])
    assert torch.equal(flow.timestep(batch), batch.sigma_B * num_train_timesteps)


def test_loss_is_the_mean_of_squares_over_the_latents_channels() -> None:
    batch = make_batch([0.25, 0.5])
    prediction = random_tensor(2, *SHAPE, seed=5)
    squares = (prediction.double() - FLOW.target(batch).double()).square()
    assert loss_of(prediction, batch).item() == pytest.approx(squares.mean().item(), rel=1e-6)
    assert loss_of(FLOW.target(batch), batch) == 0
    beyond = torch.full((2, *SHAPE), torch.nan)
    wide = torch.cat([prediction, beyond], dim=1).requires_grad_()
    loss = loss_of(wide, batch)
    loss.backward()
    assert torch.equal(loss, loss_of(prediction, batch)) and not wide.grad[:, 2:].any()


def test_loss_of_bf16_prediction_is_formed_in_fp32() -> None:
    batch = make_batch([0.25, 0.5])
    prediction = random_tensor(2, *SHAPE, seed=5, dtype=torch.bfloat16)
    loss = loss_of(prediction, batch)
    assert loss.dtype == torch.float32 and torch.equal(loss, loss_of(prediction.float(), batch))
