"""Transformer blocks with adaptive layer norm (adaLN-Zero), dense or with experts.

Letters: B images, S tokens per image, D width, A heads, G head width; L tokens of a text, C width
of its states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.kernels import block_ops, head_ops
from promoe_ds.kernels.choice import uses_triton
from promoe_ds.model.rotary import rotated
from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.recompute import Recompute, recomputed
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.partition import Partition

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """torch's, in the dtype of its weights: fused, where autocast would mix two."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return super().forward(x if self.weight is None else x.to(self.weight.dtype))


Norm = nn.LayerNorm | RMSNorm


def modulate(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift, per image."""
    return x_BSD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def modulated_norm(
    norm: Norm, x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, kernels: str
) -> tuple[Tensor, Tensor]:
    """Return x for further use, and norm(x) * (1 + scale) + shift, per image; `kernels` as
    `kernels.choice` says.
    """
    if uses_triton(x_BSD, kernels):
        return block_ops.modulated_norm(x_BSD, shift_BD, scale_BD, NORM_EPS, _centres(norm))
    return x_BSD, modulate(norm(x_BSD), shift_BD, scale_BD)


def residual_norm(
    norm: Norm,
    x_BSD: Tensor,
    gate_BD: Tensor,
    y_BSD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """Return x + gate * y, and its modulated norm, per image; `kernels` as `kernels.choice`
    says.
    """
    if uses_triton(x_BSD, kernels):
        return block_ops.residual_norm(
            x_BSD, gate_BD, y_BSD, shift_BD, scale_BD, NORM_EPS, _centres(norm)
        )
    x_BSD = gated_residual(x_BSD, gate_BD, y_BSD, kernels)
    return modulated_norm(norm, x_BSD, shift_BD, scale_BD, kernels)


def gated_residual(x_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor, kernels: str) -> Tensor:
    """Return x + gate * y, per image; `kernels` as `kernels.choice` says."""
    if uses_triton(x_BSD, kernels):
        return block_ops.gated_residual(x_BSD, gate_BD, y_BSD)
    return x_BSD + gate_BD[:, None] * y_BSD


def _centres(norm: Norm) -> bool:
    return isinstance(norm, nn.LayerNorm)


class _SplitHeads(torch.autograd.Function):
    """Queries, keys and values (B, A, S, G), or the latter two, as views of one product
    (B, S, 3 or 2, A, G), whose gradient is written where they came from: no stack of them that is
    then laid out anew.
    """

    @staticmethod
    def forward(ctx: Any, parts_BSnAG: Tensor) -> tuple[Tensor, ...]:
        return parts_BSnAG.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads_BASG: Tensor) -> Tensor:
        batch, heads, tokens, width = grads_BASG[0].shape
        grad = grads_BASG[0].new_empty(batch, tokens, len(grads_BASG), heads, width)
        for part, grad_BASG in zip(grad.unbind(2), grads_BASG, strict=True):
            part.copy_(grad_BASG.transpose(1, 2))
        return grad


class Texts(NamedTuple):
    """The texts of B images as a block's attention reads them."""

    #: Which of the S image tokens and the L text tokens behind them are keys.
    is_key_B11K: Tensor
    #: Fp32 or the network's dtype; not read where keys and values are there.
    states_BLC: Tensor
    #: What this block's attention made of the states before, each (B, A, L, G).
    keys_values: tuple[Tensor, Tensor] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Texts:
        """Return the texts with a function applied to each tensor, whose first dimension is B."""
        made = self.keys_values and (function(self.keys_values[0]), function(self.keys_values[1]))
        return Texts(function(self.is_key_B11K), function(self.states_BLC), made)


class SelfAttention(nn.Module):
    """Multi-head attention of the tokens of one image to each other and, under text, to its text.

    Text tokens are keys and values alone: they ask for nothing and end here.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool,
        head_width: int | None = None,
        text_width: int | None = None,
        norm: type[Norm] = nn.LayerNorm,
    ) -> None:
        """Build uninitialised.

        Args:
            norm: of queries and keys; a text's keys have it with and without `qk_norm`.
        """
        super().__init__()
        head_width = head_width or width // num_heads
        self.num_heads, inner = num_heads, num_heads * head_width
        self.qkv = nn.Linear(width, 3 * inner)
        self.proj = nn.Linear(inner, width)
        #: Of what follows the product with `qkv`; set from outside.
        self.kernels = "eager"
        self.q_norm = norm(head_width, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = norm(head_width, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        if text_width is not None:
            self.text_kv = nn.Linear(text_width, 2 * inner)
            # Always: encoders' states have scales of their own.
            self.text_k_norm = norm(head_width, eps=QK_NORM_EPS)

    def text_keys_values(self, states_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of texts, each (B, A, L, G)."""
        batch, length, _ = states_BLC.shape
        kv_BL2AG = self.text_kv(states_BLC).view(batch, length, 2, self.num_heads, -1)
        k_BALG, v_BALG = _SplitHeads.apply(kv_BL2AG)
        return self.text_k_norm(k_BALG), v_BALG

    def forward(
        self, x_BSD: Tensor, texts: Texts | None = None, turns_SG: Tensor | None = None
    ) -> Tensor:
        """Map (B, S, D) to (B, S, D).

        Args:
            turns_SG: `rotations` of the image tokens; a text's keys are at no place.
        """
        batch, tokens, _ = x_BSD.shape
        if type(self.qkv) is nn.Linear and uses_triton(x_BSD, self.kernels):
            qkv_BSW = F.linear(x_BSD, self.qkv.weight, self.qkv.bias.detach())
            q_BASG, k_BAKG, v_BAKG = head_ops.split_heads(
                qkv_BSW.unflatten(-1, (3, self.num_heads, -1)), self.qkv.bias
            )
        else:
            qkv_BS3AG = self.qkv(x_BSD).view(batch, tokens, 3, self.num_heads, -1)
            q_BASG, k_BAKG, v_BAKG = _SplitHeads.apply(qkv_BS3AG)
        q_BASG, k_BAKG = self.q_norm(q_BASG), self.k_norm(k_BAKG)
        if turns_SG is not None:
            q_BASG, k_BAKG = rotated(q_BASG, turns_SG), rotated(k_BAKG, turns_SG)
        is_key_B11K = None
        if texts is not None:
            is_key_B11K = texts.is_key_B11K
            text_k, text_v = texts.keys_values or self.text_keys_values(texts.states_BLC)
            k_BAKG = torch.cat([k_BAKG, text_k], dim=2)
            v_BAKG = torch.cat([v_BAKG, text_v], dim=2)
        mixed = F.scaled_dot_product_attention(q_BASG, k_BAKG, v_BAKG, attn_mask=is_key_B11K)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class DiTBlock(nn.Module):
    """Attention and a feed-forward (dense or experts), both under adaLN-Zero."""

    def __init__(
        self,
        width: int,
        attention: SelfAttention,
        feed_forward: nn.Module,
        norm: type[Norm] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(width, elementwise_affine=False, eps=NORM_EPS)
        self.attention = attention
        self.feed_forward_norm = norm(width, elementwise_affine=False, eps=NORM_EPS)
        self.modulation = nn.Linear(width, 6 * width)
        self.is_moe = isinstance(feed_forward, MoELayer)
        if isinstance(feed_forward, MoELayer):
            self.moe = feed_forward
        else:
            self.feed_forward = feed_forward
        #: Of norms, modulation and residual lines; set from outside.
        self.kernels = "eager"
        self.recompute = self.recompute_hidden = False
        self.checkpoint: Recompute = recomputed

    def forward(
        self,
        x_BSD: Tensor,
        condition_BD: Tensor,
        partition: Partition,
        texts: Texts | None = None,
        turns_SG: Tensor | None = None,
    ) -> tuple[Tensor, RoutingPlan | None]:
        """Map (B, S, D) to (B, S, D) and return the layer's routing plan, None for a dense block.

        With `recompute` the two halves are recomputed in the backward pass. Routing is between
        them and is not: its decision, losses and statistics exist once. With `recompute_hidden` a
        dense feed-forward is recomputed alone.
        """
        x_BSD, tokens_BSD, gate_BD = self._run(self._attend, x_BSD, condition_BD, texts, turns_SG)
        if not self.is_moe:
            return self._run(self._apply_dense, x_BSD, tokens_BSD, gate_BD), None
        plan = self.moe.route(tokens_BSD, partition)
        x_BSD = self._run(self._apply_experts, x_BSD, tokens_BSD, gate_BD, partition, plan)
        # Whoever keeps the plan for the log need not keep the tokens.
        return x_BSD, replace(plan, tokens_BSD=None)

    def compile_dense(self, backend: str = "inductor") -> None:
        """Compile attention and the feed-forwards that every rank runs whole; routing, exchange and
        routed experts stay eager.

        The rows of an unconditional expert change from batch to batch: its shapes are dynamic.
        """
        object.__setattr__(self, "_attend", torch.compile(self._attend, backend=backend))
        if not self.is_moe:
            self.feed_forward.compile(backend=backend)
            return
        if self.moe.shared is not None:
            self.moe.shared.compile(backend=backend)
        if self.moe.unconditional is not None:
            self.moe.unconditional.compile(backend=backend, dynamic=True)

    def _attend(
        self, x_BSD: Tensor, condition_BD: Tensor, texts: Texts | None, turns_SG: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(
            F.silu(condition_BD)
        ).chunk(6, dim=-1)
        x_BSD, tokens_BSD = modulated_norm(
            self.attention_norm, x_BSD, shift_a, scale_a, self.kernels
        )
        x_BSD, tokens_BSD = residual_norm(
            self.feed_forward_norm,
            x_BSD,
            gate_a,
            self.attention(tokens_BSD, texts, turns_SG),
            shift_f,
            scale_f,
            self.kernels,
        )
        return x_BSD, tokens_BSD, gate_f

    def _apply_dense(self, x_BSD: Tensor, tokens_BSD: Tensor, gate_BD: Tensor) -> Tensor:
        hidden = self.recompute_hidden and self.training
        output_BSD = (
            self.checkpoint(self.feed_forward, tokens_BSD)
            if hidden
            else self.feed_forward(tokens_BSD)
        )
        return gated_residual(x_BSD, gate_BD, output_BSD, self.kernels)

    def _apply_experts(
        self,
        x_BSD: Tensor,
        tokens_BSD: Tensor,
        gate_BD: Tensor,
        partition: Partition,
        plan: RoutingPlan,
    ) -> Tensor:
        output_BSD = self.moe.apply_experts(tokens_BSD, partition, plan)
        return gated_residual(x_BSD, gate_BD, output_BSD, self.kernels)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.recompute and self.training:
            return self.checkpoint(function, *args)
        return function(*args)


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to patches."""

    def __init__(
        self, width: int, patch_size: int, out_channels: int, norm: type[Norm] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.norm = norm(width, elementwise_affine=False, eps=NORM_EPS)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.kernels = "eager"  # as a block's

    def forward(self, x_BSD: Tensor, condition_BD: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, patch * patch * channels)."""
        shift, scale = self.modulation(F.silu(condition_BD)).chunk(2, dim=-1)
        _, tokens_BSD = modulated_norm(self.norm, x_BSD, shift, scale, self.kernels)
        return self.linear(tokens_BSD)
