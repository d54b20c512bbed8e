"""From a recipe, an autoencoder and what was measured to the normalisation of latents."""

from __future__ import annotations

from pathlib import Path

from promoe_ds.config.data import DataConfig
from promoe_ds.data.normalization.statistics import LatentStatistics
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.data.reading import shown
from promoe_ds.data.vae import VaeIdentity
from promoe_ds.errors import DataError
from promoe_ds.logs import get_logger

_LOG = get_logger("data")


def choose_normalization(
    data: DataConfig, vae: VaeIdentity | None, measured: LatentStatistics | None, where: Path
) -> LatentNormalization:
    """Return what `data.latent_normalization` means for these latents; stated values win.

    Args:
        vae, measured: of the latents; None where nothing says it.
    Raises: DataError for what the recipe asks and nothing says.
    """
    kind, stated = data.latent_normalization, LatentNormalization.of(data)
    if kind == "none" or not stated.is_identity:
        return stated
    if kind == "channel":
        chosen = _measured(measured, where)
    else:
        own = None if vae is None else vae.normalization(kind)
        if own is None and kind == "scale":
            raise DataError(
                f"{shown(where)}: data.latent_normalization=scale, but nothing there says which:"
                " set data.latent_scale, and data.latents_mean where the autoencoder has a"
                " shift_factor"
            )
        chosen = own or stated
    _LOG.info("%s: latents are %s", shown(where), chosen)
    return chosen


def _measured(measured: LatentStatistics | None, where: Path) -> LatentNormalization:
    if measured is None:
        raise DataError(
            f"{shown(where)}: data.latent_normalization=channel, but there are no measured"
            " statistics: run promoe-encode --measure on the folder, or set data.latents_mean and"
            " data.latents_std"
        )
    if not all(measured.std):
        raise DataError(
            f"{shown(where)}: channel {measured.std.index(0.0)} is constant, which"
            " data.latent_normalization=channel cannot divide by: use scale"
        )
    return LatentNormalization(latents_mean=measured.mean, latents_std=measured.std)
