"""The network as a diffusers model.

Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config import config_from_dict
from promoe_ds.model import build_model
from promoe_ds.model.export import writer_of


class ProMoETransformer2DModel(ModelMixin, ConfigMixin):
    """A DiT of any method of this package, loaded and saved by diffusers; its tensors are the
    export's, under `denoiser.`.
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
            run, source="the transformer's config.json", written_by=writer_of(origin)
        )
        self.denoiser = build_model(self.run_config)
        self.denoiser.reset_positions()
        if (origin or {}).get("own_positions"):
            self.denoiser.keep_own_positions()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Condition | Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict.

        Args:
            hidden_states: noised latents (B, Z, H, W).
            timestep: (B,) or a number; 1000 * sigma of the rectified flow, or a DDPM timestep.
            class_labels: (B,) int64; the number of classes stands for none.
        Returns: (B, out_channels, H, W): the velocity (or noise) first, then what else the network
        was trained to put out.
        """
        timestep_B = torch.as_tensor(timestep, device=hidden_states.device).expand(
            len(hidden_states)
        )
        sample = self.denoiser(hidden_states, timestep_B, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
