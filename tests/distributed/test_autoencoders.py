"""Autoencoders of every kind, each the whole way: images to latents, training on two ranks,
samples, a diffusers pipeline; and a wrong normalisation, which ends both ranks at the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from promoe_ds import ProMoEPipeline
from promoe_ds.checkpoint.conversion.convert import Request, convert
from promoe_ds.config import RunConfig, load_config
from promoe_ds.data import build_dataset
from promoe_ds.data.encode import encode
from promoe_ds.data.normalization.statistics import measure
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.data.shards import Shard, read_index
from promoe_ds.data.vae import Vae
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.images import to_uint8
from promoe_ds.evaluation.sample_job import draw_samples
from promoe_ds.evaluation.sample_request import SampleRequest
from promoe_ds.model.export import read_export_config

from ..unit.data.made import request, save_images, save_vae
from .jobs import TINY, Job, run_jobs

#: Kind and config of each tiny autoencoder, channels, patch size; and the recipe's normalisation.
#: Their factors make the latents of randomly initialised ones about normal.
KINDS: dict[str, tuple[str, dict[str, Any], int, int, str]] = {
    "scale": ("kl", {"latent_channels": 2, "scaling_factor": 0.7}, 2, 2, "auto"),
    "shift": (
        "kl",
        {"latent_channels": 4, "scaling_factor": 0.7, "shift_factor": 0.1159},
        4,
        1,
        "auto",
    ),
    "mean and std": (
        "kl",
        {
            "latent_channels": 2,
            "scaling_factor": 1.0,
            "latents_mean": [-0.3, 0.2],
            "latents_std": [1.4, 1.5],
        },
        2,
        2,
        "auto",
    ),
    "measured": ("kl", {"latent_channels": 2, "scaling_factor": 0.1}, 2, 1, "channel"),
    "dc": ("dc", {"scaling_factor": 0.7}, 4, 1, "scale"),
    "rae": ("rae", {}, 64, 1, "auto"),
    "tiny": ("tiny", {"scaling_factor": 30.0, "shift_factor": -0.066}, 2, 2, "auto"),
}
ASKED = {"num": 5, "steps": 2, "cfg_scale": 1.0, "seed": 3, "device": "cpu"}


def overrides_of(folder: Path, name: str, **data: str) -> tuple[str, ...]:
    _, _, channels, patch_size, normalization = KINDS[name]
    values = {
        "dataset": "latents",
        "path": f"{folder / name / 'latents'}",
        "vae": "tiny",
        "latent_normalization": normalization,
        **data,
    }
    return (
        *(f"data.{field}={value}" for field, value in values.items()),
        f"model.in_channels={channels}",
        f"model.patch_size={patch_size}",
        "model.input_size=4",
        "train.max_steps=2",
    )


def recipe_of(folder: Path, name: str, **data: str) -> RunConfig:
    return load_config("digits_promoe", [*TINY, *overrides_of(folder, name, **data)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    """Encode images by every kind and train on them; return the folder, and what a run on latents
    that are scaled twice and one that allows them said.
    """
    folder = tmp_path_factory.mktemp("autoencoders")
    save_images(folder / "images")
    for name, (kind, config, *_) in KINDS.items():
        (folder / name).mkdir()
        (folder / name / "images").symlink_to(folder / "images")
        save_vae(folder / name / "vae", kind=kind, **config)
        encode(request(folder / name, "latents"), single_process())
    jobs = [
        Job(run_dir=folder / name / "run", overrides=overrides_of(folder, name)) for name in KINDS
    ]
    wrong = overrides_of(folder, "measured", latent_normalization="scale")
    for number, more in enumerate(((), ("data.check_latents=false",))):
        jobs.append(Job(run_dir=folder / f"wrong_{number}", overrides=(*wrong, *more)))
    return folder, run_jobs(2, jobs, folder)


def test_latents_of_a_wrong_normalisation_end_every_rank_unless_they_are_meant(
    trained: tuple[Path, list[str]],
) -> None:
    _, errors = trained
    assert errors[:-2] == [""] * len(KINDS)
    assert "scaled twice" in errors[-2] and errors[-1] == ""


@pytest.mark.parametrize("name", KINDS)
def test_autoencoder_the_whole_way(trained: tuple[Path, list[str]], name: str) -> None:
    folder, (kind, _, channels, _, normalization) = trained[0] / name, KINDS[name]
    index = read_index(folder / "latents")
    dataset = build_dataset(recipe_of(trained[0], name))
    assert index.kind == ("moments" if kind == "kl" else "latents")
    assert index.vae.latent_channels == channels

    # Encode and train: what the index says is what the network sees.
    by, shards = dataset.normalization, [Shard(folder / "latents" / s.file) for s in index.shards]
    parts = zip(*(shard.variants for shard in shards), strict=True)
    sides = [torch.cat(side)[:, :channels] for side in parts]
    seen = measure([by.normalize(side) for side in sides], has_posterior=False)
    expected = index.statistics.normalized(by)
    np.testing.assert_allclose(seen.mean, expected.mean, atol=1e-6)
    if index.kind == "latents":
        np.testing.assert_allclose(seen.std, expected.std, rtol=1e-6)
    means = dataset.take(np.arange(15))[0]
    assert torch.equal(means, by.normalize(sides[0]))
    torch.testing.assert_close(by.denormalize(means), sides[0], rtol=1e-6, atol=1e-6)
    if normalization != "channel":
        live = {"dataset": "images", "path": f"{folder / 'images'}", "vae": f"{folder / 'vae'}"}
        made = build_dataset(recipe_of(trained[0], name, **live, vae_dtype="fp32"))
        torch.testing.assert_close(made.take(np.arange(15))[0], means, rtol=1e-4, atol=1e-4)

    # Sample: the export alone says it all.
    for to in ("single", "diffusers"):
        vae = str(folder / "vae") if to == "diffusers" else None
        convert(folder / "run", Request(destination=folder / to, to=to, vae=vae))
    exported, _ = read_export_config(folder / "single")
    assert LatentNormalization.of(exported.data) == by
    asked = {"model": folder / "single", **ASKED}
    draw_samples(SampleRequest(**asked, out=folder / "latent_samples"))
    draw_samples(SampleRequest(**asked, out=folder / "samples", vae=str(folder / "vae")))
    latents = load_file(folder / "latent_samples" / "latents.safetensors")["latents"]
    images = np.load(folder / "samples" / "samples.npz")["arr_0"]
    assert images.shape == (5, 8, 8, 3)

    # The pipeline's latents and images are the same.
    pipeline = ProMoEPipeline.from_pretrained(folder / "diffusers")
    labels, how = list(range(5)), {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 3}
    drawn = pipeline(labels, output_type="latent", **how).images
    torch.testing.assert_close(by.denormalize(drawn), latents, rtol=1e-5, atol=1e-5)
    pixels = pipeline(labels, output_type="np", **how).images
    np.testing.assert_allclose(np.round(pixels * 255), images, atol=1)
    decoded = Vae(str(folder / "vae")).decode(latents)
    np.testing.assert_allclose(to_uint8(decoded.numpy()).astype(int), images, atol=1)

    # An autoencoder of other channels is refused wherever one is named.
    other = save_vae(folder / "other", latent_channels=3)
    with pytest.raises(ConfigError, match="has 3 latent channels"):
        draw_samples(SampleRequest(**asked, out=folder / "none", vae=str(other)))
    with pytest.raises(ConfigError, match="has 3 latent channels"):
        convert(folder / "run", Request(destination=folder / "no", to="diffusers", vae=str(other)))
