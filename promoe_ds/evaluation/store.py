"""Where samples go: one file an image under its published name, written in one move, so that a job can go on after a stop.

Letters: N images, H, W size, C colour channels, Z latent channels.
"""

from __future__ import annotations

import json
import os
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

from promoe_ds.data.reading import reading
from promoe_ds.errors import ConfigError, DataError, differences
from promoe_ds.evaluation.images import image_name, save_png
from promoe_ds.files import json_text, replacing, write_json
from promoe_ds.logs import get_logger

_LOG = get_logger("sample")

SETTINGS_FILE = "samples.json"
NPZ_FILE = "samples.npz"
LATENTS_FILE = "latents.safetensors"
_PARTS = "parts"
#: Settings that do not change an image: a job may go on with others.
_FREE = ("num", "model")


@dataclass(frozen=True)
class SampleStore:
    """A folder of samples: PNG files, or latents where there is no autoencoder to decode them, each of `shape`."""

    folder: Path
    labels: np.ndarray
    shape: tuple[int, int, int]
    as_images: bool

    @property
    def file(self) -> Path:
        """Where all samples come together."""
        return self.folder / (NPZ_FILE if self.as_images else LATENTS_FILE)

    def claim(self, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        """Take the folder, or recognise the same job in it; rank 0 only.

        Args:
            environment: software and machine of this call, noted beside those of earlier ones: a job may go on with others.
        Raises: ConfigError if it holds anything else, or samples drawn otherwise.
        """
        path, settings = self.folder / SETTINGS_FILE, json.loads(json_text(settings))  # JSON knows no tuples
        environments = [environment]
        try:
            if path.is_file():
                before = _read_settings(path)
                self._compare(before, settings)
                earlier = before.get("environments", [])
                environments = earlier if environment in earlier else [*earlier, environment]
            elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ConfigError(f"--out {self.folder} is no empty folder, and no job can go on there: choose another one")
            (self.folder if self.as_images else self.folder / _PARTS).mkdir(parents=True, exist_ok=True)
            write_json(path, {**settings, "environments": environments})
        except (OSError, ValueError) as error:
            raise ConfigError(f"--out {self.folder}: {error}") from None

    def _compare(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        fixed = {name: value for name, value in settings.items() if name not in _FREE}
        if differing := differences(before, fixed):
            raise ConfigError(f"--out {self.folder} holds samples drawn otherwise: {'; '.join(differing)}. Choose another folder")
        if before["num"] > settings["num"] or (before["num"] < settings["num"] and (self.folder / LATENTS_FILE).is_file()):
            raise ConfigError(f"--out {self.folder} holds {before['num']} samples, {settings['num']} are asked for: choose "
                              "another folder")

    def missing(self) -> list[int]:
        """Return the indices of images that are not there yet, or whose files a crash has left empty."""
        if (self.folder / LATENTS_FILE).is_file():
            return []
        folder = self.folder if self.as_images else self.folder / _PARTS
        with os.scandir(folder) as entries:
            there = {entry.name for entry in entries if entry.is_file() and entry.stat().st_size}
        return [index for index in range(len(self.labels)) if self._path(index).name not in there]

    def write(self, index: int, value: np.ndarray) -> None:
        """Write image `index` (H, W, C) uint8, or its latent (Z, H, W).

        Raises: ConfigError if it cannot be written.
        """
        try:
            with replacing(self._path(index)) as temporary:
                if self.as_images:
                    save_png(temporary, value)
                else:
                    with temporary.open("wb") as file:
                        np.save(file, value)
        except OSError as error:
            raise ConfigError(f"--out {self.folder}: {error}. Free the disk and run the same command again") from None

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, (H, W, C) uint8, or its latent (Z, H, W).

        Raises: DataError if its file is damaged, or holds something else.
        """
        path = self._path(index)
        with reading(path, "sample"):
            if self.as_images:
                with Image.open(path) as image:
                    value = np.asarray(image)
                value = value[:, :, None] if value.ndim == 2 else value
            else:
                value = np.load(path, allow_pickle=False)
        if value.shape != self.shape:
            raise DataError(f"{path}: {value.shape}, expected {self.shape}")
        return value

    def assemble(self) -> list[int]:
        """Write all samples as one file: `samples.npz` (ADM's layout: `arr_0` uint8 NHWC; and `labels`), or
        `latents.safetensors`, unscaled; rank 0 only.

        Returns: the indices of samples whose files were damaged and are removed, to be drawn anew; nothing is written then.
        """
        temporary = self.file.with_suffix(".tmp")
        damaged: list[int] = []
        values = (self._read_or_remove(index, damaged) for index in range(len(self.labels)))
        try:
            if self.as_images:
                self._write_npz(temporary, values)
            elif not self.file.is_file():
                latents = torch.from_numpy(np.stack(list(values)))
                save_file({"latents": latents, "labels": torch.from_numpy(self.labels)}, temporary)
            if damaged:
                temporary.unlink()
                return damaged
            if temporary.is_file():
                temporary.replace(self.file)
            shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
            return []
        except OSError as error:
            raise ConfigError(f"--out {self.folder}: {error}. Free the disk and run the same command again") from None

    def _read_or_remove(self, index: int, damaged: list[int]) -> np.ndarray:
        try:
            return self.read(index)
        except DataError as error:
            _LOG.warning("%s: removed, to be drawn anew", error)
            damaged.append(index)
            self._path(index).unlink(missing_ok=True)
            return np.zeros(self.shape, dtype=np.uint8 if self.as_images else np.float32)

    def _write_npz(self, path: Path, images: Iterator[np.ndarray]) -> None:
        """One image in memory at a time: 50,000 of 256 pixels are 9.8 GB."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _write_array(archive, "arr_0", (len(self.labels), *self.shape), np.dtype(np.uint8), images)
            _write_array(archive, "labels", self.labels.shape, self.labels.dtype, iter([self.labels]))

    def _path(self, index: int) -> Path:
        name = image_name(index, int(self.labels[index]))
        return self.folder / name if self.as_images else self.folder / _PARTS / f"{name.removesuffix('.png')}.npy"


def _read_settings(path: Path) -> dict[str, Any]:
    before = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(before, dict) or not isinstance(before.get("num"), int):
        raise ValueError(f"{path.name} is no record of a sampling job: choose another folder")
    return before


def _write_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Iterator[np.ndarray]) -> None:
    # A ZipInfo of its own carries no time: the same samples are the same file.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
        for part in parts:
            file.write(np.ascontiguousarray(part).tobytes())
