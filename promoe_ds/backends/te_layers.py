"""Transformer Engine's layers in place of torch's: attention, feed-forwards and experts, in bf16 or
FP8.

Parameters stay the same objects under the same names, so that checkpoints, averages and conversion
know no difference; FP8 copies of the weights live inside a matrix product alone. Router,
embeddings, modulation and the final layer stay torch's, in high precision. Rows are filled up
inside to what FP8 products ask for, and the result is cut back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from promoe_ds.backends.te_support import (
    fp8_context,
    make_recipe,
    require_transformer_engine,
    resolved_recipe,
    transformer_engine_version,
)
from promoe_ds.config import RunConfig
from promoe_ds.config.parallel import fp8_multiple
from promoe_ds.logs import get_logger
from promoe_ds.model.blocks import DiTBlock
from promoe_ds.model.dit import DiT
from promoe_ds.moe.experts import EXPERT_PARAMETERS, StackedExperts
from promoe_ds.moe.padding import pad_groups, pad_rows
from promoe_ds.private_names import check_parameters

_LOG = get_logger("precision")


def use_transformer_engine(
    network: DiT, config: RunConfig, device: torch.device
) -> Callable[[], AbstractContextManager]:
    """Replace the layers of a network on its device; return what makes the context that passes must
    run in.

    Raises: ConfigError naming what is missing, or what the device cannot do.
    """
    te = require_transformer_engine(config.precision, device)
    is_fp8 = config.precision.compute == "fp8"
    recipe = resolved_recipe(config) if is_fp8 else "current"
    for block in network.blocks:
        _replace_in_block(te, block, fp8_multiple(recipe))
        if is_fp8:
            block.checkpoint = partial(_recomputed_in_fp8, te)
            if block.is_moe:
                block.moe.checkpoint = block.checkpoint
    _LOG.info(
        "matrix products of blocks by Transformer Engine %s%s",
        transformer_engine_version(),
        f", FP8 with {recipe} scaling" if is_fp8 else "",
    )
    return fp8_context(te, make_recipe(recipe)) if is_fp8 else nullcontext


def _recomputed_in_fp8(te: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args), recomputed in the backward pass with the recipe and the scales of the
    first pass.

    Transformer Engine looks for its own layers among a module's children and, finding none,
    recomputes outside FP8: those of the routed experts lie in `GroupedKernel`, where it does not
    look. A plain function it always recomputes itself.
    """
    return te.checkpoint(lambda *values: function(*values), *args, use_reentrant=False)


def _replace_in_block(te: Any, block: DiTBlock, multiple: int) -> None:
    parents: list[nn.Module] = [block.attention]
    if block.is_moe:
        parents += [
            module for module in (block.moe.shared, block.moe.unconditional) if module is not None
        ]
        block.moe.routed.kernel = GroupedKernel(te, block.moe.routed, multiple)
        if block.moe.shared is not None:
            # The layer adds rows to its result in place, which torch refuses for a view made by
            # the library's own autograd function.
            block.moe.shared.register_forward_hook(lambda module, args, output: output.clone())
    else:
        parents.append(block.feed_forward)
    for parent in parents:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, _linear(te, layer, multiple))
            elif isinstance(layer, nn.LayerNorm):
                setattr(parent, name, _norm(te, layer))


def _linear(te: Any, layer: nn.Linear, multiple: int) -> nn.Module:
    in_features, out_features = layer.in_features, layer.out_features

    base: Any = _without_extra_state(te.Linear)

    class Linear(base):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            return (
                super()
                .forward(pad_rows(rows, multiple))[: rows.shape[0]]
                .view(*x.shape[:-1], out_features)
            )

    made = Linear(
        in_features,
        out_features,
        bias=layer.bias is not None,
        params_dtype=layer.weight.dtype,
        device="meta",
    )
    return _with_parameters(made, layer)


def _norm(te: Any, layer: nn.LayerNorm) -> nn.Module:
    made = _without_extra_state(te.LayerNorm)(
        layer.normalized_shape[0], eps=layer.eps, device="meta"
    )
    return _with_parameters(made, layer)


def _with_parameters(made: nn.Module, original: nn.Module) -> nn.Module:
    for name, parameter in original.named_parameters():
        nn.Module.register_parameter(
            made, name, parameter
        )  # Transformer Engine's own would initialise it
    return made.train(original.training)


def _without_extra_state(layer: type[nn.Module]) -> type[nn.Module]:
    """Return the class with torch's state only: histories of scales would be foreign to checkpoints
    in bf16.
    """
    return type(
        layer.__name__,
        (layer,),
        {
            "get_extra_state": nn.Module.get_extra_state,
            "set_extra_state": nn.Module.set_extra_state,
        },
    )


class GroupedKernel:
    """Computes routed experts by Transformer Engine's grouped products, on views of the stacked
    parameters.
    """

    def __init__(self, te: Any, experts: StackedExperts, multiple: int) -> None:
        """Build one grouped layer for every stacked weight, without memory."""
        self.multiple, self.expert_type = multiple, experts.expert_type
        parameters = EXPERT_PARAMETERS[experts.expert_type]
        self.layers = {}
        for name in (name for name in parameters if name.endswith("weight")):
            weight = getattr(experts, name)
            number, out_features, in_features = weight.shape
            bias = name.replace("weight", "bias")
            layer = te.GroupedLinear(
                number,
                in_features,
                out_features,
                bias=bias in parameters,
                params_dtype=weight.dtype,
                device="meta",
            )
            kinds = ("weight", "bias") if bias in parameters else ("weight",)
            check_parameters(
                layer,
                [f"{kind}{expert}" for kind in kinds for expert in range(number)],
                library="transformer_engine",
            )
            self.layers[name] = layer

    def __call__(
        self, experts: StackedExperts, rows_RD: Tensor, tokens_per_expert_e: Tensor
    ) -> Tensor:
        """Run each expert on its rows; as `StackedExperts.forward`.  Sync: one, for the counts."""
        groups = pad_groups(tokens_per_expert_e.tolist(), self.multiple, rows_RD.device)
        linear = partial(self._linear, experts, list(groups.sizes))
        rows_PD = groups.pad(rows_RD)
        if self.expert_type == "gelu":
            hidden_PF = F.gelu(linear("up_weight", rows_PD), approximate="tanh")
        else:
            hidden_PF = F.silu(linear("gate_weight", rows_PD)) * linear("up_weight", rows_PD)
        return groups.unpad(linear("down_weight", hidden_PF))

    def _linear(self, experts: StackedExperts, sizes: list[int], name: str, rows: Tensor) -> Tensor:
        values = {
            f"weight{expert}": weight
            for expert, weight in enumerate(getattr(experts, name).unbind(0))
        }
        if (bias := getattr(experts, name.replace("weight", "bias"), None)) is not None:
            values |= {f"bias{expert}": value for expert, value in enumerate(bias.unbind(0))}
        return functional_call(self.layers[name], values, (rows, sizes))
