"""Whether the first samples look as normalised latents do, and what has happened if they do not.

Letters: B samples, Z latent channels, H, W latent size.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from promoe_ds.data.normalization.statistics import LatentStatistics, measure
from promoe_ds.data.normalization.values import LatentNormalization

#: Of latents that noise of deviation 1 is made for: least and most deviation, largest mean, in
# deviations of what is expected.
_USUAL = (0.5, 2.0, 1.0)
_STANDARD = LatentStatistics(count=1, mean=(0.0,), std=(1.0,))
#: The same, of latents that must have been normalised once more: less would explain too much.
_CLEARLY = (2 / 3, 1.5, 1.0)
#: Deviations below are compared as if they were this: a constant channel.
_SMALLEST = 0.01


def normalization_problem(
    latents_BZHW: Tensor, normalization: LatentNormalization, expected: LatentStatistics | None
) -> str:
    """Return what looks wrong with normalised latents, and the remedy; nothing if they are usual.

    One scale for all channels makes no promise about each: then all together are compared with
    mean 0 and deviation 1, and each channel with what was measured of the data set.
    Args:
        expected: statistics of the whole data set before normalisation, where they are known.
    """
    found = measure([latents_BZHW], has_posterior=False)
    if found is None:
        return ""
    is_usual = _agree(_promised(found, normalization), _STANDARD)
    if is_usual and (expected is None or _agree(found, expected.normalized(normalization))):
        return ""
    shown, least, most = found.pooled, min(found.std), max(found.std)
    by_channel = f" (by channel {least:.3g} ... {most:.3g})" if len(found.std) > 1 else ""
    return (
        f"the first {len(latents_BZHW)} latents have a mean of {shown.mean[0]:.3g} and a standard"
        f" deviation of {shown.std[0]:.3g}{by_channel} after normalisation, and look like"
        f" {_explanation(found, normalization)}, or data.check_latents=false if they are meant to"
        " be so"
    )


def _explanation(found: LatentStatistics, normalization: LatentNormalization) -> str:
    if normalization.is_identity:
        if found.pooled.std[0] < _USUAL[0]:
            return (
                "latents that were scaled twice before they were stored, or those of another"
                " autoencoder: set data.latent_scale"
            )
        return (
            "latents that were never scaled: set data.latent_scale to the autoencoder's"
            " scaling_factor, or data.latent_normalization=channel"
        )
    raw = _promised(found.denormalized(normalization), normalization)
    if _agree(raw, _STANDARD, _CLEARLY):
        return (
            "latents that are scaled twice, as they were stored normalised: set"
            " data.latents_normalized=true"
        )
    return (
        "those of another autoencoder, or of other channels, than the normalisation is for"
        f" ({normalization}): set data.vae, data.latent_scale, latents_mean and latents_std to what"
        " they come from"
    )


def _promised(found: LatentStatistics, normalization: LatentNormalization) -> LatentStatistics:
    """Return what a normalisation makes promises about: each channel, or all of them together."""
    return found if normalization.latents_std else found.pooled


def _agree(
    found: LatentStatistics,
    expected: LatentStatistics,
    bounds: tuple[float, float, float] = _USUAL,
) -> bool:
    """Whether each channel's mean and deviation are about the expected ones."""
    least, most, largest = bounds
    wanted, deviations = np.array(expected.std), np.array(found.std)
    unit = np.maximum(wanted, _SMALLEST)
    is_near = np.abs(np.subtract(found.mean, expected.mean)) <= largest * unit
    return bool((is_near & (deviations >= least * wanted) & (deviations <= most * unit)).all())
