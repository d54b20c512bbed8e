"""Drawing samples from an export: the recipe's defaults, the command line's wishes, and images that keep to themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from promoe_ds.errors import ConfigError
from promoe_ds.evaluation import sampling
from promoe_ds.evaluation.sampling import SampleRequest, draw_samples
from promoe_ds.model.export import save_export

from ..builders import random_network

FLOW = {"objective": "rectified_flow"}
DDPM = {"objective": "ddpm"}


def make_export(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a model whose samples are latents, which no pixel's range cuts off."""
    network = random_network(model={"in_channels": 4}, **sections)
    save_export(folder / "export", network.state_dict(), network.config, origin={})
    return folder / "export"


def draw(export: Path, **request: Any) -> Tensor:
    """Return the samples of one request."""
    out = export.parent / f"samples{len(list(export.parent.iterdir()))}"
    draw_samples(SampleRequest(model=export, out=out, **request))
    return load_file(out / "latents.safetensors")["latents"]


@pytest.mark.parametrize(("diffusion", "request_", "expected"), [
    (FLOW, {}, ("euler", 7, 2.0)), (FLOW, {"solver": "auto"}, ("euler", 7, 2.0)), (FLOW, {"steps": 2000}, ("euler", 2000, 2.0)),
    (DDPM, {}, ("ddpm", 7, 2.0)), (DDPM, {"solver": "ddim", "steps": 5, "cfg_scale": 0.0}, ("ddim", 5, 0.0)),
])
def test_sampling_plan_is_the_recipes_unless_asked_otherwise(tmp_path, monkeypatch, diffusion, request_, expected) -> None:
    plans = []
    monkeypatch.setattr(sampling, "sample_latents", lambda model, noise, labels, plan, generators: plans.append(plan) or noise)
    export = make_export(tmp_path, diffusion=diffusion, sampling={"steps": 7, "cfg_scale": 2.0})
    draw(export, num=1, **request_)
    assert [(plan.solver, plan.steps, plan.cfg_scale) for plan in plans] == [expected]


def test_sampling_plan_keeps_the_recipes_solver(tmp_path, monkeypatch) -> None:
    plans = []
    monkeypatch.setattr(sampling, "sample_latents", lambda model, noise, labels, plan, generators: plans.append(plan) or noise)
    export = make_export(tmp_path, diffusion=DDPM, sampling={"steps": 7, "solver": "ddim"})
    draw(export, num=1)
    draw(export, num=1, solver="auto")
    assert [plan.solver for plan in plans] == ["ddim", "ddpm"]


@pytest.mark.parametrize(("diffusion", "request_", "message"), [
    (FLOW, {"solver": "ddpm"},
     "--solver=ddpm cannot sample diffusion.objective=rectified_flow: set it to euler, heun, unipc or dpmpp, or to auto"),
    (DDPM, {"solver": "euler"}, "--solver=euler cannot sample diffusion.objective=ddpm: set it to ddpm or ddim, or to auto"),
    (DDPM, {"steps": 1001}, "--steps=1001: diffusion.objective=ddpm is sampled in 2 ... diffusion.num_train_timesteps=1000 steps"),
    (DDPM, {"steps": 0}, "--steps 0: must be at least 1"),
])
def test_sampling_that_does_not_fit_the_export_is_refused(tmp_path, diffusion, request_, message) -> None:
    export = make_export(tmp_path, diffusion=diffusion)
    with pytest.raises(ConfigError) as caught:
        draw(export, num=1, **request_)
    assert str(caught.value) == message


@pytest.mark.parametrize(("diffusion", "solver"), [(FLOW, "euler"), (DDPM, "ddpm"), (DDPM, "ddim")])
def test_samples_do_not_depend_on_the_batch_size(tmp_path, diffusion, solver) -> None:
    export = make_export(tmp_path, diffusion=diffusion)
    whole, cut = (draw(export, num=7, steps=6, solver=solver, batch_size=size) for size in (7, 3))
    assert len({sample.numpy().tobytes() for sample in whole}) == 7
    # Products of other shapes may round their last fp32 digit otherwise.
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)
