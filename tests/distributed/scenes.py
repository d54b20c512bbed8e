"""Small layers and batches that every way of moving tokens is tried on: usual ones, and the corners
of routing.
"""

from __future__ import annotations

import torch

from promoe_ds.config import RunConfig
from promoe_ds.model.build import build_moe_layer

EXPERTS, WIDTH, TOKENS, IMAGES, NULL = 4, 16, 6, 3, 10
#: What the tokens, prototypes or labels are bent to.
SCENES = ("usual", "one_expert", "all_unconditional", "idle_rank")


def scene(name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a rank's tokens and labels."""
    tokens = torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(100 + rank))
    labels = torch.tensor([1, NULL, 3])
    if name == "one_expert":
        tokens = tokens * 0.01 + 1.0
    if name == "all_unconditional" or (name == "idle_rank" and rank == 0):
        labels = torch.full((IMAGES,), NULL)
    return tokens, labels


def whole_layer(config: RunConfig, scene_name: str) -> torch.nn.Module:
    """Return a layer with all experts, the same on every rank."""
    torch.manual_seed(7)
    layer = build_moe_layer(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if scene_name == "one_expert":
        torch.nn.init.ones_(layer.router.prototypes[2:3].data)
    return layer.train()
