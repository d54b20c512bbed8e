"""The exchange equals the local dispatcher in results and gradients, also with empty experts and
idle ranks.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe import AllToAllDispatcher, StackedExperts
from promoe_ds.moe.collectives import all_reduce_sum
from promoe_ds.routing import ClassificationRouter, KMeansRouter, partition_samples
from promoe_ds.train.clipping import global_grad_norm

from ..processes import run_ranks
from .scenes import EXPERTS, SCENES, WIDTH, scene, whole_layer


def _config(top_k: int) -> RunConfig:
    return config_from_dict(
        {
            "name": "t",
            "model": {"hidden_size": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 10},
            "routing": {"num_experts": EXPERTS, "top_k": top_k, "expert_width": 8},
            "train": {"max_steps": 1},
            "data": {"dataset": "synthetic"},
        },
        source="test",
    )


def _count_rows_moved(rank: int) -> list[int]:
    """Watch the collective itself: every later exchange adds the rows that it sends to other
    ranks.
    """
    moved, exchange = [], dist.all_to_all_single

    def watched(output, rows, sizes_in=None, sizes_out=None, **options):
        if sizes_out is not None:
            moved.append(sum(sizes_out) - sizes_out[rank])
        return exchange(output, rows, sizes_in, sizes_out, **options)

    dist.all_to_all_single = watched
    return moved


def _reference(
    world_size: int, name: str, top_k: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """One process, all samples: gradients of the sum of the ranks' objectives, outputs and token
    gradients.
    """
    layer = whole_layer(_config(top_k), name)
    parts = [scene(name, rank) for rank in range(world_size)]
    tokens = torch.cat([part[0] for part in parts]).requires_grad_()
    output, plan = layer(
        tokens, partition_samples(ClassCondition(torch.cat([part[1] for part in parts]), 10))
    )
    # Every rank adds the same global auxiliary loss to its own objective.
    loss = (output * torch.linspace(-1, 1, WIDTH)).sum() + world_size * sum(
        plan.aux_losses.values()
    )
    loss.backward()
    return {name: p.grad for name, p in layer.named_parameters()}, output.detach(), tokens.grad


def _join() -> tuple[int, int]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return dist.get_rank(), dist.get_world_size()


def _run_rank(folder: Path, cases: list[tuple[str, int]]) -> None:
    rank, world_size = _join()
    moved = _count_rows_moved(rank)
    torch.save(
        {case: _run_case(rank, world_size, moved, *case) for case in cases}, folder / f"{rank}.pt"
    )
    dist.destroy_process_group()


def _run_case(
    rank: int, world_size: int, moved: list[int], name: str, top_k: int
) -> dict[str, Any]:
    layer, share = whole_layer(_config(top_k), name), EXPERTS // world_size
    full = layer.routed
    local = StackedExperts(share, WIDTH, 8, first_expert=rank * share)
    for weight, parameter in local.named_parameters():
        parameter.data.copy_(getattr(full, weight).data[rank * share : (rank + 1) * share])
    layer.routed, layer.dispatcher = local, AllToAllDispatcher(dist.group.WORLD)
    layer.router.reduce_sum = all_reduce_sum(None)
    tokens, labels = scene(name, rank)
    moved.clear()
    output, plan = layer(tokens.requires_grad_(), partition_samples(ClassCondition(labels, 10)))
    ((output * torch.linspace(-1, 1, WIDTH)).sum() + sum(plan.aux_losses.values())).backward()
    leaving = layer.dispatcher.rows_leaving(plan.assignment)
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {
        "gradients": gradients,
        "output": output.detach(),
        "tokens": tokens.grad,
        "leaving": leaving,
        "moved": [*moved],
    }


#: Three choices on four ranks with the usual scene alone: the others are covered with two ranks.
CASES = {
    2: [(name, top_k) for name in SCENES for top_k in (1, 3)],
    4: [*((name, 1) for name in SCENES), ("usual", 3)],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, int], list[dict]]:
    """Run all cases on two and on four ranks; return what each rank found."""
    results = {}
    for world_size, cases in CASES.items():
        folder = tmp_path_factory.mktemp("dispatch")
        run_ranks(world_size, _run_rank, folder, cases)
        ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
        results |= {(world_size, *case): [rank[case] for rank in ranks] for case in cases}
    return results


@pytest.mark.parametrize(
    ("world_size", "name", "top_k"),
    [(size, *case) for size, cases in CASES.items() for case in cases],
)
def test_dispatch_several_ranks_equals_local(found, world_size: int, name: str, top_k: int) -> None:
    gradients, output, token_gradients = _reference(world_size, name, top_k)
    ranks = found[world_size, name, top_k]
    # Out and back, forward and backward: exactly the rows whose expert lives elsewhere, each time.
    assert [len(r["moved"]) for r in ranks] == [4] * world_size
    assert sum(sum(r["moved"]) for r in ranks) == 4 * sum(r["leaving"].item() for r in ranks)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([r["output"] for r in ranks]), output, **close)
    torch.testing.assert_close(torch.cat([r["tokens"] for r in ranks]), token_gradients, **close)
    for name, expected in gradients.items():
        parts = [r["gradients"][name] for r in ranks]
        gradient = torch.cat(parts) if name.startswith("routed.") else sum(parts)
        torch.testing.assert_close(
            gradient, expected, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


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
    config = _config(1).model_dump(mode="json")
    config["routing"] |= {"method": method, **METHODS[method]}
    torch.manual_seed(7)
    layer = build_moe_layer(config_from_dict(config, source="test"))
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
        local = StackedExperts(
            share, WIDTH, 8, expert_type=full.expert_type, first_expert=rank * share
        )
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
