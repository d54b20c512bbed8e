"""Every expert path gives the results and gradients of one process that holds all experts, and
moves what it says.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from promoe_ds.backends.expert_parallel import ShardedExperts, shard_experts
from promoe_ds.backends.process_group import start_distributed
from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.moe.collectives import all_reduce_sum
from promoe_ds.routing import partition_samples

from ..processes import run_ranks
from ..unit.builders import TEXT, condition_of, random_network, random_tensor
from .scenes import EXPERTS, NULL, SCENES, WIDTH, scene, whole_layer

HAS_MEGATRON = find_spec("megatron") is not None
#: Name -> what it adds to the parallel section, and to the routing section.
PATHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({"dispatch": "alltoall"}, {}),
    "capacity": ({"dispatch": "deepspeed_moe"}, {}),
    "capacity_ample": ({"dispatch": "deepspeed_moe", "capacity_factor": 4.0}, {}),
    "alltoall": ({"dispatch": "megatron"}, {}),
    "allgather": ({"dispatch": "megatron", "megatron_dispatcher": "allgather"}, {}),
    "capacity_swiglu": ({"dispatch": "deepspeed_moe"}, {"expert_type": "swiglu"}),
    "alltoall_swiglu": ({"dispatch": "megatron"}, {"expert_type": "swiglu"}),
    "alltoall_no_unconditional": ({"dispatch": "megatron"}, {"num_unconditional_experts": 0}),
}


def _config(path: str, top_k: int, ep_size: int) -> RunConfig:
    parallel, routing = PATHS[path]
    return config_from_dict(
        {
            "name": "t",
            "model": {"hidden_size": WIDTH, "depth": 2, "num_heads": 2, "num_classes": NULL},
            "routing": {"num_experts": EXPERTS, "top_k": top_k, "expert_width": 8, **routing},
            "parallel": {"ep_size": ep_size, **parallel},
            "train": {"max_steps": 1},
            "data": {"dataset": "synthetic"},
        },
        source="test",
    )


def _pass(
    layer: torch.nn.Module,
    config: RunConfig,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    weight: int,
):
    partition = partition_samples(
        ClassCondition(labels, NULL),
        has_unconditional_expert=config.routing.num_unconditional_experts > 0,
    )
    output, plan = layer(tokens.requires_grad_(), partition)
    (
        (output * torch.linspace(-1, 1, WIDTH)).sum() + weight * sum(plan.aux_losses.values())
    ).backward()
    return output.detach(), plan


class _Network:
    """A network of one layer, as the adapter sees it."""

    def __init__(self, config: RunConfig, layer: torch.nn.Module) -> None:
        self.config, self._layer = config, layer

    def moe_layers(self) -> dict[int, torch.nn.Module]:
        return {1: self._layer}


def _watch_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Watch the collectives themselves: bytes of floating-point values that leave this rank."""
    moved: list[int] = []
    exchange = dist.all_to_all_single

    def exchanged(
        output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False
    ):
        world_size, here = dist.get_world_size(group), dist.get_rank(group)
        kept = (
            input.shape[0] // world_size
            if input_split_sizes is None
            else int(input_split_sizes[here])
        )
        if input.is_floating_point() or input.dtype == torch.uint8:
            moved.append((input.shape[0] - kept) * input[:1].nbytes if input.numel() else 0)
        return exchange(
            output, input, output_split_sizes, input_split_sizes, group=group, async_op=async_op
        )

    monkeypatch.setattr(dist, "all_to_all_single", exchanged)
    if not HAS_MEGATRON:
        return moved
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings.dist_all_gather_func, mappings.dist_reduce_scatter_func

    def gathered(output, input, group=None):
        if input.is_floating_point():
            moved.append(input.nbytes * (dist.get_world_size(group) - 1))
        return gather(output, input, group=group)

    def scattered(output, input, group=None):
        moved.append(input.nbytes - output.nbytes)
        return scatter(output, input, group=group)

    monkeypatch.setattr(mappings, "dist_all_gather_func", gathered)
    monkeypatch.setattr(mappings, "dist_reduce_scatter_func", scattered)
    return moved


def _run_rank(folder: Path) -> None:
    ranks = start_distributed(timeout_seconds=60)
    rank, world_size = ranks.rank, ranks.world_size
    results, moved = {}, _watch_bytes(pytest.MonkeyPatch())
    for path, name, top_k in _cases(world_size):
        config = _config(path, top_k, world_size)
        layer = whole_layer(config, name)
        full, share = layer.routed, EXPERTS // world_size
        shard_experts(_Network(config, layer), dist.group.WORLD, ranks.device)
        assert isinstance(layer.routed, ShardedExperts)
        layer.routed.to_empty(device="cpu").mark_parameters()
        for weight, parameter in layer.routed.named_parameters():
            parameter.data.copy_(getattr(full, weight).data[rank * share : (rank + 1) * share])
        layer.router.reduce_sum = all_reduce_sum(None)
        tokens, labels = scene(name, rank)
        moved.clear()
        output, plan = _pass(layer, config, tokens, labels, 1)
        counts_E = plan.assignment.tokens_per_expert_E
        results[path, name, top_k] = {
            "output": output,
            "tokens": tokens.grad,
            "gradients": {name: p.grad for name, p in layer.named_parameters()},
            "moved": sum(moved),
            "claimed": int(layer.dispatcher.bytes_exchanged(plan.assignment, WIDTH, 4)),
            "rows_leaving": int(counts_E.sum() - counts_E[rank * share : (rank + 1) * share].sum()),
        }
    results["text"] = _text_passes(rank, world_size, moved)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _text_passes(rank: int, world_size: int, moved: list[int]) -> dict[str, Any]:
    """Train on texts, and guide; return which samples are null, how many rows of each have an
    expert elsewhere, and the bytes that left.
    """
    sections = {**TEXT, "routing": {"num_experts": EXPERTS, "top_k": 2}}
    parallel = {"ep_size": world_size, "dispatch": "alltoall"}
    network = random_network(**sections, parallel=parallel)
    shard_experts(network, dist.group.WORLD, torch.device("cpu"))
    for layer in network.moe_layers().values():
        layer.routed.to_empty(device="cpu").mark_parameters()
        for weight in layer.routed.parameters():
            torch.nn.init.normal_(weight)
    labels = torch.tensor([[3, NULL, 0, 7], [NULL, NULL, NULL, 2]][rank % 2])
    condition = condition_of(network.config, labels)
    found = {}
    guide = network.prepare(condition.cat([condition.null_like()]))
    for name, each in {"train": condition, "guide": guide}.items():
        moved.clear()
        latents = random_tensor(len(each), 1, 4, 4, seed=rank)
        with torch.set_grad_enabled(name == "train"):
            output = network.denoise(latents, torch.linspace(0, 1000, len(each)), each)
            if name == "train":
                output.prediction_BZHW.sum().backward()
        leaving_B = torch.zeros(len(each), dtype=torch.int64)
        for plan in output.plans.values():
            experts_N = torch.arange(EXPERTS).repeat_interleave(plan.assignment.tokens_per_expert_E)
            is_elsewhere_N = experts_N // (EXPERTS // world_size) != rank
            leaving_N = plan.assignment.token_ids_N[is_elsewhere_N]
            samples_N = leaving_N // network.config.model.tokens_per_image
            leaving_B += torch.bincount(samples_N, minlength=len(each))
        found[name] = each.is_null_B, leaving_B, sum(moved)
    return found


def _cases(world_size: int) -> list[tuple[str, str, int]]:
    names = SCENES if world_size == 2 else SCENES[::3]
    return [
        (path, name, top_k)
        for path, (parallel, _) in PATHS.items()
        if HAS_MEGATRON or parallel["dispatch"] != "megatron"
        for name in names
        for top_k in (1, 3)
        if top_k == 1 or name == "usual"
    ]


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp(f"paths{request.param}")
    run_ranks(request.param, _run_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def test_path_any_equals_one_process(ranks, subtests) -> None:
    world_size, close = len(ranks), {"rtol": 1e-5, "atol": 1e-5}
    for case in _cases(world_size):
        path, name, top_k = case
        with subtests.test(f"{path}-{name}-{top_k}"):
            config = _config(path, top_k, world_size)
            whole = whole_layer(config, name)
            parts = [scene(name, rank) for rank in range(world_size)]
            tokens = torch.cat([part[0] for part in parts])
            output, _ = _pass(
                whole, config, tokens, torch.cat([part[1] for part in parts]), world_size
            )
            found = [rank[case] for rank in ranks]
            torch.testing.assert_close(torch.cat([one["output"] for one in found]), output, **close)
            torch.testing.assert_close(
                torch.cat([one["tokens"] for one in found]), tokens.grad, **close
            )
            for weight, parameter in whole.named_parameters():
                pieces = [one["gradients"][weight] for one in found]
                gradient = torch.cat(pieces) if weight.startswith("routed.") else sum(pieces)
                torch.testing.assert_close(
                    gradient,
                    parameter.grad,
                    rtol=1e-4,
                    atol=1e-4,
                    msg=lambda t, n=weight: f"{n}: {t}",
                )


def test_path_moves_the_bytes_it_says(ranks, subtests) -> None:
    """deepspeed: exactly the rows whose expert lives elsewhere; Megatron's all-to-all: those and
    their gates.
    """
    for case in _cases(len(ranks)):
        with subtests.test("-".join(map(str, case))):
            moved, claimed, rows = (
                sum(rank[case][name] for rank in ranks)
                for name in ("moved", "claimed", "rows_leaving")
            )
            ideal = 4 * 4 * WIDTH * rows  # four crossings of WIDTH fp32 numbers
            assert moved == claimed
            if case[0] == "exact":
                assert moved == ideal
            elif case[0].startswith("alltoall"):
                assert moved == ideal + 2 * 4 * rows
            else:
                assert moved >= ideal


def test_text_exchange_carries_rows_of_texts_alone_and_no_byte_more(ranks) -> None:
    """Samples of the empty text stay, in training and in guidance's halves."""
    for name, crossings in (("train", 4), ("guide", 2)):
        nulls, leaving, moved = zip(*(rank["text"][name] for rank in ranks), strict=True)
        leaving_B = torch.cat(leaving)
        assert not leaving_B[torch.cat(nulls)].any() and leaving_B.any() == (len(ranks) > 1)
        assert sum(moved) == int(leaving_B.sum()) * crossings * 16 * 4  # rows of width 16 in fp32
