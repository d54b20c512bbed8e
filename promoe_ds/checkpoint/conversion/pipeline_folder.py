"""The folder of a diffusers pipeline, but for the network's weights: which classes, which settings,
which autoencoder, which text encoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promoe_ds.config import config_from_dict
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.text_encoder import encoder_of, load_text_model
from promoe_ds.data.vae import identify, load_autoencoder
from promoe_ds.errors import CheckpointError, ConfigError, explaining
from promoe_ds.files import write_json
from promoe_ds.model.export import writer_of

MODEL_INDEX = "model_index.json"
TRANSFORMER = "transformer"
#: diffusers' name for a model's weights.
PIPELINE_STEM = "diffusion_pytorch_model"
_CLASS = ("promoe_ds", "ProMoETransformer2DModel")
#: Before our names in the transformer's files.
KEY_PREFIX = "denoiser."


def write_pipeline_configs(
    folder: Path,
    config: RunConfig,
    origin: Mapping[str, Any],
    vae: str | None,
    text_encoder: str | None,
) -> None:
    """Write all of a pipeline's folder but the network's weights.

    Args:
        vae: a folder or hub name of an autoencoder, which is copied; without one, latents are all
            that can be drawn.
        text_encoder: likewise of the encoder of prompts, with its tokenizer; without one, both must
            be given when the pipeline is loaded.
    Raises: DataError for an autoencoder or a text encoder that cannot be loaded; ConfigError for
        one that is not the model's.
    """
    import diffusers

    from promoe_ds.diffusion.sampler import build_scheduler

    version = diffusers.__version__
    index: dict[str, Any] = {
        "_class_name": "ProMoEPipeline",
        "_diffusers_version": version,
        TRANSFORMER: list(_CLASS),
        "vae": [None, None],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    scheduler = build_scheduler(config)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    if vae is not None:
        autoencoder = load_autoencoder(vae)
        if misfit := identify(autoencoder, vae).misfit(config):
            raise ConfigError(f"--vae {vae}: has {misfit}")
        autoencoder.save_pretrained(folder / "vae")
        index["vae"] = ["diffusers", type(autoencoder).__name__]
    if text_encoder is not None:
        if config.model.condition == "class":
            raise ConfigError(
                f"--text-encoder {text_encoder}: the model is conditioned on classes: leave it out"
            )
        encoder_of(config, name=text_encoder)  # to refuse another one
        parts = dict(zip(("text_encoder", "tokenizer"), load_text_model(text_encoder), strict=True))
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = ["transformers", type(part).__name__]
    network = {
        "_class_name": _CLASS[1],
        "_diffusers_version": version,
        "run": config.model_dump(mode="json"),
        "origin": dict(origin),
    }
    write_json(folder / TRANSFORMER / "config.json", network)
    write_json(folder / MODEL_INDEX, index)


def read_pipeline_config(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Return the config and the origin of a pipeline's folder.

    Raises: CheckpointError naming the file that cannot be understood.
    """
    path = folder / TRANSFORMER / "config.json"
    with explaining(f"{path}: cannot be understood"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["_class_name"] != _CLASS[1]:
            raise CheckpointError(f"{path}: is of a {values['_class_name']}, not of a {_CLASS[1]}")
        origin = dict(values.get("origin") or {})
        config = config_from_dict(values["run"], source=str(path), written_by=writer_of(origin))
    return config, origin
