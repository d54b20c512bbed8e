"""A matcher: which of many captions a picture shows, learned from real pictures in a minute.

A small network takes pictures to a text encoder's space of sentences, trained to be nearest to its
own caption among all that it is trained on (contrastive, as CLIP is: Radford et al., 2021; here the
text side is frozen). Letters: N pictures, M captions, H side, d features, P width of a sentence.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.sampling import one_thread
from promoe_ds.files import replacing
from promoe_ds.logs import get_logger

_LOG = get_logger("evaluate")

#: Of the first stage; each of the three halves the side and doubles the channels after it.
_CHANNELS = 48
_EPOCHS, _BATCH, _PASS = 40, 128, 256
_LEARNING_RATE, _WEIGHT_DECAY, _WARM_UP = 3e-3, 0.05, 0.15
#: That cosines are divided by.
_TEMPERATURE = 0.05
#: Augmentation, at most: rotation in radians, zoom, shift over half a side, contrast, brightness,
# noise; values are in [-1, 1].
_TURN, _ZOOM, _SHIFT, _CONTRAST, _BRIGHTNESS, _NOISE = 0.15, 0.12, 0.12, 0.08, 0.05, 0.15
_SEED = 0


class Matcher(nn.Module):
    """Takes pictures to features, and on to sentences."""

    mean_P: Tensor

    def __init__(self, sentences_MP: Tensor) -> None:
        """Match captions, whose sentence vectors in training these are: their mean is left out of
        every comparison, because all sentences share it.
        """
        super().__init__()
        stages, width = [], 3
        for out in (_CHANNELS, 2 * _CHANNELS, 4 * _CHANNELS):
            stages += [_convolution(width, out, stride=2), _convolution(out, out, stride=1)]
            width = out
        self.body = nn.Sequential(*stages)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4 * width, sentences_MP.shape[1]),
        )
        self.register_buffer("mean_P", sentences_MP.mean(0))

    @torch.no_grad()
    def features(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Return the features (N, d) of uint8 pictures (N, H, H, 3): means over the last map."""
        return self._passes(images_NHWC, lambda maps: maps.mean(dim=(2, 3)))

    @torch.no_grad()
    def ranks(self, images_NHWC: np.ndarray, own_N: np.ndarray, sentences_MP: Tensor) -> np.ndarray:
        """Return how many of M captions are nearer to each picture than its own, (N,) int64."""
        vectors_NP = torch.from_numpy(self._passes(images_NHWC, self.head))
        cosines_NM = F.normalize(vectors_NP, dim=1) @ self.centred(sentences_MP).T
        own = cosines_NM.gather(1, torch.from_numpy(own_N)[:, None])
        return (cosines_NM > own).sum(dim=1).numpy()

    def centred(self, sentences_MP: Tensor) -> Tensor:
        """Return sentence vectors without what they share, of length 1."""
        return F.normalize(sentences_MP - self.mean_P, dim=1)

    def _passes(self, images_NHWC: np.ndarray, last: Callable[[Tensor], Tensor]) -> np.ndarray:
        parts = [images_NHWC[at : at + _PASS] for at in range(0, len(images_NHWC), _PASS)]
        return np.concatenate([last(self.body(to_tensor(part))).numpy() for part in parts])


def to_tensor(images_NHWC: np.ndarray) -> Tensor:
    """Return uint8 pictures as fp32 in [-1, 1], (N, 3, H, H), channels last in memory."""
    return torch.from_numpy(images_NHWC.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def train_matcher(
    images_NHWC: np.ndarray, sentences_NP: Tensor, *, epochs: int = _EPOCHS
) -> Matcher:
    """Train a matcher on uint8 pictures (N, H, H, 3) and the sentence vectors of their captions, on
    the CPU, on one thread: the same weights every time.
    """
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(_SEED)
        matcher, images = Matcher(sentences_NP).train(), to_tensor(images_NHWC)
        targets_NP = matcher.centred(sentences_NP)
        optimizer = torch.optim.AdamW(
            matcher.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
        )
        batches = [ids for _ in range(epochs) for ids in torch.randperm(len(images)).split(_BATCH)]
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _LEARNING_RATE, total_steps=len(batches), pct_start=_WARM_UP
        )
        for ids in batches:
            vectors = F.normalize(matcher.head(matcher.body(augmented(images[ids]))), dim=1)
            loss = F.cross_entropy(vectors @ targets_NP.T / _TEMPERATURE, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return matcher.eval()


def cached_matcher(
    images_NHWC: np.ndarray, sentences_NP: Tensor, made_of: Sequence[str]
) -> tuple[Matcher, str]:
    """Return the matcher of these pictures, trained once on a machine; and its name.

    It is kept in $XDG_CACHE_HOME/promoe_ds (~/.cache/promoe_ds) under a checksum of pictures, this
    file, torch's version and `made_of`: what the vectors are made of, whose last digits vary.
    Raises: ConfigError if nothing can be kept there.
    """
    digest = xxhash.xxh3_64(Path(__file__).read_bytes())
    digest.update("\0".join([torch.__version__, *made_of]).encode())
    digest.update(np.ascontiguousarray(images_NHWC).tobytes())
    name = f"matcher-{digest.hexdigest()}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "promoe_ds"
    path = folder / f"{name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Runs that are judged at a time wait for the first of them.
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                _LOG.info("training the matcher, once: about a minute, then it is %s", path)
                with replacing(path) as temporary:
                    save_file(train_matcher(images_NHWC, sentences_NP).state_dict(), temporary)
    except OSError as error:
        raise ConfigError(
            f"XDG_CACHE_HOME: the matcher cannot be kept in {folder} ({error.strerror}): set it to"
            " a folder that can be written"
        ) from None
    matcher = Matcher(sentences_NP).eval()
    matcher.load_state_dict(load_file(path))
    return matcher, name


def augmented(images_N3HW: Tensor) -> Tensor:
    """Return pictures turned, zoomed, shifted, in other light and noisy, each its own way; what
    comes in at the edges is white.
    """
    count = len(images_N3HW)

    def random(limit: float, *shape: int) -> Tensor:
        return (2 * torch.rand(count, *shape) - 1) * limit

    angle, zoom, shift = random(_TURN), 1 + random(_ZOOM), random(_SHIFT, 2)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images_N3HW.shape), align_corners=False)
    moved = F.grid_sample(images_N3HW - 1, grid, align_corners=False) + 1
    lit = moved * (1 + random(_CONTRAST, 3, 1, 1)) + random(_BRIGHTNESS, 3, 1, 1)
    noisy = lit + torch.randn_like(lit) * torch.rand(count, 1, 1, 1) * _NOISE
    return noisy.contiguous(memory_format=torch.channels_last)


def _convolution(width: int, out: int, *, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())
