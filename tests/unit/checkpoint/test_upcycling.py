"""Upcycling whole models: every method, what is preserved and how near, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from promoe_ds import load_model
from promoe_ds.checkpoint.conversion import UpcycleRequest, upcycle
from promoe_ds.checkpoint.conversion.convert import open_source
from promoe_ds.config import RunConfig
from promoe_ds.errors import CheckpointError, ConfigError

from ..builders import METHODS, MODERN, of_method, random_network, save_export, small_config


def export_dense(folder: Path, **sections: Any) -> Path:
    network = random_network(**sections, routing={"method": "dense"})
    return save_export(folder, network, step=5, kind="ema")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return export_dense(tmp_path / "dense")


def go(dense: Path, name: str, config: RunConfig, **options: Any) -> tuple[str, dict[str, float]]:
    """Upcycle into a folder beside the dense model; return the note and the differences."""
    request = UpcycleRequest(destination=dense.with_name(name), **options)
    report, differences = upcycle(dense, config, request)
    return report.note, differences


@pytest.mark.parametrize("method", METHODS)
def test_upcycle_null_samples_keep_the_dense_output_for_every_method(
    dense: Path, method: str
) -> None:
    note, differences = go(dense, "new", small_config(**of_method(method)))
    assert differences["null samples"] < 1e-5
    assert differences["conditional samples"] < 1.0
    is_exact = method == "hash"  # whose gates add up to 1
    kept = "exactly" if is_exact else "on average over the gates"
    assert f"for null samples: exactly; for conditional tokens: {kept}" in note
    assert (differences["conditional samples"] < 1e-5) == is_exact
    old, new = open_source(dense), open_source(dense.with_name("new"))
    assert new.info.step == 0
    for name in new.kinds["weights"]:
        if ".moe." not in name:
            assert torch.equal(new.read("weights", name), old.read("ema", name)), name


def test_upcycle_into_a_shared_expert_that_holds_all_is_exact(dense: Path) -> None:
    config = small_config(routing={"shared_expert_width": 64})
    note, differences = go(dense, "new", config, to="single")
    assert max(differences.values()) < 1e-6
    assert "for conditional tokens: exactly" in note


def test_upcycle_of_a_modern_block_keeps_the_dense_output_of_null_samples(tmp_path: Path) -> None:
    config = small_config(**MODERN, routing={"expert_width": 16})
    note, differences = go(export_dense(tmp_path / "dense", **MODERN), "new", config)
    assert "16 hidden units to the shared experts, 16 to each" in note
    assert differences["null samples"] < 1e-5
    assert differences["conditional samples"] < 1.0


@pytest.mark.parametrize(
    ("saved", "recipe", "expected"),
    [
        ({"latent_scale": 0.5, "latents_mean": (0.1,)}, {}, (0.5, (0.1,))),
        ({"latent_scale": 0.5}, {"latent_scale": 0.25}, (0.5, ())),
        ({}, {"latent_scale": 0.25}, (0.25, ())),
    ],
)
def test_upcycle_keeps_what_latents_were_normalised_by(
    tmp_path: Path, saved: dict, recipe: dict, expected: tuple
) -> None:
    """Samples are decoded by it, and a recipe that leaves it to its data does not know it."""
    dense = export_dense(tmp_path / "dense", data=saved)
    go(dense, "new", small_config(data=recipe), to="single", prototypes="random")
    data = open_source(tmp_path / "new").info.config.data
    assert (data.latent_scale, data.latents_mean) == expected


def test_upcycle_scaled_prototypes_at_tokens_are_nearer_than_random_ones(dense: Path) -> None:
    config = small_config()
    _, differences = go(dense, "kmeans", config, to="single")
    note, unmeasured = go(dense, "random", config, to="single", prototypes="random")
    assert unmeasured == {}
    assert "in part only: gates differ from 1" in note
    assert "--noise 1 was added" in go(dense, "noised", config, to="single", noise=1.0)[0]
    latents, labels = torch.randn(64, 1, 4, 4), torch.arange(64) % 10
    timestep = torch.full((64,), 500.0)
    with torch.no_grad():
        expected, *found = (
            load_model(dense.with_name(name))(latents, timestep, labels)
            for name in ("dense", "kmeans", "random")
        )
    scaled, unscaled = ((value - expected).norm() / expected.norm() for value in found)
    assert scaled < 0.9 * unscaled
    assert differences["conditional samples"] < unscaled


@pytest.mark.parametrize(
    ("sections", "options", "error", "message"),
    [
        ({"routing": {"method": "dense"}}, {}, ConfigError, "has no experts"),
        ({"model": {"hidden_size": 32}}, {}, CheckpointError, "model.hidden_size is 16"),
        (MODERN, {}, CheckpointError, "model.block is 'dit' there and 'modern' here"),
        (
            {"diffusion": {"objective": "ddpm"}},
            {},
            CheckpointError,
            "diffusion.objective is 'rectified_flow'",
        ),
        (of_method("kmeans"), {"prototypes": "random"}, ConfigError, "has no random start"),
        ({}, {"weights": "raw"}, CheckpointError, "holds no raw weights, only ema"),
        ({"routing": {"num_experts": 12}}, {"images": 2}, ConfigError, "routing.num_experts=12"),
    ],
)
def test_upcycle_what_does_not_fit_is_refused(
    dense: Path, sections, options, error, message
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        go(dense, "new", small_config(**sections), **options)
    assert not dense.with_name("new").exists()


def test_upcycle_of_experts_or_into_something_is_refused(dense: Path) -> None:
    config = small_config()
    go(dense, "new", config, to="single")
    with pytest.raises(CheckpointError, match=r"no dense model \(routing.method=token_choice\)"):
        go(dense.with_name("new"), "again", config)
    with pytest.raises(CheckpointError, match="exists already"):
        go(dense, "new", config)
