"""The judge of emoji: a matcher trained on the real ones says which caption a picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import TextCondition
from promoe_ds.config import RunConfig
from promoe_ds.data.emoji import ATTRIBUTION, SIZE, Split, load_emoji
from promoe_ds.data.text_encoder import TextEncoder
from promoe_ds.errors import DataError, first_few
from promoe_ds.evaluation.frechet import fit_gaussian, frechet_distance, warn_of_few
from promoe_ds.evaluation.images import read_sample_prompts, read_samples, to_uint8
from promoe_ds.evaluation.judges.judge import Figure, Judge, heldout_figure
from promoe_ds.evaluation.judges.matcher import cached_matcher

#: Its space is the matcher's, whatever encoder a recipe has.
ENCODER = "all-minilm-l6-v2"
#: Of a prompt: trained on; held out; of the held-out ones, those whose parts are known.
SPLITS: dict[str, Split] = {"known": "train", "heldout": "heldout", "compositions": "compositions"}
PLACES = (1, 5, 10)
_NOISE_SEED = 0


def _recall(kind: str, words: str) -> Figure:
    return Figure(
        name=f"recall10_{kind}",
        heading=f"recall@10, {words}, %",
        title=f"Recall@10 of the caption, {words} prompts, higher is better",
        unit="% of samples",
        meaning=(
            "Share whose own caption is among the ten that the matcher finds nearest, of all"
            f" captions; samples of {words} prompts. Real: of the same prompts' real pictures, the"
            " most that can be had."
        ),
        decimals=1,
        factor=100.0,
        landmark=("real pictures", f"recall10_{kind}_of_real"),
    )


class EmojiJudge(Judge):
    """Judges 32x32 emoji drawn from captions of the data set."""

    figures = (
        heldout_figure("emoji"),
        _recall("known", "known"),
        _recall("heldout", "held-out"),
        _recall("compositions", "composed"),
        Figure(
            name="frechet",
            heading="Fréchet",
            title="Fréchet distance of the matcher's features to all real emoji, lower is better",
            unit="squared distance",
            meaning="Squared Fréchet distance of the matcher's features to those of all real emoji."
            " Real: of the same prompts' real pictures.",
            landmark=("real pictures", "frechet_of_real"),
        ),
    )
    attribution = ATTRIBUTION
    libraries: ClassVar[dict[str, str]] = {"resvg_py": "text", "transformers": "text"}

    def wanted(self, num: int) -> dict[str, Any]:
        """Return prompts: the held-out captions, at most half of all, and known ones, evenly
        chosen.
        """
        known, heldout = (load_emoji(split).captions for split in ("train", "heldout"))
        few = min(len(heldout), num // 2)
        return {"prompts": (*_spread(heldout, few), *_spread(known, num - few))}

    def judge(self, samples: Path, heldout_fraction: float = 0.2) -> dict[str, Any]:
        """Return recalls, by kind of prompt and place, of the samples and of the same prompts' real
        pictures, next to chance; and Fréchet distances to all real pictures.

        The matcher has seen the real pictures of known prompts, not those of held-out ones.
        """
        images, _ = read_samples(samples)
        drawn = read_sample_prompts(samples, len(images))
        if images.shape[1:] != (SIZE, SIZE, 3) or len(images) < 2:
            raise DataError(f"{samples}: {images.shape} images are no emoji of {SIZE}x{SIZE}x3")
        train, heldout = load_emoji("train"), load_emoji("heldout")
        captions = [*train.captions, *heldout.captions]
        place = {caption: number for number, caption in enumerate(captions)}
        if unknown := [repr(prompt) for prompt in dict.fromkeys(drawn) if prompt not in place]:
            raise DataError(
                f"{samples}: {len(unknown)} prompts are no captions of the emoji:"
                f" {first_few(unknown)}: sample captions of the data set"
            )
        own = np.array([place[prompt] for prompt in drawn])
        real = to_uint8(np.concatenate([train.images_N3HW, heldout.images_N3HW]))
        encoder = TextEncoder(ENCODER)
        sentences = torch.nn.functional.normalize(encoder.encode(captions).pooled, dim=1)
        seen = len(train.captions)
        made_of = encoder.identity.fingerprint, *train.captions
        matcher, name = cached_matcher(real[:seen], sentences[:seen], made_of)
        features = matcher.features(real)
        warn_of_few(samples, len(images), features.shape[1])
        target = fit_gaussian(features)
        noise = np.random.default_rng(_NOISE_SEED).integers(0, 256, images.shape, dtype=np.uint8)
        report: dict[str, Any] = {
            "samples": len(images),
            "captions": len(captions),
            "matcher": name,
            "recall": {},
        }
        ranks, best = (matcher.ranks(each, own, sentences) for each in (images, real[own]))
        for kind, split in SPLITS.items():
            members = np.isin(drawn, load_emoji(split).captions)
            report["recall"][kind] = {
                "samples": int(members.sum()),
                "of_samples": _recalls(ranks[members]),
                "of_real": _recalls(best[members]),
            }
            for suffix, source in (("", "of_samples"), ("_of_real", "of_real")):
                recall10 = report["recall"][kind][source]["10"]
                report[f"recall10_{kind}{suffix}"] = recall10
        for suffix, pictures in (("", images), ("_of_real", real[own]), ("_of_noise", noise)):
            gaussian = fit_gaussian(matcher.features(pictures))
            report[f"frechet{suffix}"] = frechet_distance(gaussian, target)
        return report

    def words(self, report: dict[str, Any]) -> str:
        """Return a report as text."""
        lines = [
            f"{report['samples']} samples, each compared with {report['captions']} captions by a"
            " matcher trained on real emoji",
            "  caption among the nearest:     " + "".join(f"{f'{k}':>8}" for k in PLACES),
        ]
        for kind, found in report["recall"].items():
            for who, source in (("samples", "of_samples"), ("real pictures", "of_real")):
                shares = "".join(_percent(found[source][str(k)]) for k in PLACES)
                lines.append(f"    {kind:13}{who:17}{shares}   of {found['samples']}")
        chance = "".join(_percent(k / report["captions"]) for k in PLACES)
        return "\n".join(
            [
                *lines,
                f"    {'chance':30}{chance}",
                "    (the matcher was trained on the real pictures of known captions, not on those"
                " held out)",
                "  Frechet distance of the matcher's features to all real emoji:"
                f" {report['frechet']:.3f}",
                f"    (the real pictures of the same captions: {report['frechet_of_real']:.3f},"
                f" uniform noise: {report['frechet_of_noise']:.3f})",
                "",
            ]
        )

    def heldout(self, config: RunConfig) -> tuple[Tensor, TextCondition]:
        """Return the held-out emoji and their captions."""
        heldout = load_emoji("heldout")
        encoder = TextEncoder(config.data.text_encoder, max_length=config.model.text_length)
        return torch.from_numpy(heldout.images_N3HW), encoder.condition(heldout.captions)


def _spread(values: list[str], count: int) -> list[str]:
    """Return `count` of the values, evenly chosen; each several times if there are fewer."""
    return [values[place * len(values) // count] for place in range(count)]


def _recalls(ranks_N: np.ndarray) -> dict[str, float | None]:
    """Return the share of pictures whose caption is among the nearest k; None of no picture."""
    return {str(k): float((ranks_N < k).mean()) if len(ranks_N) else None for k in PLACES}


def _percent(share: float | None) -> str:
    return f"{'-' if share is None else f'{share:.1%}':>8}"
