"""Small configs and networks for the unit tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from promoe_ds.condition import ClassCondition, Condition
from promoe_ds.config import RunConfig, config_from_dict, load_config
from promoe_ds.config.routing import METHODS as TRAITS
from promoe_ds.data.dataset import SyntheticLatents
from promoe_ds.model import DiT, build_model, initialise
from promoe_ds.model.export import WEIGHTS_STEM, write_export_config
from promoe_ds.model.shards import ShardWriter
from promoe_ds.routing import ROUTERS

#: Two blocks, the second with four experts; 4 tokens of width 16 per image; ten classes.
SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "input_size": 4,
        "patch_size": 2,
        "in_channels": 1,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
    },
    "routing": {"num_experts": 4},
    "data": {"dataset": "synthetic"},
    "train": {"max_steps": 10},
}

#: What makes a small run one of texts, of up to twenty tokens in ten groups.
TEXT: dict[str, dict[str, Any]] = {
    "model": {
        "condition": "text",
        "num_classes": 1000,
        "text_width": 12,
        "text_pooled_width": 8,
        "text_length": 20,
    },
    "data": {"caption_groups": 10},
}

#: What makes a small run one without a null label.
NO_NULL: dict[str, dict[str, Any]] = {
    "model": {"null_row": False},
    "diffusion": {"label_dropout": 0.0},
    "routing": {"num_unconditional_experts": 0},
}

#: What makes its blocks modern ones.
MODERN: dict[str, dict[str, Any]] = {"model": {"block": "modern"}}

#: Routing methods, dense apart.
METHODS = tuple(ROUTERS)


def of_method(method: str, **routing: Any) -> dict[str, dict[str, Any]]:
    """Return the sections of a small run of `method`, with two choices where it takes them."""
    top_k = 1 if TRAITS[method].single_choice else 2
    needed = (
        {"superclass_map": "digits", "superclasses": (0, 1, 2, 2, 1, 2, 0, 1, 3, 3)}
        if method == "classification"
        else {}
    )
    return {"routing": {"method": method, "top_k": top_k, **needed, **routing}}


def small_values(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a small valid run, with the fields of `sections` put over them."""
    names = {**SMALL, **sections}
    return {
        "name": "small",
        **{name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in names},
    }


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """Return a small valid run."""
    return config_from_dict(small_values(**sections), source="small")


def packaged_config(name: str, folder: Path) -> RunConfig:
    """Load a packaged recipe; the one that asks for a map of superclasses gets twelve even ones,
    written into `folder`.
    """
    if name != "classification_b":
        return load_config(name)
    return load_config(name, [f"routing.superclass_map={superclass_map(folder)}"])


def superclass_map(folder: Path) -> Path:
    """Write a map of 1,000 classes to twelve even superclasses into `folder`."""
    path = folder / "superclasses.yaml"
    path.write_text(
        "".join(f"group_{group}: {list(range(group, 1000, 12))}\n" for group in range(12)),
        encoding="utf-8",
    )
    return path


def randomise(module: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Fill every parameter with normal numbers, so that no path is closed by zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            )
    return module


def random_network(seed: int = 0, **sections: dict[str, Any]) -> DiT:
    """Return a small network whose every parameter is random."""
    network = build_model(small_config(**sections))
    initialise(network, seed)
    randomise(network, seed)
    return network


def save_export(folder: Path, network: DiT, **origin: Any) -> Path:
    """Write a network as a single export of this origin."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, WEIGHTS_STEM)
    for name, value in network.state_dict().items():
        writer.write(name, value)
    writer.close()
    write_export_config(folder, network.config, origin)
    return folder


def condition_of(config: RunConfig, labels: Tensor) -> Condition:
    """Return labels as a condition; of a text model, a text of each, the null one empty."""
    if config.model.condition == "class":
        return ClassCondition(labels, config.model.null_label).counted()
    condition = SyntheticLatents(config, torch.device("cpu")).take(labels.numpy())[1]
    return condition.drop(labels == config.num_groups).counted()


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers that depend on shape and seed only."""
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)
