"""A training step as published ProMoE code makes it, in plain torch: a yardstick for ours.

Written anew from the paper's formulas and the known form of such code: separate experts in a loop,
torch's own AdamW, the moving average as a second model, no DeepSpeed, no statistics.
Letters: B images, S tokens per image, T = B*S, D width, E routed experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config import RunConfig
from promoe_ds.config.accounting import TIMESTEP_FREQUENCIES
from promoe_ds.errors import ConfigError
from promoe_ds.model.embeddings import sincos_positions


def published_step(config: RunConfig) -> Callable[[], None]:
    """Return a whole step of one micro-batch: draws, passes, clipping, AdamW, moving average.

    Raises: ConfigError for a recipe of another kind than the published ones.
    """
    routing, settings = config.routing, config.optimizer
    kind = (routing.method, routing.top_k, routing.activation, routing.expert_type)
    experts = (routing.num_shared_experts, routing.num_unconditional_experts)
    is_of_labels = config.model.condition == "class"
    if kind != ("token_choice", 1, "identity", "gelu") or experts != (1, 1) or not is_of_labels:
        raise ConfigError(
            f"recipe {config.name}: the published step is for labels, token_choice with top_k 1,"
            " identity scores, GELU experts, one shared and one unconditional: use promoe_s"
        )
    network, images = PublishedNetwork(config).train(), config.train.micro_batch_size
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=0.0
    )
    model, decay = config.model, settings.ema_decays[0]
    latents = torch.randn(images, model.in_channels, *model.latent_size)
    labels = torch.randint(model.num_classes, (images,))

    def step() -> None:
        drop = torch.rand(images) < config.diffusion.label_dropout
        noise, sigma = torch.randn_like(latents), torch.randn(images).sigmoid()
        share = sigma.view(-1, 1, 1, 1)
        noised = (1 - share) * latents + share * noise
        condition = torch.where(drop, model.num_classes, labels)
        predicted, contrast = network(noised, 1000 * sigma, condition)
        (F.mse_loss(predicted[:, : model.in_channels], noise - latents) + contrast).backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(average.parameters(), network.parameters(), strict=True):
                old.mul_(decay).add_(new, alpha=1 - decay)

    return step


class _FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )


class _Experts(nn.Module):
    """Eq. 5 for one choice a token: experts one after the other, each on the tokens of its mask."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        routing, width, hidden = config.routing, config.model.hidden_size, config.expert_width
        self.prototypes = nn.Parameter(torch.randn(routing.num_experts, width))
        self.experts = nn.ModuleList(
            _FeedForward(width, hidden) for _ in range(routing.num_experts)
        )
        self.unconditional = _FeedForward(width, hidden)
        self.shared = _FeedForward(width, config.shared_expert_width)
        self.temperature = routing.rcl_temperature

    def forward(self, x_BSD: Tensor, is_null_B: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = x_BSD.flatten(0, 1)
        is_null_T = is_null_B.repeat_interleave(x_BSD.shape[1])
        cosines_TE = F.normalize(x_TD, dim=-1) @ F.normalize(self.prototypes, dim=-1).T
        gate_T, chosen_T = cosines_TE.max(dim=-1)
        chosen_T = chosen_T.masked_fill(is_null_T, -1)
        routed_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self.experts):
            mask_T = chosen_T == index
            if mask_T.any():
                routed_TD[mask_T] = expert(x_TD[mask_T]) * gate_T[mask_T, None]
        if is_null_T.any():
            routed_TD[is_null_T] = self.unconditional(x_TD[is_null_T])
        output_TD = self.shared(x_TD) + routed_TD
        return output_TD.view_as(x_BSD), self._contrast(x_TD, chosen_T)

    def _contrast(self, x_TD: Tensor, chosen_T: Tensor) -> Tensor:
        """Eq. 6 over the experts that have tokens."""
        active = chosen_T[chosen_T >= 0].unique()
        if not len(active):
            return x_TD.new_zeros(())
        centroids = torch.stack([x_TD[chosen_T == index].mean(dim=0) for index in active])
        logits = F.normalize(self.prototypes[active], dim=-1) @ F.normalize(centroids, dim=-1).T
        return F.cross_entropy(logits / self.temperature, torch.arange(len(active)))


class _Block(nn.Module):
    def __init__(self, config: RunConfig, index: int) -> None:
        super().__init__()
        model, width = config.model, config.model.hidden_size
        self.heads, self.is_moe = model.num_heads, config.is_moe_block(index)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.mlp = (
            _Experts(config) if self.is_moe else _FeedForward(width, int(model.mlp_ratio * width))
        )

    def forward(self, x: Tensor, condition: Tensor, is_null_B: Tensor) -> tuple[Tensor, Tensor]:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(condition)[
            :, None
        ].chunk(6, dim=-1)
        tokens = self.norm(x) * (1 + scale_a) + shift_a
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + gate_a * self.proj(mixed)
        tokens = self.norm_2(x) * (1 + scale_f) + shift_f
        output, contrast = (
            self.mlp(tokens, is_null_B) if self.is_moe else (self.mlp(tokens), x.new_zeros(()))
        )
        return x + gate_f * output, contrast


class PublishedNetwork(nn.Module):
    """A recipe's network with each expert as a module of its own: as many parameters as ours."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        model, width, patch = config.model, config.model.hidden_size, config.model.patch_size
        self.config = config
        self.patches = nn.Conv2d(model.in_channels, width, patch, stride=patch)
        self.time = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.labels = nn.Embedding(model.num_classes + 1, width)
        self.blocks = nn.ModuleList(_Block(config, index) for index in range(model.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final = nn.Linear(width, patch * patch * model.out_channels)
        self.register_buffer("positions", sincos_positions(width, model.patch_grid))

    def forward(self, x_BZHW: Tensor, time_B: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction (B, out_channels, H, W) and the sum of the layers' contrasts."""
        model = self.config.model
        half = TIMESTEP_FREQUENCIES // 2
        angles = time_B[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.labels(
            label_B
        )
        x = self.patches(x_BZHW).flatten(2).transpose(1, 2) + self.positions
        contrasts = []
        for block in self.blocks:
            x, contrast = block(x, condition, label_B == model.num_classes)
            contrasts.append(contrast)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        patches = self.final(self.norm(x) * (1 + scale) + shift)
        grid, patch = model.patch_grid, model.patch_size
        image = patches.view(len(x), *grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(len(x), -1, *x_BZHW.shape[2:]), torch.stack(contrasts).sum()
