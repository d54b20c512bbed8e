"""The diffusion transformer. One file for every method: a method is a router and a preset.

Letters: B images, S tokens per image, D width, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from promoe_ds.condition import ClassCondition, Condition
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import ConfigError
from promoe_ds.model.blocks import DiTBlock, FinalLayer, Norm, Texts
from promoe_ds.model.embeddings import (
    ConditionEmbedding,
    LabelEmbedding,
    PatchEmbedding,
    PreparedCondition,
    TextEmbedding,
    TimestepEmbedding,
    fixed_positions,
)
from promoe_ds.model.rotary import rotations
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.partition import partition_samples


@dataclass(frozen=True)
class DenoiserOutput:
    """A forward pass as training sees it: the prediction and each MoE layer's plan, by block
    index.
    """

    prediction_BZHW: Tensor
    plans: dict[int, RoutingPlan]

    @property
    def aux_losses(self) -> dict[str, Tensor]:
        """The routers' losses by name, each the sum over the layers."""
        losses: dict[str, Tensor] = {}
        for plan in self.plans.values():
            for name, value in plan.aux_losses.items():
                losses[name] = losses[name] + value if name in losses else value
        return losses


class DiT(nn.Module):
    """Predicts the velocity (or noise) of noised latents under a condition."""

    positions: Tensor

    def __init__(
        self, config: RunConfig, blocks: list[DiTBlock], norm: type[Norm] = nn.LayerNorm
    ) -> None:
        """Assemble the network around `blocks`, with `norm` behind them; uninitialised
        (`model.init` fills it).
        """
        super().__init__()
        model = config.model
        self.config = config
        self.patch_embedding = PatchEmbedding(
            model.patch_size, model.in_channels, model.hidden_size
        )
        self.timestep_embedding = TimestepEmbedding(model.hidden_size)
        if model.condition == "text":
            self.text_embedding = TextEmbedding(model.pooled_width, model.hidden_size)
        else:
            self.label_embedding = LabelEmbedding(model.label_rows, model.hidden_size)
        self.blocks = cast("Sequence[DiTBlock]", nn.ModuleList(blocks))
        self.final_layer = FinalLayer(model.hidden_size, model.patch_size, model.out_channels, norm)
        self.register_buffer(
            "positions", torch.empty(model.tokens_per_image, model.hidden_size), persistent=False
        )
        self.register_load_state_dict_pre_hook(_take_own_positions)
        #: Position tables of other sizes, and rotations, made when first needed.
        self._tables: dict[tuple[object, ...], Tensor] = {}
        self._joins_unconditional = False

    def join_unconditional(self) -> bool:
        """Compute the unconditional expert as one more routed one from now on, so that no shape
        depends on how many samples are null; return whether that is so.

        Not where it would cost more than it saves: where it takes a copy of the weights (see
        `moe.joining`), and where K > 1, for null samples would be computed K times. Nor with
        several unconditional experts, or where experts choose from the whole batch.
        """
        self._joins_unconditional = (
            self.config.routing.top_k == 1
            and bool(self.moe_layers())
            and all(layer.can_join_unconditional() for layer in self.moe_layers().values())
        )
        return self._joins_unconditional

    def keep_own_positions(self) -> None:
        """Count the position table among the state: it is to come, or came, with the weights."""
        self.register_buffer("positions", self.positions, persistent=True)

    def reset_positions(self) -> None:
        """(Re)compute the fixed position table, e.g. after materialising from the meta device."""
        positions = fixed_positions(self.config.model)
        self.positions = positions.to(self.positions.device, self.positions.dtype)

    def _positions_of(self, grid: tuple[int, int]) -> Tensor:
        """Return the position table of a grid of patches, beside the network's own."""
        model, own = self.config.model, self.positions
        if grid == model.patch_grid:
            return own
        return self._table(
            "positions", grid, own, lambda: fixed_positions(model, grid).to(own.device, own.dtype)
        )

    def _rotations(self, grid: tuple[int, int], like: Tensor) -> Tensor | None:
        """Return the rotary positions of a grid of patches, None where there are none."""
        model = self.config.model
        if model.block == "dit":
            return None
        width, scale = model.head_width, model.position_scale
        return self._table("rotations", grid, like, lambda: rotations(*grid, width, scale, like))

    def _table(
        self, name: str, grid: tuple[int, int], like: Tensor, make: Callable[[], Tensor]
    ) -> Tensor:
        """Return a table of a grid of patches, made when first needed."""
        key = name, grid, like.device, like.dtype
        if key not in self._tables:
            with torch.inference_mode(mode=False):  # training may follow sampling
                self._tables[key] = make()
        return self._tables[key]

    def _grid_of(self, latents_BZHW: Tensor) -> tuple[int, int]:
        model, (height, width) = self.config.model, latents_BZHW.shape[-2:]
        if height % model.patch_size or width % model.patch_size:
            raise ConfigError(
                f"latents of {height}x{width}: their sides must be multiples of"
                f" model.patch_size={model.patch_size}"
            )
        return model.grid_of((height, width))

    def moe_layers(self) -> dict[int, MoELayer]:
        """Return the MoE layers by block index."""
        return {index: block.moe for index, block in enumerate(self.blocks) if block.is_moe}

    def forward(
        self, latents_BZHW: Tensor, timestep_B: Tensor, condition: Condition | Tensor
    ) -> Tensor:
        """Predict; what samplers call.

        Args:
            latents_BZHW: noised latents, of any size that the patch size divides.
            timestep_B: float, as the objective gives it: sigma * num_train_timesteps, or DDPM's
            integer.
            condition: of each sample, prepared or not; labels int64 in 0 ... num_classes mean a
            ClassCondition, num_classes is null.
        Returns: (B, out_channels, H, W) in the latents' dtype; the first Z channels are the
        prediction.
        """
        return self.denoise(latents_BZHW, timestep_B, condition).prediction_BZHW

    def denoise(
        self, latents_BZHW: Tensor, timestep_B: Tensor, condition: Condition | Tensor
    ) -> DenoiserOutput:
        """Predict and keep the routing plans; arguments as `forward`.

        Source: DiT with the feed-forward of Eq. 5; official: the same, in fp32.
        """
        if isinstance(condition, Tensor):
            condition = ClassCondition(condition, self.config.model.null_label)
        partition = partition_samples(
            condition,
            has_unconditional_expert=self.config.routing.num_unconditional_experts > 0,
            joins_unconditional=self._joins_unconditional,
        )
        dtype = self.patch_embedding.proj.weight.dtype
        grid = self._grid_of(latents_BZHW)
        x_BSD = self.patch_embedding(latents_BZHW.to(dtype)) + self._positions_of(grid).to(dtype)
        vector_BD, texts = self._embed(condition, x_BSD.shape[1])
        sees_data = self.config.model.time == "data"
        if sees_data:
            timestep_B = 1 - timestep_B / self.config.diffusion.num_train_timesteps
        condition_BD = self.timestep_embedding(timestep_B) + vector_BD
        turns_SG = self._rotations(grid, x_BSD)
        plans: dict[int, RoutingPlan] = {}
        for index, block in enumerate(self.blocks):
            x_BSD, plan = block(x_BSD, condition_BD, partition, texts[index], turns_SG)
            if plan is not None:
                plans[index] = plan
        patches = self.final_layer(x_BSD, condition_BD)
        prediction_BZHW = self._unpatchify(-patches if sees_data else patches, grid)
        return DenoiserOutput(prediction_BZHW.to(latents_BZHW.dtype), plans)

    @torch.no_grad()
    def prepare(
        self, condition: Condition, latent_size: tuple[int, int] | None = None
    ) -> Condition:
        """Return a condition with what does not depend on noise levels computed once for all of
        them: each block's keys and values of the texts. One of classes comes back as it is.

        Call after dropping and joining, in the context of the passes themselves (autocast, FP8).
        Args:
            latent_size: of the images; the model's own if left out.
        """
        model = self.config.model
        vector_BD, texts = self._embed(condition, model.tokens_of(latent_size or model.input_size))
        made = tuple(
            Texts(
                each.is_key_B11K,
                each.states_BLC,
                block.attention.text_keys_values(each.states_BLC),
            )
            for block, each in zip(self.blocks, texts, strict=True)
            if each is not None
        )
        if not made:
            return condition
        return PreparedCondition(condition, vector_BD, made, num_null=condition.num_null)

    def _embed(
        self, condition: Condition, tokens_per_image: int
    ) -> tuple[Tensor, Sequence[Texts | None]]:
        """Return the condition's vector (B, D), and what each block's attention reads of it."""
        if isinstance(condition, PreparedCondition):
            return condition.vector_BD, condition.texts
        embedding: ConditionEmbedding = (
            self.text_embedding if self.config.model.condition == "text" else self.label_embedding
        )
        texts = embedding.texts(condition, tokens_per_image)
        return embedding.vector(condition), [texts] * len(self.blocks)

    def patchify(self, latents_BZHW: Tensor) -> Tensor:
        """Return the latents' patches (B, S, patch * patch * Z), values in the order of the
        network's own output.
        """
        (rows, columns), patch = self._grid_of(latents_BZHW), self.config.model.patch_size
        tiles = latents_BZHW.reshape(len(latents_BZHW), -1, rows, patch, columns, patch)
        return tiles.permute(0, 2, 4, 3, 5, 1).reshape(len(latents_BZHW), rows * columns, -1)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        (rows, columns), patch = grid, self.config.model.patch_size
        tiles = patches.view(-1, rows, columns, patch, patch, self.config.model.out_channels)
        return tiles.permute(0, 5, 1, 3, 2, 4).reshape(
            len(tiles), -1, rows * patch, columns * patch
        )


def _take_own_positions(network: DiT, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    if f"{prefix}positions" in state:
        network.keep_own_positions()
