"""clip_score against CLIP's own forward pass, with a tiny CLIP of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessor, CLIPModel

from promoe_ds.cli.evaluate import main as evaluate
from promoe_ds.errors import ConfigError, DataError

from ..data.text_encoders import save_encoder

PROMPTS = ["a red apple", "purple heart", "heart of gold heart of gold heart of gold", ""]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = save_encoder(tmp_path_factory.mktemp("clip"), "clip")
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture
def samples(tmp_path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=images, labels=np.arange(4))
    names = {f"img{index:06d}.png": prompt for index, prompt in enumerate(PROMPTS)}
    (folder / "prompts.json").write_text(json.dumps(names))
    return folder


def _score(clip: Path, samples: Path, *options: str) -> dict:
    out = samples.parent / "metrics.json"
    given = ["--samples", str(samples), "--out", str(out), "--metrics", "clip_score"]
    evaluate([*given, "--clip", str(clip), *options])
    return json.loads(out.read_text())


def test_clip_score_is_the_mean_cosine_whatever_the_batches(clip, samples) -> None:
    images = np.load(samples / "samples.npz")["arr_0"]
    network, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    pixels = AutoImageProcessor.from_pretrained(clip)(list(images), return_tensors="pt")
    cosines = []
    for pixels_1CHW, prompt in zip(pixels["pixel_values"].split(1), PROMPTS, strict=True):
        text = tokenizer([prompt], truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = network(**text, pixel_values=pixels_1CHW)
        # `logits` are cosines times a learned scale.
        cosines.append(output.logits_per_image.item() / network.logit_scale.exp().item())
    assert min(cosines) < 0 < max(cosines)
    found = [_score(clip, samples, "--batch-size", size) for size in ("1", "3", "64")]
    for report in found:
        expected = 100 * np.clip(cosines, 0, None).mean()
        assert report["metrics"] == {"clip_score": pytest.approx(expected, rel=1e-4)}
    assert found[0]["clip"]["name"] == str(clip) and found[0]["samples"]["count"] == 4


def test_clip_score_refuses_what_it_cannot_measure(clip, samples, tmp_path) -> None:
    with pytest.raises(ConfigError, match="clip_score and --clip"):
        evaluate(["--samples", str(samples), "--metrics", "clip_score"])
    with pytest.raises(DataError, match="no-clip"):
        _score(tmp_path / "no-clip", samples)
    (samples / "prompts.json").unlink()
    with pytest.raises(DataError, match=r"prompts\.json"):
        _score(clip, samples)
