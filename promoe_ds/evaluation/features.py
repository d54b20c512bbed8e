"""From images to features: ADM's Inception network, or any network given by its path.

Letters: N images, d pooled features, s spatial features, c classes, H, W size, C colour channels.
"""

from __future__ import annotations

import importlib.util
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from promoe_ds.checkpoint.manifest import checksum
from promoe_ds.config.model import sides
from promoe_ds.data.vae import fingerprint_of, without_tf32
from promoe_ds.errors import ConfigError, cause_of
from promoe_ds.file_kind import SCRIPT, identify
from promoe_ds.versions import versions_of

#: ADM takes the first seven channels of a 17 x 17 map: 2,023 numbers.
SPATIAL_CHANNELS = 7
INCEPTION, PIXELS = "inception", "pixels"
_OUTPUTS = ("pool", "spatial", "logits")


@dataclass(frozen=True)
class Features:
    """Of some images: pooled (N, d) fp32; where the network has them, spatial (N, s) and class
    probabilities (N, c) fp64.
    """

    pool: np.ndarray
    spatial: np.ndarray | None
    probabilities: np.ndarray | None

    @property
    def is_finite(self) -> bool:
        """Whether all of them are."""
        return all(
            values is None or np.isfinite(values).all()
            for values in (self.pool, self.spatial, self.probabilities)
        )


class Extractor:
    """A network that turns uint8 images into features."""

    def __init__(
        self,
        network: nn.Module,
        identity: dict[str, Any],
        device: torch.device | str,
        *,
        colour: bool = True,
    ) -> None:
        """Use `network` on `device`.

        Args:
            network: takes uint8 (N, C, H, W) of any size; returns pooled features (N, d), or a
                tuple or dictionary of `pool`, `spatial` (N, C', H', W') and `logits` (N, c), each
                but the first possibly None.
            identity: what makes its figures comparable; the checksum of the weights is added.
            colour: whether it wants three channels: grey images are repeated.
        """
        self.identity = {**identity, "weights": fingerprint_of(network)}
        self._device, self._colour = device, colour
        self._network = network.eval().to(device)

    @torch.no_grad()
    def __call__(self, images_NHWC: np.ndarray) -> Features:
        """Return the features of uint8 images.

        Raises: ConfigError if the network fails, or returns something else.
        """
        images = (
            torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2).to(self._device)
        )
        if self._colour and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        try:
            with without_tf32():
                outputs = self._network(images)
        except Exception as error:  # a network of the user's own may raise anything
            raise ConfigError(
                f"extractor {self.identity['name']}: failed on uint8 images {tuple(images.shape)}: "
                f"{_describe(error)}"
            ) from error
        if isinstance(outputs, dict):
            outputs = tuple(outputs.get(name) for name in _OUTPUTS)
        elif not isinstance(outputs, tuple | list):
            outputs = (outputs,)
        pool, spatial, logits = (*outputs, None, None, None)[:3]
        for value in (pool, spatial, logits):
            if value is not None and not (
                isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(images)
            ):
                found = (
                    f"a tensor {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise ConfigError(
                    f"extractor {self.identity['name']}: returned {found} for {len(images)} images,"
                    " expected a tensor of as many rows, or pool, spatial and logits"
                )
        if pool is None:
            raise ConfigError(
                f"extractor {self.identity['name']}: returned no pooled features (pool)"
            )
        return Features(
            _rows(pool),
            None if spatial is None else _rows(_adm_spatial(spatial)),
            None if logits is None else logits.double().softmax(dim=1).cpu().numpy(),
        )

    def probe(self, size: int | tuple[int, int], channels: int) -> Features:
        """Return the features of one blank image: what this network has, and of which sizes."""
        return self(np.zeros((1, *sides(size), channels), dtype=np.uint8))


def load_extractor(source: str, device: torch.device | str) -> Extractor:
    """Load an extractor.

    Args:
        source: `inception` (torch-fidelity's TensorFlow-compatible network, whose weights it
            downloads), `inception:FILE` (the same with its weights in FILE), `pixels` (the values
            themselves), `FILE.pt` (TorchScript) or `FILE.py:NAME` (a class or function there that
            returns a module; the file is run).
    Raises: ConfigError if it cannot be loaded, saying why.
    """
    kind, _, rest = source.partition(":")
    if kind == INCEPTION:
        return Extractor(_TensorflowInception(rest or None), _inception_identity(rest), device)
    if source == PIXELS:
        return Extractor(_Pixels(), {"name": PIXELS}, device, colour=False)
    if kind.endswith(".py") and rest:
        return Extractor(
            _from_python(Path(kind), rest),
            {"name": source, "checksum": _checksum(Path(kind))},
            device,
        )
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"extractor {source}: no such file, and neither inception nor pixels nor FILE.py:NAME"
        )
    try:
        if (kind := identify(path)) != SCRIPT:
            raise ValueError(f"it is {kind}")
        network = torch.jit.load(str(path), map_location=device)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"extractor {source}: no TorchScript archive that can be read ({cause_of(error)}):"
            " save the network with torch.jit.script(network).save(FILE)"
        ) from None
    return Extractor(network, {"name": source, "checksum": _checksum(path)}, device)


class _TensorflowInception(nn.Module):
    """Inception of 2015 with TensorFlow 1's resize: `pool_3`, `mixed_6/conv`, and logits without
    bias, as ADM reads them.

    `mixed_6/conv` is the first branch of torch-fidelity's `Mixed_6d`; the numbering of several
    ports leads to `Mixed_6e`, whose sFID is another number.
    """

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (
            ImportError,
            RuntimeError,
            AttributeError,
        ) as error:  # torchvision of another build fails in its own ways
            raise ConfigError(
                f"extractor inception: torch-fidelity cannot be imported ({cause_of(error)}): pip"
                " install 'promoe_ds[eval]' beside a torchvision made for this torch, or name a"
                " network of your own"
            ) from None
        try:
            self._network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=weights,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"extractor inception: its weights cannot be loaded ({cause_of(error)}):"
                " give them as inception:FILE"
            ) from None
        self._spatial: Tensor | None = None
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return pooled features (N, 2048), the map (N, 192, 17, 17) and logits (N, 1008)."""
        pool, logits = self._network(images_NCHW)
        return pool, self._spatial, logits


class _Pixels(nn.Module):
    """The pixels in 0 ... 1 as features: for images of a few pixels, and for trying things out."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return (N, C * H * W)."""
        return images_NCHW.flatten(1).float() / 255


def _adm_spatial(spatial: Tensor) -> Tensor:
    """Return the first channels of a map (N, C', H', W'), channels last as in TensorFlow; rows as
    they are.
    """
    return spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1) if spatial.ndim == 4 else spatial


def _rows(values: Tensor) -> np.ndarray:
    return values.reshape(len(values), -1).float().cpu().numpy()


def _from_python(path: Path, name: str) -> nn.Module:
    if not path.is_file():
        raise ConfigError(f"extractor {path}:{name}: no such file")
    spec = importlib.util.spec_from_file_location("promoe_ds_extractor", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        factory = getattr(module, name, None)
        network = factory() if callable(factory) else None
    except Exception as error:  # the user's own code
        raise ConfigError(f"extractor {path}:{name}: {_describe(error)}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"extractor {path}:{name}: {name} there is no class or function that returns a"
            " torch.nn.Module"
        )
    return network


def _inception_identity(weights: str) -> dict[str, Any]:
    identity = {
        "name": INCEPTION,
        "network": "torch-fidelity inception-v3-compat",
        "features": "2048, Mixed_6d.branch1x1[:, :7], logits_unbiased",
        "resize": "TensorFlow 1 bilinear to 299, in the network",
        **versions_of("torch-fidelity"),
    }
    return {**identity, "checksum": _checksum(Path(weights))} if weights else identity


def _describe(error: Exception) -> str:
    """Return an error of a user's code as one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[-1] if lines else ''} ({frames[-1].filename}, line"
        f" {frames[-1].lineno})"
    )


def _checksum(path: Path) -> str:
    return f"xxh3_64:{checksum(path)}"
