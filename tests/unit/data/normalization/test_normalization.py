"""What latents are normalised by: chosen, measured, inverted, and what is said of a wrong one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from promoe_ds.config import RunConfig
from promoe_ds.data import build_dataset, with_resolved_data
from promoe_ds.data.encode import encode
from promoe_ds.data.normalization.check import normalization_problem
from promoe_ds.data.normalization.statistics import LatentStatistics, measure, merge
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.data.shards import measure_folder, read_index
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import ConfigError, DataError

from ...builders import random_tensor, small_config
from ..made import SCALE, copy_of, request, save_vae

TEAM = single_process()
#: Of four channels: what is subtracted and divided by.
MEAN, STD = (3.0, -2.0, 0.5, 8.0), (4.0, 5.0, 2.0, 3.0)
PER_CHANNEL = LatentNormalization(latents_mean=MEAN, latents_std=STD)
SCALED = LatentNormalization(latent_scale=0.2)
SHIFTED = LatentNormalization(latent_scale=0.2, latents_mean=(2.0,))
EXPECTED = LatentStatistics(count=10**6, mean=MEAN, std=STD)


def raw_latents(count: int = 64) -> Tensor:
    """Return latents of those means and deviations, as an autoencoder makes them."""
    return PER_CHANNEL.denormalize(random_tensor(count, 4, 4, 4))


# The value.


@pytest.mark.parametrize("normalization", [SCALED, SHIFTED, PER_CHANNEL])
def test_normalisation_and_its_inverse_are_what_diffusers_pipelines_compute(
    normalization: LatentNormalization,
) -> None:
    raw = raw_latents()
    found = normalization.normalize(raw)
    mean, std = (
        torch.tensor(values or (default,), dtype=torch.float64).view(-1, 1, 1)
        for values, default in ((normalization.latents_mean, 0), (normalization.latents_std, 1))
    )
    expected = (raw.double() - mean) / std * normalization.latent_scale
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normalization.denormalize(found), raw, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("scale", [1.0, 0.18215, 0.3611])
def test_normalisation_by_one_scale_is_bit_for_bit_the_product_and_quotient(scale: float) -> None:
    latents, by = raw_latents(), LatentNormalization(latent_scale=scale)
    assert torch.equal(by.normalize(latents), latents.clone().mul_(scale))
    assert torch.equal(by.denormalize(latents), latents / scale)
    assert torch.equal(by.denormalize(latents.bfloat16()), latents.bfloat16() / scale)


# What is measured.


def test_statistics_of_moments_are_those_of_drawn_latents_however_they_are_split() -> None:
    moments = torch.cat([raw_latents(700), random_tensor(700, 4, 4, 4, seed=1)], dim=1)
    found = measure([moments, moments.flip(3)], has_posterior=True)
    means, log_variances = moments.double().chunk(2, dim=1)
    variance, mean = torch.var_mean(means, dim=(0, 2, 3), correction=0)
    deviation = (variance + log_variances.exp().mean(dim=(0, 2, 3))).sqrt()
    assert found.count == 2 * 700 * 16
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.std, deviation, rtol=1e-12)
    parts = [measure([part], has_posterior=True) for part in moments.split((1, 300, 399))]
    whole = merge([measure([moments], has_posterior=True)])
    assert merge(parts) == merge(parts[::-1])
    np.testing.assert_allclose(merge(parts).std, whole.std, rtol=1e-14)
    assert measure([moments[:0]], has_posterior=True) is None


def test_index_holds_the_statistics_of_its_latents_and_earlier_ones_are_measured(
    made: Path, tmp_path: Path
) -> None:
    folder, index = copy_of(made, tmp_path), read_index(made / "latents")
    path = folder / "index.json"
    earlier = {k: v for k, v in json.loads(path.read_text()).items() if k != "statistics"}
    for name in ("shift_factor", "latents_mean", "latents_std"):
        del earlier["vae"][name]
    path.write_text(json.dumps(earlier))
    assert read_index(folder) == msgspec.structs.replace(index, statistics=None)
    indices = np.arange(15)
    taken = [open_as(where).take(indices, indices)[0] for where in (folder, made / "latents")]
    assert torch.equal(*taken)
    encode(request(made, folder), TEAM)  # an earlier version's is recognised: nothing to do
    with pytest.raises(DataError, match=r"no measured statistics: .*--measure"):
        open_as(folder, latent_normalization="channel", latent_scale=1.0)
    assert measure_folder(folder, TEAM) == read_index(folder) == index
    by = open_as(folder, latent_normalization="channel", latent_scale=1.0).normalization
    assert (by.latents_mean, by.latents_std) == (index.statistics.mean, index.statistics.std)
    # The statistics of 15 images, mirrored or not, drawn 200 times each.
    drawn = open_as(folder, latent_normalization="channel", latent_scale=1.0)
    many = drawn.take(np.arange(3000) % 15, np.arange(3000))[0]
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05
    path.unlink()
    with pytest.raises(DataError, match=r"no index\.json there"):
        measure_folder(folder, TEAM)


def test_index_with_statistics_of_other_channels_is_refused(made: Path, tmp_path: Path) -> None:
    folder = copy_of(made, tmp_path)
    values = json.loads((folder / "index.json").read_text())
    for mean, std in (([0.0, 1.0], [1.0, 1.0]), ([0.0], [-1.0]), ([0.0], [])):
        values["statistics"] = {"count": 9, "mean": mean, "std": std}
        (folder / "index.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match=r"index\.json: not a readable index"):
            read_index(folder)


# What is chosen.


def open_as(path: Path, **data: Any) -> Any:
    common = {"dataset": "latents", "path": str(path), "latent_scale": SCALE}
    return build_dataset(small_config(data={**common, **data}))


@pytest.fixture(scope="module")
def stated(made: Path, tmp_path_factory) -> Path:
    """Return latents of an autoencoder whose config states scale, shift, mean and deviation."""
    folder = tmp_path_factory.mktemp("stated")
    (folder / "images").symlink_to(made / "images")
    save_vae(folder / "vae", shift_factor=0.25, latents_mean=[0.5], latents_std=[2.0])
    encode(request(folder, "latents"), TEAM)
    return folder / "latents"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, {"latent_scale": SCALE, "latents_mean": (0.5,), "latents_std": (2.0,)}),
        ({"latent_normalization": "scale"}, {"latent_scale": SCALE, "latents_mean": (0.25,)}),
        ({"latent_normalization": "none"}, {}),
        (
            {"latent_normalization": "channel", "latents_mean": [7.0], "latents_std": [3.0]},
            {"latents_mean": (7.0,), "latents_std": (3.0,)},
        ),
        (
            {"latent_scale": 0.25, "latents_mean": [0.5]},
            {"latent_scale": 0.25, "latents_mean": (0.5,)},
        ),
    ],
)
def test_normalisation_is_the_recipes_or_what_the_autoencoder_states_and_is_kept_in_the_config(
    stated: Path, data: dict, expected: dict
) -> None:
    values = {"dataset": "latents", "path": str(stated), **data}
    config = small_config(data=values)
    dataset = build_dataset(config)
    assert dataset.normalization == LatentNormalization(**expected)
    resolved = with_resolved_data(config, dataset)
    again = RunConfig.model_validate(resolved.model_dump(mode="json"))
    assert LatentNormalization.of(again.data) == dataset.normalization
    assert build_dataset(again).normalization == dataset.normalization


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"latent_scale": 0.25}, r"tiny has 1 .*less 0\.5.* by 0\.5, .* by 0\.25"),
        ({"latent_normalization": "scale", "latent_scale": 0.5}, r"less 0\.25, scaled by 0\.5"),
    ],
)
def test_normalisation_that_contradicts_the_autoencoders_is_refused(
    stated: Path, data: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_as(stated, **{"latent_scale": 1.0, **data})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"latent_normalization": "none", "latent_scale": 0.5}, "latent_scale=0.5 has no use"),
        ({"latent_normalization": "channel", "latent_scale": 0.5}, "latent_scale=0.5 has no use"),
        ({"latent_normalization": "scale", "latents_std": [2.0]}, "latents_std=(2.0,) has no use"),
        ({"latents_mean": [1.0, 2.0]}, "data.latents_mean has 2 values, but model.in_channels=1"),
        ({"latents_std": [0.0]}, "latents_std=(0.0,)"),
        ({"latents_normalized": True, "latent_normalization": "none"}, "does not say by what"),
        ({"latents_normalized": True, "dataset": "digits"}, "has no use for dataset=digits"),
    ],
)
def test_normalisation_whose_fields_contradict_each_other_is_refused(
    data: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        small_config(data={"dataset": "latents", **data})


def test_normalisation_by_scale_of_latents_that_say_none_is_refused(
    made: Path, tmp_path: Path
) -> None:
    folder = copy_of(made, tmp_path)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=r"latent_normalization=scale, .*data\.latent_scale"):
        open_as(folder, latent_scale=1.0, latent_normalization="scale")
    assert open_as(folder, latent_scale=1.0).normalization.is_identity


def test_latents_stored_normalised_are_taken_as_they_are_and_denormalised_all_the_same(
    made: Path,
) -> None:
    dataset = open_as(made / "latents", latents_normalized=True)
    taken, usual = (each.take(np.arange(3))[0] for each in (dataset, open_as(made / "latents")))
    assert torch.equal(taken * SCALE, usual)
    assert dataset.normalization == LatentNormalization(latent_scale=SCALE)


# What is wrong.


@pytest.mark.parametrize("normalization", [SCALED, SHIFTED, PER_CHANNEL])
@pytest.mark.parametrize("is_measured", [True, False])
def test_latents_normalised_as_they_should_be_pass(
    normalization: LatentNormalization, is_measured: bool
) -> None:
    normalised = normalization.normalize(raw_latents())
    expected = EXPECTED if is_measured else None
    assert normalization_problem(normalised, normalization, expected) == ""
    assert normalization_problem(normalised[:0], normalization, expected) == ""


@pytest.mark.parametrize("normalization", [SCALED, SHIFTED, PER_CHANNEL])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("twice", "scaled twice"),
        ("never", "never scaled"),
        ("other scale", "another autoencoder"),
        ("other order", "another autoencoder, or of other channels"),
    ],
)
def test_latents_normalised_wrongly_are_explained(
    normalization: LatentNormalization, wrong: str, words: str
) -> None:
    raw, used = raw_latents(), normalization
    if wrong == "twice":
        raw = normalization.normalize(raw)
    elif wrong == "never":
        used = LatentNormalization()
    elif wrong == "other scale":
        raw = raw * 4
    else:
        raw = raw[:, [3, 0, 1, 2]]
    # One scale says nothing about the order of channels: what was measured of them does.
    expected = EXPECTED if wrong == "other order" else None
    problem = normalization_problem(used.normalize(raw), used, expected)
    assert words in problem and "data.check_latents=false" in problem
    assert problem.count("twice") == (wrong == "twice")


def test_latents_that_were_stored_too_small_are_explained() -> None:
    small = random_tensor(64, 4, 4, 4) * 0.18
    assert "before they were stored" in normalization_problem(small, LatentNormalization(), None)


def test_latents_of_a_constant_channel_are_compared_and_not_divided_by_it() -> None:
    raw = raw_latents()
    raw[:, 2] = 0.5
    measured = measure([raw], has_posterior=False)
    assert normalization_problem(SCALED.normalize(raw), SCALED, measured) == ""
