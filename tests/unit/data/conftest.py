"""Images, an autoencoder and their latents, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from promoe_ds.data.encode import encode
from promoe_ds.distributed.context import single_process

from .made import request, save_images, save_vae


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Return a folder with `images`, `vae` and `latents`; nobody writes into it."""
    folder = tmp_path_factory.mktemp("made")
    save_vae(folder / "vae")
    save_images(folder / "images")
    encode(request(folder, "latents"), single_process())
    return folder
