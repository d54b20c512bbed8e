"""The exchange equals the local dispatcher in results and gradients, also with empty experts and
idle ranks.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe import AllToAllDispatcher, StackedExperts
from promoe_ds.routing import ClassificationRouter, KMeansRouter, partition_samples
from promoe_ds.training.clipping import global_grad_norm

from ..processes import run_ranks
from .scenes import EXPERTS, WIDTH, scene


def _config(method: str) -> RunConfig:
    return config_from_dict(
        {
            "name": "t",
            "model": {"hidden_size": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 10},
            "routing": {
                "num_experts": EXPERTS,
                "top_k": 1,
                "expert_width": 8,
                "method": method,
                **METHODS[method],
            },
            "train": {"max_steps": 1},
            "data": {"dataset": "synthetic"},
        },
        source="test",
    )


def _join() -> tuple[int, int]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return dist.get_rank(), dist.get_world_size()


#: Every method with what its routing section adds; the contrastive losses stay on each rank, as
# pools do by nature.
METHODS = {
    "token_choice": {"rcl_scope": "rank"},
    "expert_choice": {"rcl_scope": "rank"},
    "dit_moe": {"balance_weight": 0.01},
    "ec_dit": {},
    "diff_moe": {},
    "expert_race": {},
    "kmeans": {},
    "hash": {"top_k": 2},
    "classification": {"superclass_map": "digits"},
    "swiglu": {"method": "token_choice", "expert_type": "swiglu", "rcl_scope": "rank", "top_k": 2},
    "no_conditional_routing": {"method": "diff_moe", "num_unconditional_experts": 0, "top_k": 2},
}


def _method_layer(method: str) -> torch.nn.Module:
    torch.manual_seed(7)
    layer = build_moe_layer(_config(method))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if isinstance(layer.router, KMeansRouter):
        torch.nn.init.normal_(layer.router.centroids)
    if isinstance(layer.router, ClassificationRouter):
        layer.router.set_superclasses([label % EXPERTS for label in range(10)])
    return layer


def _method_pass(layer: torch.nn.Module, rank: int, *, train: bool) -> dict[str, torch.Tensor]:
    tokens, labels = scene("usual", rank)
    partition = partition_samples(
        ClassCondition(labels, 10), has_unconditional_expert=layer.unconditional is not None
    )
    layer.train(train)
    output, plan = layer(tokens.requires_grad_(), partition)
    own = [] if plan.target_patches_BSP is None else [plan.target_patches_BSP.square().mean()]
    (
        (output * torch.linspace(-1, 1, WIDTH)).sum() + sum([*plan.aux_losses.values(), *own])
    ).backward()
    return {"output": output.detach(), "tokens": tokens.grad, "observation": plan.observation}


def _methods_rank(folder: Path) -> None:
    rank, world_size = _join()
    results, share = {}, EXPERTS // world_size
    for method in METHODS:
        layer = _method_layer(method)
        full = layer.routed
        local = StackedExperts(EXPERTS, WIDTH, 8, expert_type=full.expert_type)
        local.keep(rank * share, share)
        for name, parameter in local.named_parameters():
            parameter.data.copy_(getattr(full, name).data[rank * share : (rank + 1) * share])
        layer.routed, layer.dispatcher = local, AllToAllDispatcher(dist.group.WORLD)
        results[method] = {"eval": _method_pass(layer, rank, train=False)}
        layer.zero_grad()
        results[method] |= {
            "train": _method_pass(layer, rank, train=True),
            "gradients": {name: p.grad for name, p in layer.named_parameters()},
        }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_dispatch_every_method_equals_local(tmp_path: Path, world_size: int, subtests) -> None:
    """Experts spread over the ranks give each rank what it would get with all of them, in training
    and evaluation.
    """
    run_ranks(world_size, _methods_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    close = {"rtol": 1e-5, "atol": 1e-5}
    for method in METHODS:
        with subtests.test(method):
            layer = _method_layer(method)
            for mode in ("eval", "train"):
                layer.zero_grad()
                for rank in range(world_size):
                    torch.testing.assert_close(
                        ranks[rank][method][mode],
                        _method_pass(layer, rank, train=mode == "train"),
                        **close,
                    )
            for name, parameter in layer.named_parameters():
                parts = [r[method]["gradients"][name] for r in ranks]
                found = torch.cat(parts) if name.startswith("routed.") else sum(parts)
                torch.testing.assert_close(
                    found, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
                )


def _norm_rank(folder: Path) -> None:
    rank, _ = _join()
    dense, expert = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(1))
    dense.grad = torch.full((4,), 2.0)
    expert.grad = torch.tensor([2.0 if rank == 0 else 10.0])
    expert.allreduce = False
    norm = global_grad_norm([dense, expert], dist.group.WORLD)
    torch.save(norm, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_grad_norm_two_expert_ranks_is_that_of_all_parameters(tmp_path: Path) -> None:
    """16 dense, 4 and 100 of the experts: sqrt(120) = 10.954; averaging the ranks' norms gives 7.6
    (DeepSpeed#8475).
    """
    run_ranks(2, _norm_rank, tmp_path)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True).item() == pytest.approx(
            120**0.5
        )
