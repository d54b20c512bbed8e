"""Transformer Engine in place of torch's layers: same parameters, names and results; what is
missing is said.
"""

from __future__ import annotations

import re
import sys
from typing import Any, get_args
from unittest.mock import MagicMock

import pytest
import torch

from promoe_ds.backends import te_layers, te_support
from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig
from promoe_ds.config.parallel import Fp8Recipe, PrecisionConfig
from promoe_ds.diffusion import DiffusionBatch
from promoe_ds.errors import ConfigError
from promoe_ds.model import DiT
from promoe_ds.training.step import TrainingModule

from ..builders import random_network, random_tensor, small_config
from .fake_te import install

CUDA = torch.device("cuda")
#: Widths that FP8 takes; images of four tokens, so that every product needs padding.
SECTIONS = {"model": {"hidden_size": 32, "num_heads": 2, "qk_norm": True}}
KINDS: dict[str, dict[str, Any]] = {
    "modern": {},
    "gelu": {},
    "swiglu": {"expert_type": "swiglu"},
    "dense": {"method": "dense"},
    "no_unconditional": {"num_unconditional_experts": 0},
    "no_shared": {"num_shared_experts": 0},
}


def network(precision: dict[str, str], block: str = "dit", **sections: Any) -> DiT:
    model = {**SECTIONS["model"], "block": block}
    return random_network(model=model, precision=precision, **sections).train()


def training_pass(
    net: DiT, context: Any, labels: list[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.zero_grad()
    with context():
        output = net.denoise(
            random_tensor(3, 1, 4, 4), torch.tensor([10.0, 500.0, 900.0]), torch.tensor(labels)
        )
    output.prediction_BZHW.square().mean().backward()
    return output.prediction_BZHW.detach(), {
        name: p.grad for name, p in net.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    "labels", [[1, 10, 3], [10, 10, 10], [1, 2, 3]], ids=["mixed", "all null", "all conditional"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("compute", "capability"), [("bf16", (9, 0)), ("fp8", (9, 0)), ("fp8", (10, 0))]
)
def test_transformer_engine_layers_give_torchs_results(
    monkeypatch, compute, capability, kind, labels
) -> None:
    state = install(monkeypatch, capability=capability)
    precision, routing = {"compute": compute, "kernels": "transformer_engine"}, KINDS[kind]
    block = "modern" if kind == "modern" else "dit"
    plain, changed = (network(precision, block, routing=routing) for _ in range(2))
    before = dict(changed.named_parameters())
    context = te_layers.use_transformer_engine(changed, changed.config, CUDA)
    assert {name: id(p) for name, p in changed.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert changed.state_dict().keys() == plain.state_dict().keys()
    changed.load_state_dict(plain.state_dict())
    expected, found = (
        training_pass(plain, te_layers.nullcontext, labels),
        training_pass(changed, context, labels),
    )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # fp32's own roundings are 1e-7 of a module's largest values, which reach 160 here.
        module = name.rpartition(".")[0]
        of_module = [g for n, g in expected[1].items() if n.rpartition(".")[0] == module]
        near = 1e-6 * max(1.0, *(g.abs().max().item() for g in of_module))
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=near, msg=lambda t, n=name: f"{n}: {t}"
        )
    kinds = {name for name, _ in state.rows}
    norms = set() if kind == "modern" else {"norm"}  # RMSNorm stays torch's
    assert kinds == norms | ({"linear"} if kind == "dense" else {"linear", "grouped"})
    assert state.recipe is None


def test_transformer_engine_leaves_high_precision_parts_alone(monkeypatch) -> None:
    install(monkeypatch)
    net = network({"compute": "fp8"})
    te_layers.use_transformer_engine(net, net.config, CUDA)
    kept = {name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}
    assert kept == {
        "timestep_embedding.up",
        "timestep_embedding.down",
        "final_layer.modulation",
        "final_layer.linear",
        "blocks.0.modulation",
        "blocks.1.modulation",
    }


def test_training_module_runs_in_its_context() -> None:
    context = MagicMock()
    module = TrainingModule(network({}), context)
    condition = ClassCondition(torch.tensor([1, 2]), 10)
    latents = random_tensor(2, 1, 4, 4)
    module(DiffusionBatch(latents, latents, torch.tensor([0.1, 0.9]), condition))
    context.return_value.__enter__.assert_called_once()
    context.return_value.__exit__.assert_called_once()


def fp8_config(recipe: str = "auto", **sections: Any) -> RunConfig:
    return small_config(
        **{**SECTIONS, "precision": {"compute": "fp8", "fp8_recipe": recipe}, **sections}
    )


@pytest.mark.parametrize(("expert_width", "expected"), [(64, "mxfp8"), (48, "current")])
def test_recipe_choice_follows_the_widths(monkeypatch, expert_width: int, expected: str) -> None:
    install(monkeypatch, capability=(10, 0))
    config = fp8_config(routing={"expert_width": expert_width})
    assert te_support.resolved_recipe(config) == expected


def test_recipe_objects_are_the_librarys(monkeypatch) -> None:
    install(monkeypatch)
    assert [te_support.make_recipe(name).name for name in get_args(Fp8Recipe)] == [
        "DelayedScaling",
        "Float8CurrentScaling",
        "Float8BlockScaling",
        "MXFP8BlockScaling",
    ]
    monkeypatch.delattr(sys.modules["transformer_engine.common.recipe"], "Float8BlockScaling")
    with pytest.raises(
        ConfigError,
        match="fp8_recipe=block: the installed Transformer Engine has no Float8BlockScaling",
    ):
        te_support.make_recipe("block")


def test_transformer_engine_without_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision.compute=fp8, .* on the cpu: use a GPU"):
        te_support.require_transformer_engine(PrecisionConfig(compute="fp8"), torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("no such library"),
        FileNotFoundError("no shared object"),
        OSError("undefined symbol"),
        RuntimeError("no driver"),
        AssertionError("a newer torch"),
    ],
)
def test_transformer_engine_missing_or_half_installed_is_named(monkeypatch, error) -> None:
    monkeypatch.setattr(te_support.importlib, "import_module", MagicMock(side_effect=error))
    with pytest.raises(
        ConfigError, match=rf"{type(error).__name__}: {error}\): {re.escape(te_support.INSTALL)}"
    ):
        te_support.require_transformer_engine(PrecisionConfig(compute="fp8"), CUDA)


@pytest.mark.parametrize("version", ["2.1.0", "1.13.0", "2.2.0+abc"])
def test_transformer_engine_too_old_is_refused(monkeypatch, version) -> None:
    install(monkeypatch, version=version)
    with pytest.raises(ConfigError, match=rf"version {re.escape(version)} is installed, 2\.3 "):
        te_support.require_transformer_engine(PrecisionConfig(compute="fp8"), CUDA)


def test_megatron_gets_the_recipes_name(monkeypatch) -> None:
    install(monkeypatch)
    assert te_support.megatron_fp8(small_config(precision={"compute": "bf16"})) == {}
    assert te_support.megatron_fp8(fp8_config()) == {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
