"""Choosing an objective; draws that depend on (seed, step, slot) only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.diffusion import build_objective
from promoe_ds.diffusion.objective import DiffusionBatch, draw_batch
from promoe_ds.randomness import generator

from ..builders import random_tensor

NULL = 10
SHAPE = (2, 3, 3)


def draw(
    slots: list[int] | range, *, seed: int = 0, step: int = 0, **config: Any
) -> DiffusionBatch:
    """Draw for samples whose clean latents and labels are functions of the slot."""
    clean = torch.stack([random_tensor(*SHAPE, seed=slot) for slot in slots])
    labels = torch.tensor([slot % NULL for slot in slots])
    objective = build_objective(DiffusionConfig(**config))
    return draw_batch(
        clean, ClassCondition(labels, NULL), objective, seed=seed, step=step, slots=slots
    )


def parts(batch: DiffusionBatch) -> tuple[Tensor, ...]:
    return batch.clean_BZHW, batch.noise_BZHW, batch.sigma_B, batch.condition.labels_B


# Draws.


@given(
    order=st.permutations(range(8)),
    cut=st.integers(1, 7),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**6),
    objective=st.sampled_from(["rectified_flow", "ddpm"]),
)
def test_draws_do_not_depend_on_how_the_batch_is_cut_and_ordered(
    order: list[int], cut: int, seed: int, step: int, objective: str
) -> None:
    options = {"seed": seed, "step": step, "label_dropout": 0.5, "objective": objective}
    batches = (draw(slots, **options) for slots in (range(8), order[:cut], order[cut:]))
    for whole, first, second in zip(*map(parts, batches), strict=True):
        assert torch.equal(whole[order], torch.cat([first, second]))


def test_draws_of_slots_and_steps_and_seeds_differ() -> None:
    # Step and slot do not take each other's place.
    batches = [draw(range(2)), draw(range(2), step=1), draw([0, 5], step=2), draw([2], step=5)]
    batches.append(draw(range(2), seed=1))
    noises = [noise for batch in batches for noise in batch.noise_BZHW]
    sigmas = [sigma.item() for batch in batches for sigma in batch.sigma_B]
    assert len({noise.numpy().tobytes() for noise in noises}) == len(noises)
    assert len(set(sigmas)) == len(sigmas)


def test_draws_come_from_the_named_streams() -> None:
    # Part of the format of a run: a resumed one must repeat them.
    batch = draw([4], seed=3, step=7, label_dropout=0.5)
    types = [torch.float32, torch.float32, torch.float32, torch.int64]
    assert [part.dtype for part in parts(batch)] == types
    noise = generator(3, "noise", 7, 4).standard_normal(SHAPE, dtype="float32")
    sigma = 1 / (1 + math.exp(-generator(3, "sigma", 7, 4).standard_normal()))
    assert torch.equal(batch.noise_BZHW[0], torch.from_numpy(noise))
    assert batch.sigma_B.item() == pytest.approx(sigma, rel=1e-7)  # rounded to fp32
    dropped = [generator(3, "label_drop", 7, slot).random() < 0.5 for slot in range(20)]
    assert (
        draw(range(20), seed=3, step=7, label_dropout=0.5).condition.labels_B == NULL
    ).tolist() == dropped
    assert 0 < sum(dropped) < 20


def test_draws_of_ddpm_share_all_streams_but_sigma_with_the_flow() -> None:
    flow, ddpm = (
        draw(range(20), label_dropout=0.5, objective=name) for name in ("rectified_flow", "ddpm")
    )
    assert torch.equal(flow.noise_BZHW, ddpm.noise_BZHW) and torch.equal(
        flow.condition.labels_B, ddpm.condition.labels_B
    )
    assert not torch.equal(flow.sigma_B, ddpm.sigma_B)


def test_draws_of_ddpm_timestep_come_from_the_sigma_stream() -> None:
    # Part of the format of a run, as above.
    timesteps = [int(generator(3, "sigma", 7, slot).integers(1000)) for slot in range(50)]
    assert (
        draw(range(50), seed=3, step=7, objective="ddpm").sigma_B.double() * 1000
    ).round().tolist() == timesteps


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.5)])
def test_sigma_is_logit_normal(mean: float, std: float) -> None:
    sigma = draw(range(3000), sigma_mean=mean, sigma_std=std).sigma_B
    assert sigma.min() > 0 and sigma.max() < 1
    logits = sigma.double().logit()
    # Four standard errors: 4 / sqrt(3000) = 0.07 of a deviation for the mean, 0.05 for the
    # deviation.
    assert logits.mean().item() == pytest.approx(mean, abs=0.08 * std)
    assert logits.std().item() == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize(
    "given",
    [
        {"noise_levels": "uniform"},
        {"noise_levels": "mode"},
        {"noise_levels": "mode", "mode_scale": -0.8},
        {"noise_levels": "uniform", "train_shift": 3.0},
        {"train_shift": 0.5},
    ],
)
def test_sigma_has_the_quantiles_of_diffusers_density(given: dict[str, Any]) -> None:
    draws = 4000
    reference = compute_density_for_timestep_sampling(
        {"uniform": "none"}.get(kind := given.get("noise_levels", "logit_normal"), kind),
        100_000,
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=given.get("mode_scale", 1.29),
        generator=torch.Generator().manual_seed(0),
    ).double()
    shift = given.get("train_shift", 1.0)
    reference = reference * shift / (1 + (shift - 1) * reference)
    sigma = draw(range(draws), **given).sigma_B.double()
    assert sigma.min() >= 0 and sigma.max() <= 1
    # The distance of Kolmogorov and Smirnov exceeds this one time in 10,000.
    below = torch.searchsorted(reference.sort().values, sigma.sort().values) / len(reference)
    assert (below - torch.arange(draws) / draws).abs().max() < 2.3 / math.sqrt(draws)


def test_label_dropout_has_its_rate_and_keeps_the_other_labels_and_draws() -> None:
    batch, whole = (draw(range(3000), label_dropout=rate) for rate in (0.1, 0.0))
    dropped = batch.condition.labels_B == NULL
    # Four standard errors.
    assert dropped.double().mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / 3000))
    assert torch.equal(batch.condition.labels_B[~dropped], whole.condition.labels_B[~dropped])
    for part, other in zip(parts(batch)[:3], parts(whole)[:3], strict=True):
        assert torch.equal(part, other)
    assert whole.condition.labels_B.max() < NULL
    assert (draw(range(6), label_dropout=1.0).condition.labels_B == NULL).all()
