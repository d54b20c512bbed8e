"""Networks that turn images into features: every kind that can be named, and what those of the
user's own may do wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.features import load_extractor

from .made import save_tiny


def test_extractors_of_every_kind_give_features(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    images = np.random.default_rng(0).integers(0, 200, (3, 12, 12, 3), dtype=np.uint8)
    script = load_extractor(str(tmp_path / "tiny.pt"), "cpu")(images)
    python = load_extractor(f"{tmp_path / 'tiny.py'}:TinyNetwork", "cpu")(images)
    np.testing.assert_array_equal(script.pool, python.pool)
    assert script.spatial.shape == (3, 7 * 5 * 5)
    pixels = load_extractor("pixels", "cpu")(images)
    assert pixels.pool.shape == (3, 432) and pixels.spatial is None and pixels.pool.max() <= 1
    grey = load_extractor(str(tmp_path / "tiny.pt"), "cpu")(images[..., :1])
    assert grey.pool.shape == (3, 9)
    with pytest.raises(ConfigError, match=r"tiny\.py:nothing: .*torch\.nn\.Module"):
        load_extractor(f"{tmp_path / 'tiny.py'}:nothing", "cpu")


def test_inception_extractor_where_torchvision_is_missing_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    with pytest.raises(ConfigError, match="torch-fidelity cannot be imported"):
        load_extractor("inception", "cpu")


def test_inception_extractor_reads_the_spatial_features_of_mixed_6d(monkeypatch) -> None:
    """A stand-in with torch-fidelity's interface: which outputs are asked for, and which branch is
    read.
    """

    class Block(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.branch1x1, self.value = nn.Conv2d(3, 192, 1), value
            nn.init.constant_(self.branch1x1.weight, 0.0)
            nn.init.constant_(self.branch1x1.bias, value)

    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            assert (
                features_list == ["2048", "logits_unbiased"]
                and feature_extractor_weights_path == "w.pth"
            )
            self.Mixed_6d, self.Mixed_6e = Block(1.0), Block(2.0)

        def forward(self, images):
            assert images.dtype == torch.uint8
            for block in (self.Mixed_6d, self.Mixed_6e):
                block.branch1x1(torch.zeros(len(images), 3, 17, 17))
            return torch.zeros(len(images), 2048), torch.zeros(len(images), 1008)

    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr("promoe_ds.evaluation.features._checksum", lambda path: "")
    found = load_extractor("inception:w.pth", "cpu")(np.zeros((2, 8, 8, 3), dtype=np.uint8))
    assert (
        found.pool.shape == (2, 2048)
        and found.spatial.shape == (2, 2023)
        and (found.spatial == 1.0).all()
    )
    assert found.probabilities.shape == (2, 1008)


def test_networks_compute_without_tf32_and_leave_the_setting_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return"
        " torch.full((len(x), 2), float(torch.backends.cudnn.allow_tf32 or"
        " torch.backends.cuda.matmul.allow_tf32))\n"
    )
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        assert not load_extractor(f"{tmp_path / 'net.py'}:Net", "cpu").probe(8, 3).pool.any()
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return x.float().mean()",
            r"returned a tensor \(\) for 1 images, expected a tensor of as many rows",
        ),
        ("return {'spatial': x}", r"returned no pooled features \(pool\)"),
        ("x = x.flatten(1)", r"returned no pooled features \(pool\)"),
        ("return 1", "returned int for 1 images"),
        (
            "raise KeyError('layer4')",
            r"failed on uint8 images \(1, 3, 12, 12\): KeyError: 'layer4' \(.*net\.py, line 4\)",
        ),
    ],
)
def test_extractor_of_ones_own_that_fails_is_told(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "net.py").write_text(
        f"import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        {body}\n"
    )
    with pytest.raises(ConfigError, match=message):
        load_extractor(f"{tmp_path / 'net.py'}:Net", "cpu").probe(12, 3)
    (tmp_path / "broken.py").write_text("import torch\n\ndef Net():\n    return torch.nothing\n")
    with pytest.raises(ConfigError, match=r"broken\.py:Net: AttributeError: .*\(.*, line \d+\)"):
        load_extractor(f"{tmp_path / 'broken.py'}:Net", "cpu")
