"""Samples on disk: one file an image under its published name, ADM's npz of all of them, grids.

Every file is written under another name and renamed, so a job that was stopped can resume.
Letters: N images, H, W size, C colour channels, Z latent channels.
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from promoe_ds.config import RunConfig
from promoe_ds.config.model import size_name
from promoe_ds.data.reading import read_json, reading
from promoe_ds.data.vae import Vae
from promoe_ds.errors import ConfigError, DataError, differences
from promoe_ds.evaluation.grids import as_picture
from promoe_ds.evaluation.sources import FolderImages, NpzImages, npz_array
from promoe_ds.files import replacing, write_json
from promoe_ds.logs import get_logger

_LOG = get_logger("sample")

SETTINGS_FILE = "samples.json"
NPZ_FILE = "samples.npz"
FEATURES_FILE = "features.npz"
LATENTS_FILE = "latents.safetensors"
PROMPTS_FILE = "prompts.json"
_PARTS = "parts"
#: Letters of a prompt in a file's name.
_LONGEST_SLUG = 40
#: Settings that do not change an image: a job may resume with others.
_FREE = ("num", "model")


def draws_pixels(config: RunConfig) -> bool:
    """Whether a model makes images as they are: one or three channels, and not trained on latents,
    which may have as many."""
    return config.model.in_channels in (1, 3) and not config.data.traits.holds_latents


def to_uint8(images_NCHW: np.ndarray) -> np.ndarray:
    """Map [-1, 1] to uint8, (N, H, W, C): clamp(127.5 * x + 128, 0, 255), truncated, as
    published.
    """
    return np.clip(127.5 * images_NCHW + 128.0, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def slug(prompt: str) -> str:
    """Return what of a prompt is safe in a file's name: lower-case ASCII letters, digits, hyphens;
    "prompt" if that is nothing.
    """
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain)[:_LONGEST_SLUG].strip("-")
    return words or "prompt"


def image_shape(
    config: RunConfig, vae: Vae | None, latent_size: tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """Return the shape (H, W, C) of a model's images, decoded by `vae` where there is one.

    Args:
        latent_size: (H, W) of the latents; the model's own if left out.
    """
    size = latent_size or config.model.latent_size
    if vae is None:
        return *size, config.model.in_channels
    return *vae.identity.pixels(size), 3


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, H, W, C) uint8 and labels (N,) of a samples.npz or of its folder.

    Raises: DataError if it is missing or no such file.
    """
    file = path / NPZ_FILE if path.is_dir() else path
    images, labels = NpzImages(file), npz_array(file, "labels")
    if labels is None or labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        found = "none" if labels is None else f"{labels.dtype} {labels.shape}"
        raise DataError(f"{file}: labels: {found}, expected integers ({len(images)},)")
    return images.read(range(len(images))), np.array(labels)


def read_sample_prompts(path: Path, num: int) -> list[str]:
    """Return the prompts of the first `num` images of a folder of samples, or of a file in it, in
    their order.

    Raises: DataError if the folder does not say them.
    """
    file = (path if path.is_dir() else path.parent) / PROMPTS_FILE
    prompts = read_json(file, "prompts of samples, by file", dict[str, str])
    if len(prompts) < num:
        raise DataError(f"{file}: {len(prompts)} prompts for {num} images")
    return list(prompts.values())[:num]


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return how the samples of a folder were made; None if it does not say.

    Raises: DataError if its record cannot be read.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path, "record of a sampling job", dict)
    if not isinstance(record.get("num"), int):
        raise DataError(
            f"{path}: states no number of samples (num): remove the folder, or choose another"
        )
    return record


def open_samples(
    path: Path, *, size: int | tuple[int, int] | None = None, num: int | None = None
) -> tuple[NpzImages | FolderImages, dict[str, Any] | None]:
    """Open samples; return them, and how they were made where their folder says so.

    Args:
        size: images of a folder of any sizes are cropped and resized to it; num: take the first.
    Raises: DataError if there are none, fewer than `num`, or a job has not finished; for a size
        that an npz has not.
    """
    npz = path / NPZ_FILE if path.is_dir() else path
    images: NpzImages | FolderImages
    if not path.is_dir() or (npz.is_file() and size is None):
        images = NpzImages(npz)
        if size not in (None, images.size):
            raise DataError(
                f"{path}: its images have {size_name(images.size)} pixels, --image-size"
                f" {size_name(size)} asks for others: only image files are resized, name their"
                " folder"
            )
        record = read_record(npz.parent) if npz.name == NPZ_FILE else None
    else:
        images, record = FolderImages(path, size), read_record(path)
    if num is not None:
        if len(images) < num:
            raise DataError(f"{path}: {len(images)} images, --num {num} asks for more")
        images.keep(num)
    elif record is not None and record["num"] != len(images):
        raise DataError(
            f"{path}: {len(images)} of {record['num']} samples exist: run the sampling again, it "
            "resumes where it stopped"
        )
    return images, record


@dataclass(frozen=True)
class SampleFolder:
    """The folder that a sampling job fills: PNG files, or latents where nothing decodes them."""

    path: Path
    #: (N,) int64: each image's class, or the place of its prompt in `prompts`.
    labels: np.ndarray
    #: Of one image (H, W, C), or of one latent (Z, H, W).
    shape: tuple[int, int, int]
    as_images: bool
    #: What the images are drawn from, if not classes.
    prompts: tuple[str, ...] = ()

    @property
    def whole(self) -> Path:
        """The file of all samples."""
        return self.path / (NPZ_FILE if self.as_images else LATENTS_FILE)

    @property
    def _files(self) -> Path:
        return self.path if self.as_images else self.path / _PARTS

    def open(self, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        """Make the folder, or recognise the same job in it; rank 0 only.

        Args:
            environment: software and machine of this call, recorded beside those of earlier ones: a
                job may resume with others.
        Raises: ConfigError if it holds anything else, or samples made with other settings.
        """
        with self._writing():
            before = read_record(self.path)
            if before is not None:
                self._compare(before, settings)
            elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ConfigError(
                    f"--out {self.path}: holds something else than samples: choose an empty folder"
                )
            environments = (before or {}).get("environments", [])
            if environment not in environments:
                environments = [*environments, environment]
            self._files.mkdir(parents=True, exist_ok=True)
            if self.prompts:
                prompts = {
                    self._path(index).name: self._prompt(index) for index in range(len(self.labels))
                }
                write_json(self.path / PROMPTS_FILE, prompts)
            write_json(self.path / SETTINGS_FILE, {**settings, "environments": environments})

    def is_complete(self, settings: dict[str, Any]) -> bool:
        """Whether all samples of this job are there, and the file of them; rank 0 only.

        Raises: ConfigError if it holds samples made with other settings.
        """
        before = read_record(self.path)
        if before is None or before["num"] != len(self.labels) or not self.whole.is_file():
            return False
        self._compare(before, settings)
        with suppress(DataError):
            is_whole = not self.as_images or len(NpzImages(self.whole)) == len(self.labels)
            return is_whole and not self.missing()
        return False

    def _compare(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        fixed = {name: value for name, value in settings.items() if name not in _FREE}
        if differing := differences(before, fixed):
            raise ConfigError(
                f"--out {self.path} holds samples made with other settings: {'; '.join(differing)}."
                " Choose another folder, or the same settings"
            )
        have, want = before["num"], settings["num"]
        if have > want or (have < want and (self.path / LATENTS_FILE).is_file()):
            raise ConfigError(
                f"--out {self.path} holds {have} samples, {want} are asked for: choose another one"
            )

    def missing(self) -> list[int]:
        """Return the indices of images without a file, or whose file a crash has left empty."""
        if (self.path / LATENTS_FILE).is_file():
            return []
        with os.scandir(self._files) as entries:
            names = {entry.name for entry in entries if entry.is_file() and entry.stat().st_size}
        return [index for index in range(len(self.labels)) if self._path(index).name not in names]

    def write(self, index: int, value: np.ndarray) -> None:
        """Write image `index` (H, W, C) uint8, or its latent (Z, H, W).

        Raises: ConfigError if it cannot be written.
        """
        with self._writing(), replacing(self._path(index)) as temporary:
            if self.as_images:
                text = PngInfo()
                if self.prompts:
                    text.add_itxt("prompt", self._prompt(index))
                as_picture(value).save(temporary, format="PNG", pnginfo=text)
            else:
                with temporary.open("wb") as file:
                    np.save(file, value)

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, (H, W, C) uint8, or its latent (Z, H, W).

        Raises: DataError if its file is damaged, or holds something else.
        """
        path = self._path(index)
        with reading(path, "sample"), path.open("rb") as file:
            value = np.asarray(Image.open(file)) if self.as_images else np.load(file)
            value = np.atleast_3d(value)  # a grey file has no axis of channels
        if value.shape != self.shape:
            raise DataError(f"{path}: {value.shape}, expected {self.shape}")
        return value

    def assemble(self) -> list[int]:
        """Write all samples as one file: `samples.npz` (ADM's layout: `arr_0` uint8 NHWC; and
        `labels`), or `latents.safetensors`, unscaled; rank 0 only.

        Returns: the indices of samples whose files were damaged and are removed, to be made again;
        nothing is written then.
        """
        temporary = self.whole.with_suffix(".tmp")
        damaged: list[int] = []
        values = (self._read_or_remove(index, damaged) for index in range(len(self.labels)))
        with self._writing():
            if self.as_images:
                self._write_npz(temporary, values)
            elif not self.whole.is_file():
                save_file({"latents": np.stack(list(values)), "labels": self.labels}, temporary)
            if damaged:
                temporary.unlink()
                return damaged
            if temporary.is_file():
                temporary.replace(self.whole)
            shutil.rmtree(self.path / _PARTS, ignore_errors=True)
        return []

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"--out {self.path}: {error}: correct that and run the same command again, or"
                " choose another folder"
            ) from None

    def _read_or_remove(self, index: int, damaged: list[int]) -> np.ndarray:
        try:
            return self.read(index)
        except DataError as error:
            _LOG.warning("%s: removed, to be made again", error)
            damaged.append(index)
            self._path(index).unlink(missing_ok=True)
            return np.zeros(self.shape, dtype=np.uint8 if self.as_images else np.float32)

    def _write_npz(self, path: Path, images: Iterator[np.ndarray]) -> None:
        """One image in memory at a time: 50,000 of 256 pixels are 9.8 GB."""
        arrays = {
            "arr_0": ((len(self.labels), *self.shape), np.dtype(np.uint8), images),
            "labels": (self.labels.shape, self.labels.dtype, iter([self.labels])),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (shape, dtype, parts) in arrays.items():
                descr = npy.dtype_to_descr(dtype)
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                # A ZipInfo of its own carries no time: the same samples are the same file.
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                    npy.write_array_header_1_0(file, header)
                    for part in parts:
                        file.write(np.ascontiguousarray(part).tobytes())

    def _prompt(self, index: int) -> str:
        return self.prompts[self.labels[index]]

    def _path(self, index: int) -> Path:
        """Return the published name of an image's file, img000123_class45.png, or of a prompt
        img000123_a-red-apple.png.
        """
        shows = slug(self._prompt(index)) if self.prompts else f"class{self.labels[index]}"
        return self._files / f"img{index:06d}_{shows}.{'png' if self.as_images else 'npy'}"
