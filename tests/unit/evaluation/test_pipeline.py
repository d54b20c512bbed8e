"""The diffusers pipeline: what it refuses to make images of."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from promoe_ds import ProMoEPipeline, ProMoETransformer2DModel
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.online import OnlineEvaluation
from promoe_ds.evaluation.sample_request import SampleRequest, make_plan

from ..builders import small_config


def make_pipeline(vae: AutoencoderKL | None = None, **sections: Any) -> ProMoEPipeline:
    transformer = ProMoETransformer2DModel(run=small_config(**sections).model_dump(mode="json"))
    for parameter in transformer.parameters():
        torch.nn.init.zeros_(parameter)
    return ProMoEPipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae)


def test_pipeline_of_latents_of_one_channel_needs_a_vae_for_images() -> None:
    latents = make_pipeline(data={"dataset": "latents", "latent_scale": 0.5})
    with pytest.raises(ConfigError, match="output_type='np': latents of 1 channels need a vae"):
        latents([0], num_inference_steps=2, output_type="np")
    assert latents([0], num_inference_steps=2, output_type="latent").images.shape == (1, 1, 4, 4)
    assert make_pipeline()([0], num_inference_steps=2, output_type="np").images.shape == (
        1,
        4,
        4,
        1,
    )


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_pipeline_takes_labels_of_arrays_and_tensors_and_refuses_no_steps(kind: Any) -> None:
    pipeline = make_pipeline()
    images = pipeline(kind([0, 1, 2]), num_inference_steps=2, output_type="np").images
    assert images.shape == (3, 4, 4, 1)
    for none in ([], None, kind([])):
        with pytest.raises(ConfigError, match=r"class_labels=\[\]: this model knows"):
            pipeline(none, num_inference_steps=2)
    with pytest.raises(ConfigError, match="num_inference_steps=-1: must be at least 1"):
        pipeline(kind([0]), num_inference_steps=-1)


def test_pipeline_of_a_model_that_is_not_square_draws_its_size(tmp_path: Path) -> None:
    pipeline = make_pipeline(model={"input_size": [2, 6]})
    pipeline.save_pretrained(tmp_path)
    for each in (pipeline, ProMoEPipeline.from_pretrained(tmp_path)):
        assert each.transformer.run_config.model.input_size == (2, 6)
        images = each([0, 1], num_inference_steps=2, output_type="np").images
        assert images.shape == (2, 2, 6, 1)


@pytest.mark.parametrize(
    ("data", "fits"),
    [
        ({"latent_scale": 0.5}, False),
        ({"latent_scale": 0.5, "latents_mean": (0.1159,)}, True),
        ({"latent_scale": 0.4, "latents_mean": (0.1159,)}, False),
        ({"latents_mean": (0.2,), "latents_std": (3.0,), "latent_normalization": "channel"}, True),
        ({"latent_normalization": "none"}, True),
    ],
)
def test_pipeline_takes_the_vae_whose_normalisation_the_model_was_trained_on(
    data: dict, fits: bool
) -> None:
    vae = AutoencoderKL(
        latent_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1159,
    )
    pipeline = make_pipeline(vae, data={"dataset": "latents", **data})
    with nullcontext() if fits else pytest.raises(ConfigError, match=r"vae: has 1 .*less 0\.1159"):
        pipeline([0], num_inference_steps=2)


def test_guidance_by_an_untrained_label_is_refused_where_it_is_asked_for_and_off_where_not() -> (
    None
):
    pipeline = make_pipeline(diffusion={"label_dropout": 0.0})
    with pytest.raises(ConfigError, match=r"guidance_scale.*label_dropout"):
        pipeline([0], num_inference_steps=2, guidance_scale=1.5)
    assert pipeline._plan(2, None).cfg_scale == 1.0
    config = small_config(diffusion={"label_dropout": 0.0}, evaluation={"cfg_scale": 1.5})
    with pytest.raises(ConfigError, match=r"evaluation\.cfg_scale.*label_dropout"):
        OnlineEvaluation(
            config, DistributedContext(rank=0, world_size=1, device=torch.device("cpu"))
        )
    request = {"model": Path("m"), "out": Path("o")}
    assert make_plan(SampleRequest(**request), config).cfg_scale == 1.0
    with pytest.raises(ConfigError, match=r"--cfg-scale.*label_dropout"):
        make_plan(SampleRequest(**request, cfg_scale=1.5), config)
