"""A small network in place of Inception, exports of small networks, and made-up features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from promoe_ds.data.text_encoder import TextEncoder

from ..builders import random_network, save_export
from ..data.text_encoders import LONGEST, WIDTH, save_encoder


class TinyNetwork(nn.Module):
    """Pooled features, a map of nine channels, and logits, of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 9, 3, stride=2), nn.Linear(9, 4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maps = torch.relu(self.conv(images.float() / 255))
        pool = maps.mean(dim=(2, 3))
        return pool, maps, self.head(pool) * 20


def save_tiny(folder: Path) -> None:
    """Write the small network as TorchScript and as a file of Python."""
    torch.jit.script(TinyNetwork()).save(str(folder / "tiny.pt"))
    (folder / "tiny.py").write_text(
        "from tests.unit.evaluation.made import TinyNetwork\nnothing = 3\n"
    )


def features(count: int, dimension: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((count, dimension)) @ random.standard_normal((dimension,) * 2)
    return mixed + random.random(dimension)


def make_export(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a model of random weights, by default one of pixels."""
    return save_export(folder / "export", random_network(**sections), step=5)


def text_sections(folder: Path) -> dict[str, dict[str, Any]]:
    """Save a text encoder; return the sections of a model that takes its texts."""
    encoder = str(save_encoder(folder / "encoder", "bert"))
    fingerprint = TextEncoder(encoder).identity.fingerprint
    sizes = {"num_classes": 1000, "text_width": WIDTH, "text_length": LONGEST}
    return {
        "model": {"condition": "text", **sizes},
        "data": {"text_encoder": encoder, "text_fingerprint": fingerprint},
    }
