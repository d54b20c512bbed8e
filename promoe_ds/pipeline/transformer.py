"""The network as a diffusers model.

Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config import config_from_dict
from promoe_ds.config.schema import RunConfig
from promoe_ds.model import build_model
from promoe_ds.model.export import (
    CONFIG_FILE,
    fill_network,
    read_export_config,
    read_export_state,
    writer_of,
)
from promoe_ds.model.state import POSITIONS


@dataclass
class ProMoETransformer2DModelOutput(Transformer2DModelOutput):
    """The prediction, and in training the routers' auxiliary losses by name: weighted, summed over
    the layers, to be added to the loss.
    """

    aux_losses: dict[str, Tensor] | None = None


class ProMoETransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A DiT of any method of this package, loaded and saved by diffusers; its tensors are the
    export's, under `denoiser.`. Takes PEFT's adapters (`add_adapter`).
    """

    @register_to_config
    def __init__(self, run: dict[str, Any], origin: dict[str, Any] | None = None) -> None:
        """Build the network, uninitialised.

        Args:
            run: the resolved config of the run that trained it, as in an export's config.json.
            origin: where the weights come from.
        Raises: ConfigError if the config cannot be understood.
        """
        super().__init__()
        self.run_config = config_from_dict(
            run, source="the transformer's config.json", written_by=writer_of(origin or {})
        )
        self.denoiser = build_model(self.run_config)
        self.denoiser.reset_positions()
        if (origin or {}).get("own_positions"):
            self.denoiser.keep_own_positions()

    @classmethod
    def from_export(cls, folder: Path, dtype: torch.dtype | None = None) -> Self:
        """Load the network of a single export, a run directory or a checkpoint.

        Raises: CheckpointError naming what is missing or damaged.
        """
        read = _read_export if (folder / CONFIG_FILE).is_file() else _read_run
        config, origin, state = read(folder)
        origin |= {"own_positions": POSITIONS in state}  # for when it is saved again
        with torch.device("meta"):
            model = cls(config.model_dump(mode="json"), origin)
        fill_network(model.denoiser, state)
        return model.eval() if dtype is None else model.to(dtype=dtype).eval()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Condition | Tensor,
        return_dict: bool = True,
    ) -> ProMoETransformer2DModelOutput | tuple[Any, ...]:
        """Predict.

        Args:
            hidden_states: noised latents (B, Z, H, W).
            timestep: (B,) or a number; 1000 * sigma of the rectified flow, or a DDPM timestep.
            class_labels: (B,) int64; the number of classes stands for none. Or a condition, as
                `ProMoEPipeline.encode_prompt` makes one of texts.
        Returns: `sample` (B, out_channels, H, W): the velocity (or noise) first, then what else the
        network was trained to put out; and, in training mode, `aux_losses`.
        """
        timestep_B = torch.as_tensor(timestep, device=hidden_states.device).expand(
            len(hidden_states)
        )
        if self.training:
            made = self.denoiser.denoise(hidden_states, timestep_B, class_labels)
            output = ProMoETransformer2DModelOutput(
                sample=made.prediction_BZHW, aux_losses=made.aux_losses
            )
        else:
            sample = self.denoiser(hidden_states, timestep_B, class_labels)
            output = ProMoETransformer2DModelOutput(sample=sample)
        return output if return_dict else output.to_tuple()


_Parts = tuple[RunConfig, dict[str, Any], dict[str, Tensor]]


def _read_export(folder: Path) -> _Parts:
    config, origin = read_export_config(folder)
    return config, origin, read_export_state(folder, config)


def _read_run(folder: Path) -> _Parts:
    # An export needs no deepspeed; reading what training wrote does.
    from promoe_ds.checkpoint.conversion.convert import find_weights
    from promoe_ds.checkpoint.conversion.sources import open_folder

    source = open_folder(folder)
    kind = find_weights(source, None)
    state = {name: source.read(kind, name) for name in source.kinds[kind]}
    source.check(kind)
    info = source.info
    origin = {**info.origin, "kind": kind, "step": info.step, "samples_seen": info.samples_seen}
    return info.config, origin, state
