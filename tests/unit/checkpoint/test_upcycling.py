"""Upcycling whole models: every method, what is preserved and how near, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from promoe_ds.checkpoint.conversion import UpcycleRequest, upcycle
from promoe_ds.checkpoint.conversion.convert import open_source
from promoe_ds.errors import CheckpointError, ConfigError
from promoe_ds.model.export import save_export

from ..builders import METHODS, of_method, random_network, small_config


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    network = random_network(routing={"method": "dense"})
    save_export(
        tmp_path / "dense", network.state_dict(), network.config, {"step": 5, "kind": "ema"}
    )
    return tmp_path / "dense"


@pytest.mark.parametrize("method", METHODS)
def test_upcycle_null_samples_keep_the_dense_output_for_every_method(
    dense: Path, tmp_path: Path, method: str
) -> None:
    report, differences = upcycle(
        dense, small_config(**of_method(method)), UpcycleRequest(destination=tmp_path / "new")
    )
    assert differences["null samples"] < 1e-5
    assert differences["conditional samples"] < 1.0
    assert report.step == 0
    assert (
        "for null samples: exactly; for conditional tokens: on average over the gates"
        in report.note
    )
    old, new = open_source(dense), open_source(tmp_path / "new")
    for name in new.kinds["weights"]:
        if ".moe." not in name:
            assert torch.equal(new.read("weights", name), old.read("ema", name)), name


def test_upcycle_into_a_shared_expert_that_holds_all_is_exact(dense: Path, tmp_path: Path) -> None:
    config = small_config(routing={"shared_expert_width": 64})
    report, differences = upcycle(
        dense, config, UpcycleRequest(destination=tmp_path / "new", to="single")
    )
    assert max(differences.values()) < 1e-6
    assert "for conditional tokens: exactly" in report.note


def test_upcycle_scaled_prototypes_at_tokens_are_nearer_than_random_ones(
    dense: Path, tmp_path: Path
) -> None:
    config = small_config()
    _, differences = upcycle(
        dense, config, UpcycleRequest(destination=tmp_path / "kmeans", to="single")
    )
    report, unmeasured = upcycle(
        dense,
        config,
        UpcycleRequest(destination=tmp_path / "random", to="single", prototypes="random"),
    )
    assert unmeasured == {}
    assert "in part only: gates differ from 1" in report.note
    report, _ = upcycle(
        dense, config, UpcycleRequest(destination=tmp_path / "noised", to="single", noise=1.0)
    )
    assert "for conditional tokens: in part only: --noise 1 was added" in report.note
    from promoe_ds import load_model

    old, scaled, unscaled = (load_model(tmp_path / name) for name in ("dense", "kmeans", "random"))
    latents, labels = torch.randn(64, 1, 4, 4), torch.arange(64) % 10
    with torch.no_grad():
        expected, *found = (
            network(latents, torch.full((64,), 500.0), labels)
            for network in (old, scaled, unscaled)
        )
    errors = [(value - expected).norm() / expected.norm() for value in found]
    assert errors[0] < 0.9 * errors[1]
    assert differences["conditional samples"] < errors[1]


@pytest.mark.parametrize(
    ("sections", "options", "error", "message"),
    [
        ({"routing": {"method": "dense"}}, {}, ConfigError, "has no experts"),
        ({"model": {"hidden_size": 32}}, {}, CheckpointError, "model.hidden_size is 16"),
        (
            {"diffusion": {"objective": "ddpm"}},
            {},
            CheckpointError,
            "diffusion.objective is 'rectified_flow'",
        ),
        (of_method("kmeans"), {"prototypes": "random"}, ConfigError, "has no random start"),
        ({}, {"weights": "raw"}, CheckpointError, "holds no raw weights, only ema"),
        (
            {"routing": {"num_experts": 12}},
            {"images": 2},
            ConfigError,
            "conditional tokens for routing.num_experts=12",
        ),
    ],
)
def test_upcycle_what_does_not_fit_is_refused(
    dense: Path, tmp_path: Path, sections, options, error, message
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        upcycle(
            dense, small_config(**sections), UpcycleRequest(destination=tmp_path / "new", **options)
        )
    assert not (tmp_path / "new").exists()


def test_upcycle_of_experts_or_into_something_is_refused(dense: Path, tmp_path: Path) -> None:
    config = small_config()
    upcycle(dense, config, UpcycleRequest(destination=tmp_path / "new", to="single"))
    with pytest.raises(CheckpointError, match=r"is no dense model \(routing.method=token_choice\)"):
        upcycle(tmp_path / "new", config, UpcycleRequest(destination=tmp_path / "again"))
    with pytest.raises(CheckpointError, match="exists already"):
        upcycle(dense, config, UpcycleRequest(destination=tmp_path / "new"))
