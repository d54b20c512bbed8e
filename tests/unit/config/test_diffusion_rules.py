"""Which objective goes with which fields and samplers, and what is said where they do not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest

from promoe_ds.config.diffusion import SOLVERS
from promoe_ds.errors import ConfigError

from ..builders import small_config

DDPM = {"objective": "ddpm"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"diffusion": {**DDPM, "shift": 3.0}},
            "diffusion: shift=3.0 has no use for objective=ddpm: leave it out",
        ),
        (
            {"diffusion": {**DDPM, "sigma_mean": -0.5}},
            "diffusion: sigma_mean=-0.5 has no use for objective=ddpm: leave it out",
        ),
        (
            {"diffusion": {**DDPM, "sigma_std": 2.0}},
            "diffusion: sigma_std=2.0 has no use for objective=ddpm: leave it out",
        ),
        (
            {"diffusion": {**DDPM, "num_train_timesteps": 20}},
            (
                "diffusion: num_train_timesteps=20: the linear schedule of objective=ddpm needs"
                " more than 20, or its last step would keep nothing of the image"
            ),
        ),
        (
            {"diffusion": DDPM, "model": {"learn_sigma": False}},
            (
                "diffusion.objective=ddpm learns the variance, but model.learn_sigma=false has no"
                " channels for it: set model.learn_sigma=true"
            ),
        ),
        (
            {"diffusion": DDPM, "sampling": {"solver": "euler"}},
            (
                "sampling.solver=euler cannot sample diffusion.objective=ddpm: set it to ddpm or"
                " ddim, or to auto"
            ),
        ),
        (
            {"sampling": {"solver": "ddpm"}},
            (
                "sampling.solver=ddpm cannot sample diffusion.objective=rectified_flow: set it to"
                " euler, heun, unipc or dpmpp, or to auto"
            ),
        ),
        (
            {"sampling": {"solver": "ddim"}},
            (
                "sampling.solver=ddim cannot sample diffusion.objective=rectified_flow: set it to"
                " euler, heun, unipc or dpmpp, or to auto"
            ),
        ),
        (
            {"diffusion": DDPM, "sampling": {"steps": 1001}},
            (
                "sampling.steps=1001: diffusion.objective=ddpm is sampled in 2 ..."
                " diffusion.num_train_timesteps=1000 steps"
            ),
        ),
        (
            {"diffusion": {**DDPM, "num_train_timesteps": 100}},
            (
                "sampling.steps=250: diffusion.objective=ddpm is sampled in 2 ..."
                " diffusion.num_train_timesteps=100 steps"
            ),
        ),
        (
            {"diffusion": DDPM, "sampling": {"steps": 1}},
            (
                "sampling.steps=1: diffusion.objective=ddpm is sampled in 2 ..."
                " diffusion.num_train_timesteps=1000 steps"
            ),
        ),
    ],
)
def test_diffusion_fields_that_contradict_are_refused(
    sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        small_config(**sections)


def test_ddpm_takes_the_flow_fields_at_their_defaults() -> None:
    # As a saved config states them.
    config = small_config(diffusion={**DDPM, "shift": 1.0, "sigma_mean": 0.0, "sigma_std": 1.0})
    assert config.diffusion == small_config(diffusion=DDPM).diffusion


def test_flow_takes_any_number_of_steps() -> None:
    assert small_config(sampling={"steps": 2000}).sampling.steps == 2000
    assert small_config(sampling={"steps": 1}).sampling.steps == 1


@pytest.mark.parametrize(
    ("objective", "solver", "expected"),
    [
        ("rectified_flow", "auto", "euler"),
        ("rectified_flow", "euler", "euler"),
        ("ddpm", "auto", "ddpm"),
        ("ddpm", "ddpm", "ddpm"),
        ("ddpm", "ddim", "ddim"),
    ],
)
def test_solver_auto_follows_the_objective(objective: str, solver: str, expected: str) -> None:
    config = small_config(diffusion={"objective": objective}, sampling={"solver": solver})
    assert config.resolved_solver == expected
    assert expected in config.diffusion.solvers == SOLVERS[objective]
