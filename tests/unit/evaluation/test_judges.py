"""Judges of packaged data sets: real pictures are recognised, shuffled ones are not; the loss on
what was held out has the same draws for every model.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from promoe_ds.cli.evaluate import main as evaluate
from promoe_ds.config import load_config
from promoe_ds.data import build_dataset
from promoe_ds.data.digits import load_digits_split
from promoe_ds.data.emoji import load_emoji
from promoe_ds.data.text_encoder import TextEncoder
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.images import to_uint8
from promoe_ds.evaluation.judges import emoji, matcher
from promoe_ds.evaluation.judges.digits import DigitsJudge
from promoe_ds.evaluation.judges.emoji import EmojiJudge
from promoe_ds.evaluation.judges.judge import heldout_loss
from promoe_ds.evaluation.judges.table import JUDGES
from promoe_ds.evaluation.sample_job import draw_samples
from promoe_ds.evaluation.sample_request import SampleRequest, read_prompts
from promoe_ds.model import build_model, initialise
from promoe_ds.randomness import generator
from promoe_ds.reports.specialisation.analysis import Settings, draw_images, expert_information

from ..builders import save_export


class _Silent(nn.Module):
    """Predicts zero everywhere and notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.config = load_config("digits_promoe")
        self.labels: list[int] = []

    def forward(self, latents, timestep, labels):
        self.labels += labels.labels_B.tolist()
        return torch.zeros_like(latents)


def test_heldout_loss_of_zero_prediction_is_the_mean_square_of_the_velocity() -> None:
    images, labels = load_digits_split(0.2, heldout=True)
    model = _Silent()
    expected = []
    for draw in range(2):
        for slot, image in enumerate(images):
            noise = generator(5, "noise", draw, slot).standard_normal(image.shape, dtype=np.float32)
            expected.append(np.square(noise - image, dtype=np.float64).mean())
    heldout = DigitsJudge().heldout(model.config)
    assert heldout_loss(model, *heldout, draws=2, seed=5, batch_size=50) == pytest.approx(
        np.mean(expected), rel=1e-6
    )
    # Every image under its own label, none dropped.
    assert model.labels == 2 * labels.tolist()
    assert heldout_loss(_Silent(), *heldout, draws=1, batch_size=7) == pytest.approx(
        heldout_loss(_Silent(), *heldout, draws=1, batch_size=400)
    )


def test_judge_real_digits_are_recognised_and_shuffled_labels_are_not(tmp_path) -> None:
    images, labels = load_digits_split(0.2, heldout=True)
    for name, given in (("right", labels), ("wrong", (labels + 1) % 10)):
        np.savez(tmp_path / f"{name}.npz", arr_0=to_uint8(images), labels=given)
    right, wrong = (DigitsJudge().judge(tmp_path / f"{name}.npz") for name in ("right", "wrong"))
    assert right["accuracy"] == right["accuracy_on_real"] > 0.95
    assert wrong["accuracy"] < 0.05
    assert right["frechet"] == pytest.approx(0.0, abs=1e-6)
    assert right["frechet_of_training_digits"] < 0.2 < right["frechet_of_noise"]


def test_judge_images_of_another_size_are_refused(tmp_path) -> None:
    np.savez(
        tmp_path / "samples.npz",
        arr_0=np.zeros((4, 16, 16, 1), dtype=np.uint8),
        labels=np.zeros(4, dtype=int),
    )
    with pytest.raises(DataError, match="are no 8x8 digits"):
        DigitsJudge().judge(tmp_path)


def test_judge_of_digits_without_its_library_says_what_to_install(tmp_path, monkeypatch) -> None:
    images, labels = load_digits_split(0.2, heldout=True)
    np.savez(tmp_path / "samples.npz", arr_0=to_uint8(images), labels=labels)
    for name in ("sklearn", "sklearn.datasets", "sklearn.svm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="scikit-learn"):
        DigitsJudge().judge(tmp_path)


def _squares(count: int = 16) -> tuple[np.ndarray, torch.Tensor]:
    """Return pictures of one colour each, and a sentence vector for each."""
    random = np.random.default_rng(0)
    images = np.repeat(random.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8), 8, axis=1)
    return images.repeat(8, axis=2), torch.from_numpy(random.normal(size=(count, 24))).float()


def test_matcher_learns_its_pictures_and_is_the_same_every_time() -> None:
    images, sentences = _squares()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = (matcher.train_matcher(images, sentences, epochs=60) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert (first.ranks(images, np.arange(16), sentences) == 0).mean() > 0.7
    assert (first.ranks(images, (np.arange(16) + 1) % 16, sentences) == 0).mean() < 0.2
    assert first.features(images).shape == (16, 192)


def test_matcher_is_trained_once_for_the_same_pictures(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images, sentences = _squares()
    trained = []

    def train(*given) -> matcher.Matcher:
        trained.append(1)
        return matcher.Matcher(given[1]).eval()

    monkeypatch.setattr(matcher, "train_matcher", train)
    calls = [(images, "a"), (images, "a"), (images, "b"), (255 - images, "a")]
    found = [matcher.cached_matcher(each, sentences, [captions]) for each, captions in calls]
    assert (len(trained), len({name for _, name in found})) == (3, 3)
    (first, _), (again, _) = found[:2]
    assert np.array_equal(first.features(images), again.features(images))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"XDG_CACHE_HOME: .*file/promoe_ds \(Not a directory\)"):
        matcher.cached_matcher(images, sentences, ["a"])


@cache
def _trained() -> matcher.Matcher:
    train = load_emoji("train")
    pooled = TextEncoder(emoji.ENCODER).encode(train.captions).pooled
    return matcher.train_matcher(to_uint8(train.images_N3HW), pooled, epochs=3)


@pytest.fixture
def quick(monkeypatch) -> None:
    """Train the matcher once, for a few seconds only."""
    monkeypatch.setattr(emoji, "cached_matcher", lambda *given: (_trained(), "quick"))


def _write(folder: Path, images: np.ndarray, prompts: list[str]) -> Path:
    folder.mkdir()
    np.savez(folder / "samples.npz", arr_0=images, labels=np.arange(len(images)))
    names = {f"img{index:06d}.png": prompt for index, prompt in enumerate(prompts)}
    (folder / "prompts.json").write_text(json.dumps(names))
    return folder


def test_judge_real_emoji_reach_the_ceiling_and_shuffled_prompts_chance(
    tmp_path, monkeypatch, capsys, quick
) -> None:
    every = {}
    for split in ("train", "heldout"):
        pictures = load_emoji(split)
        every |= dict(zip(pictures.captions, to_uint8(pictures.images_N3HW), strict=True))
    prompts = list(EmojiJudge().wanted(500)["prompts"])
    heldout = load_emoji("heldout").captions
    assert len(prompts) == 500 and set(heldout) < set(prompts)
    images = np.stack([every[prompt] for prompt in prompts])
    right = _write(tmp_path / "right", images, prompts)
    monkeypatch.chdir(tmp_path)
    evaluate(["--samples", str(right), "--dataset", "emoji", "--out", "report.json"])
    report = json.loads(Path("report.json").read_text())
    assert (report["dataset"], report["samples"], report["captions"]) == ("emoji", 500, len(every))
    chance = 10 / len(every)
    for kind in emoji.SPLITS:
        assert report[f"recall10_{kind}"] == report[f"recall10_{kind}_of_real"] > 8 * chance
    assert report["recall"]["heldout"]["samples"] == len(heldout)
    assert report["frechet"] == report["frechet_of_real"] < 0.1 * report["frechet_of_noise"]
    printed = capsys.readouterr().out
    assert "chance" in printed and f"of {len(heldout)}" in printed
    # Every picture under the prompt of another one, far away in the list.
    wrong = _write(tmp_path / "wrong", images[::-1].copy(), prompts)
    report = EmojiJudge().judge(wrong)
    assert report["recall10_known"] < 5 * chance < report["recall10_known_of_real"]


def test_model_of_emoji_is_sampled_judged_and_its_experts_analysed(tmp_path, quick) -> None:
    config = load_config(
        "emoji_promoe",
        ["model.hidden_size=16", "model.depth=2", "model.num_heads=2", "parallel.ep_size=1"],
    )
    torch.manual_seed(0)
    network, judge = build_model(config).eval(), EmojiJudge()
    initialise(network, 0)
    save_export(tmp_path / "export", network, step=5)
    wanted = judge.wanted(6)
    request = SampleRequest(model=tmp_path / "export", out=tmp_path / "out", steps=2, **wanted)
    draw_samples(request)
    report = judge.judge(tmp_path / "out")
    assert (report["samples"], report["recall"]["heldout"]["samples"]) == (6, 3)
    # Predicts zero, as all models do at first: the loss is the mean square of the velocity.
    images, condition = judge.heldout(config)
    assert len(images) == len(condition) and not condition.is_null_B.any()
    expected = 1 + images.square().mean().item()
    assert heldout_loss(network, images, condition, draws=2) == pytest.approx(expected, rel=0.02)
    batch = draw_images(build_dataset(config), 8, seed=0)
    information = expert_information(network, batch, Settings(sigmas=(0.2, 0.8), rounds=2))
    assert set(information) == {"group", "noise level", "position"}


def test_prompts_to_judge_are_written_for_the_sampler(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    evaluate(["--dataset", "emoji", "--write-prompts", str(file), "--num", "10"])
    assert read_prompts(file) == EmojiJudge().wanted(10)["prompts"]
    with pytest.raises(ConfigError, match="has classes, no prompts"):
        evaluate(["--dataset", "digits", "--write-prompts", str(file)])


def test_emoji_judge_spreads_few_and_repeats_many() -> None:
    few, many = (EmojiJudge().wanted(num)["prompts"] for num in (10, 4000))
    heldout = set(load_emoji("heldout").captions)
    assert (len(few), len(set(few)), len(set(few) & heldout)) == (10, 10, 5)
    assert (len(many), len(set(many))) == (4000, len(heldout) + len(load_emoji("train").captions))


@pytest.mark.parametrize(
    ("shape", "prompts", "message"),
    [
        ((2, 32, 32, 3), ["red apple", "no such thing"], "'no such thing'"),
        ((2, 8, 8, 1), ["red apple", "purple heart"], r"\(2, 8, 8, 1\)"),
        ((2, 32, 32, 3), ["red apple"], "1 prompts for 2 images"),
    ],
)
def test_judge_refuses_what_is_no_emoji(tmp_path, shape, prompts, message) -> None:
    folder = _write(tmp_path / "samples", np.zeros(shape, dtype=np.uint8), prompts)
    with pytest.raises(DataError, match=message):
        EmojiJudge().judge(folder)


def test_evaluate_refuses_a_data_set_without_judge_and_options_without_effect(tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"--dataset latents: .*{', '.join(JUDGES)}"):
        evaluate(["--samples", str(tmp_path), "--dataset", "latents"])
    with pytest.raises(SystemExit):
        evaluate(["--samples", str(tmp_path), "--dataset", "digits", "--metrics", "fid"])
