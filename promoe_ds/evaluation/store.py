"""Where samples go: one file an image under its published name, written in one move, so that a job can go on after a stop.

Letters: N images, H, W size, C colour channels, Z latent channels.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from safetensors.torch import save_file

from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.images import image_name, save_png

SETTINGS_FILE = "samples.json"
NPZ_FILE = "samples.npz"
LATENTS_FILE = "latents.safetensors"
_PARTS = "parts"
#: Settings that do not change an image: a job may go on with others.
_FREE = ("num", "versions", "model")


@dataclass(frozen=True)
class SampleStore:
    """A folder of samples: PNG files, or latents where there is no autoencoder to decode them."""

    folder: Path
    labels: np.ndarray
    as_images: bool

    def claim(self, settings: dict[str, Any]) -> None:
        """Take the folder, or recognise the same job in it; rank 0 only.

        Raises: ConfigError if it holds anything else, or samples drawn otherwise.
        """
        path, settings = self.folder / SETTINGS_FILE, json.loads(json.dumps(settings))  # JSON knows no tuples
        try:
            if path.is_file():
                self._compare(json.loads(path.read_text(encoding="utf-8")), settings)
            elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ConfigError(f"--out {self.folder} is no empty folder, and no job can go on there: choose another one")
            (self.folder if self.as_images else self.folder / _PARTS).mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            temporary.replace(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--out {self.folder}: {error}") from None

    def _compare(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        differing = [f"{name} was {before.get(name)!r} and is {value!r}" for name, value in settings.items()
                     if name not in _FREE and before.get(name) != value]
        if differing:
            raise ConfigError(f"--out {self.folder} holds samples drawn otherwise: {'; '.join(differing)}. Choose another folder")
        if before["num"] > settings["num"] or (before["num"] < settings["num"] and (self.folder / LATENTS_FILE).is_file()):
            raise ConfigError(f"--out {self.folder} holds {before['num']} samples, {settings['num']} are asked for: choose "
                              "another folder")

    def missing(self) -> list[int]:
        """Return the indices of images that are not there yet."""
        if (self.folder / LATENTS_FILE).is_file():
            return []
        folder = self.folder if self.as_images else self.folder / _PARTS
        there = {path.name for path in folder.iterdir()}
        return [index for index in range(len(self.labels)) if self._path(index).name not in there]

    def write(self, index: int, value: np.ndarray) -> None:
        """Write image `index` (H, W, C) uint8, or its latent (Z, H, W).

        Raises: ConfigError if it cannot be written.
        """
        path = self._path(index)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            if self.as_images:
                save_png(temporary, value)
            else:
                with temporary.open("wb") as file:
                    np.save(file, value)
            temporary.replace(path)
        except OSError as error:
            raise ConfigError(f"--out {self.folder}: {error}. Free the disk and run the same command again") from None

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, (H, W, C) uint8, or its latent."""
        if not self.as_images:
            return np.load(self._path(index), allow_pickle=False)
        with Image.open(self._path(index)) as image:
            pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def assemble(self) -> Path:
        """Write all samples as one file: `samples.npz` (ADM's layout: `arr_0` uint8 NHWC; and `labels`), or
        `latents.safetensors`, unscaled; rank 0 only.
        """
        try:
            if self.as_images:
                return self._write_npz()
            path = self.folder / LATENTS_FILE
            if not path.is_file():
                latents = torch.from_numpy(np.stack([self.read(index) for index in range(len(self.labels))]))
                save_file({"latents": latents, "labels": torch.from_numpy(self.labels)}, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
            shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
            return path
        except OSError as error:
            raise ConfigError(f"--out {self.folder}: {error}. Free the disk and run the same command again") from None

    def _write_npz(self) -> Path:
        """One image in memory at a time: 50,000 of 256 pixels are 9.8 GB."""
        path = self.folder / NPZ_FILE
        temporary = path.with_suffix(".tmp")
        shape = (len(self.labels), *self.read(0).shape)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _write_array(archive, "arr_0", shape, np.dtype(np.uint8), (self.read(index) for index in range(len(self.labels))))
            _write_array(archive, "labels", self.labels.shape, self.labels.dtype, iter([self.labels]))
        temporary.replace(path)
        return path

    def _path(self, index: int) -> Path:
        name = image_name(index, int(self.labels[index]))
        return self.folder / name if self.as_images else self.folder / _PARTS / f"{name.removesuffix('.png')}.npy"


def _write_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Iterator[np.ndarray]) -> None:
    # A ZipInfo of its own carries no time: the same samples are the same file.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
        for part in parts:
            file.write(np.ascontiguousarray(part).tobytes())
