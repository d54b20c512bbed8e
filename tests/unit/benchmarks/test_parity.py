"""Parity of FP8 with float64 measures FP8, on a stand-in for Transformer Engine."""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks import parity
from promoe_ds.backends.te_layers import use_transformer_engine
from promoe_ds.errors import TrainingError
from promoe_ds.training.step import TrainingModule

from ..backends import fake_te
from ..builders import random_network, small_config

CPU = torch.device("cpu")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> fake_te._State:
    """Be a machine with Transformer Engine: its device is said to be one of CUDA, and is the
    CPU.
    """
    monkeypatch.setattr(
        "promoe_ds.backends.te_layers.require_transformer_engine",
        lambda precision, device: importlib.import_module("transformer_engine.pytorch"),
    )
    return fake_te.install(monkeypatch)


def training_module() -> TrainingModule:
    network = random_network(model={"hidden_size": 32}, diffusion={}, precision={"compute": "fp8"})
    return TrainingModule(network, use_transformer_engine(network, network.config, CPU))


def test_parity_of_a_network_in_fp8_is_that_of_fp8(library) -> None:
    library.rounds = True
    assert 1e-5 < parity.distance_to_float64(training_module(), CPU) < 0.2  # in fp32: 1e-7


def test_parity_of_a_network_that_fp8_does_not_reach_is_an_error(library) -> None:
    module = training_module()
    with pytest.raises(TrainingError, match=r"small: .* FP8"):
        parity.distance_to_float64(module, CPU)


def test_parity_of_layers_has_one_of_fp8(library, monkeypatch) -> None:
    library.rounds = True
    monkeypatch.setattr(parity, "LIBRARIES", ())  # they want a process group
    comparisons, _ = parity.layer_comparisons(
        small_config(model={"hidden_size": 32}), CPU, torch.float32
    )
    errors = {name: compare() for name, compare in comparisons.items()}
    assert {kind for kind, _ in library.products} == {"grouped", "linear"}
    assert {recipe for _, recipe in library.products} == {"Float8CurrentScaling"}
    assert errors["layer, grouped_mm"] < 1e-4 < errors["layer, fp8"] < 0.2
