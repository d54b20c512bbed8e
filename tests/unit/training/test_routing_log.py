"""The lines of routing.jsonl: counts and gates of every method by noise level, and the summary of
an expert load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch.nn.functional import cosine_similarity

from promoe_ds.distributed.context import DistributedContext
from promoe_ds.model import DiT
from promoe_ds.moe.collectives import WaitClock
from promoe_ds.reports.log import load_log
from promoe_ds.routing import RoutingPlan
from promoe_ds.routing.assignment import sum_by_product, sum_tokens_by_expert
from promoe_ds.training.metrics import append_lines
from promoe_ds.training.router_state import give_superclasses
from promoe_ds.training.routing_log import RoutingAccumulator
from promoe_ds.training.trackers import flatten
from tests.unit.ranks import ONE_RANK, call_together, pretend_one_rank

from ..builders import METHODS, of_method, random_network, random_tensor

NULL, BINS = 10, 2
#: Noise levels and labels of a batch: the last image is all noise and belongs to the upper of two
# bins.
SIGMA, LABELS = [0.1, 0.49, 0.5, 0.7, 1.0], [3, NULL, 0, NULL, 7]
SCHEMA = json.loads((Path(__file__).parents[3] / "docs/reference/routing.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

Passes = list[dict[int, RoutingPlan]]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_one_rank(monkeypatch)


def one_of(ranks: int, rank: int) -> DistributedContext:
    return DistributedContext(rank=rank, world_size=ranks, device=torch.device("cpu"))


def make_network(method: str, **sections: Any) -> DiT:
    logging = {"timestep_bins": BINS, **sections.pop("logging", {})}
    model = {"depth": 4, **sections.pop("model", {})}
    network = random_network(
        model=model, logging=logging, **{**of_method(method), **sections}
    ).train()
    give_superclasses(network, network.config)
    return network


def run(
    network: DiT, seed: int = 0, labels: list[int] = LABELS, size: tuple[int, int] = (4, 4)
) -> dict[int, RoutingPlan]:
    latents = random_tensor(len(labels), 1, *size, seed=seed)
    with torch.no_grad():
        return network.denoise(latents, torch.tensor(SIGMA) * 1000, torch.tensor(labels)).plans


def accumulate(
    network: DiT, passes: int = 2, labels: list[int] = LABELS
) -> tuple[RoutingAccumulator, Passes]:
    accumulator = RoutingAccumulator(network.config, network, ONE_RANK)
    plans = [run(network, seed, labels) for seed in range(passes)]
    for each in plans:
        accumulator.add(each, torch.tensor(SIGMA), torch.tensor(labels))
    return accumulator, plans


def rows_of(passes: Passes, layer: int) -> Iterator[tuple[int, int, float]]:
    """Yield token, expert and gate of every row of a layer's assignments."""
    for plans in passes:
        assignment = plans[layer].assignment
        experts = torch.repeat_interleave(torch.arange(4), assignment.tokens_per_expert_E)
        columns = (assignment.token_ids_N, experts, assignment.gates_N)
        yield from zip(*(column.tolist() for column in columns), strict=True)


def assert_counts(lines: list[dict[str, Any]], passes: Passes) -> None:
    """Compare the counts of lines with the plans' own lists."""
    for line in lines:
        of_bin = [image for image in range(5) if (SIGMA[image] >= 0.5) == line["timestep_bin"]]
        rows = [row for row in rows_of(passes, line["layer"]) if row[0] // 4 in of_bin]
        tokens, gates = [0] * 4, [gate for _, _, gate in rows]
        for _, expert, _ in rows:
            tokens[expert] += 1
        null = sum(LABELS[image] == NULL for image in of_bin)
        assert line["tokens_per_expert"] == tokens
        assert line["conditional_tokens"] == 4 * (len(of_bin) - null) * len(passes)
        assert line["unconditional_tokens"] == 4 * null * len(passes)
        assert line["gate_mean"] == pytest.approx(sum(gates) / len(gates), rel=1e-5)
        cosines = [plans[line["layer"]].stats.prototype_similarity.item() for plans in passes]
        assert line["prototype_similarity"] == pytest.approx(
            sum(cosines) / len(cosines), rel=1e-5, abs=1e-7
        )


@pytest.mark.parametrize("method", METHODS)
def test_lines_equal_the_plans_own_lists_and_keep_to_the_schema(method: str) -> None:
    accumulator, passes = accumulate(make_network(method))
    lines = accumulator.reduce(step=20, steps=10)
    places = [(line["layer"], line["timestep_bin"]) for line in lines]
    assert places == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert_counts(lines, passes)
    for line in json.loads(json.dumps(lines)):
        VALIDATOR.validate(line)
        assert (line["step"], line["steps"], line["layer_bytes_exchanged"]) == (20, 10, 0)
        assert line.keys() | {"layer_detail"} == SCHEMA["$defs"]["Line"]["properties"].keys()
        details = SCHEMA["$defs"]["LayerDetail"]["properties"].keys()
        assert line.get("layer_detail", {}).keys() <= details
        del line["tokens_per_expert"]
        assert not VALIDATOR.is_valid(line)


@pytest.mark.parametrize("method", METHODS)
def test_lines_gates_and_tables_equal_the_plans_own_lists(method: str) -> None:
    accumulator, passes = accumulate(make_network(method))
    lines = accumulator.reduce(step=20, steps=10)
    for layer in (1, 3):
        here = [line for line in lines if line["layer"] == layer]
        gates, by_class, by_patch = torch.zeros(4), torch.zeros(NULL + 1, 4), torch.zeros(4, 4)
        for token, expert, gate in rows_of(passes, layer):
            gates[expert] += gate
            by_class[LABELS[token // 4], expert] += 1
            by_patch[token % 4, expert] += 1
        found = torch.tensor([line["gate_sum_per_expert"] for line in here]).sum(dim=0)
        torch.testing.assert_close(found, gates, rtol=1e-4, atol=1e-5)
        detail = here[0]["layer_detail"]
        assert detail["tokens_per_class"] == {"steps": 10, "counts": by_class.long().tolist()}
        assert detail["tokens_per_position"] == {"steps": 10, "counts": by_patch.long().tolist()}
        assert "layer_detail" not in here[1]


def test_lines_of_several_sizes_count_all_tokens_and_the_patches_of_the_largest() -> None:
    network = make_network("token_choice", model={"input_size": [4, 8], "buckets": [[4, 8], 4]})
    accumulator = RoutingAccumulator(network.config, network, ONE_RANK)
    passes = {size: run(network, size=size) for size in ((4, 8), (4, 4))}
    for size, plans in passes.items():
        accumulator.add(plans, torch.tensor(SIGMA), torch.tensor(LABELS), size)
    lines = accumulator.reduce(step=20, steps=10)
    routed, null = sum(label != NULL for label in LABELS), LABELS.count(NULL)
    for layer in (1, 3):
        here = [line for line in lines if line["layer"] == layer]
        VALIDATOR.validate(json.loads(json.dumps(here[0])))
        assert sum(line["conditional_tokens"] for line in here) == (8 + 4) * routed
        assert sum(line["unconditional_tokens"] for line in here) == (8 + 4) * null
        table, by_patch = here[0]["layer_detail"]["tokens_per_position"], torch.zeros(8, 4)
        for token, expert, _ in rows_of([passes[4, 8]], layer):
            by_patch[token % 8, expert] += 1
        assert table == {"steps": 10, "counts": by_patch.long().tolist(), "columns": 4}


def test_lines_without_assignments_have_no_gate_mean() -> None:
    accumulator, _ = accumulate(make_network("token_choice"), passes=1, labels=[NULL] * 5)
    lines = accumulator.reduce(step=1, steps=1)
    assert [line["gate_mean"] for line in lines] == [None] * 4
    assert [line["unconditional_tokens"] for line in lines] == [8, 12] * 2


def test_lines_start_anew_after_each_reduction() -> None:
    network = make_network("expert_race")
    accumulator, passes = accumulate(network, passes=1)
    first = accumulator.reduce(step=1, steps=1)
    accumulator.add(passes[0], torch.tensor(SIGMA), torch.tensor(LABELS))
    assert accumulator.reduce(step=1, steps=1) == first
    assert accumulator.reduce(step=2, steps=0) == []


def test_lines_of_two_ranks_are_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network("diff_moe")
    accumulators = [RoutingAccumulator(network.config, network, one_of(2, rank)) for rank in (0, 1)]
    passes = [run(network, seed) for seed in (0, 1)]
    for accumulator, plans in zip(accumulators, passes, strict=True):
        accumulator.add(plans, torch.tensor(SIGMA))
    first, second = call_together(monkeypatch, accumulators, "reduce", step=1, steps=1)
    assert len(first) == 2 * BINS and second == []  # rank 0 alone describes and writes
    assert_counts(first, passes)


def test_lines_of_a_dense_network_are_none() -> None:
    network = random_network(routing={"method": "dense"})
    accumulator = RoutingAccumulator(network.config, network, ONE_RANK)
    accumulator.add({}, torch.tensor(SIGMA))
    assert accumulator.reduce(step=1, steps=1) == []


def test_lines_tables_cover_several_intervals_and_what_is_left_at_the_end() -> None:
    network = make_network("token_choice", logging={"counts_every": 2})
    accumulator, passes = accumulate(network, passes=1)
    found = []
    for interval in range(4):
        if interval:
            accumulator.add(passes[0], torch.tensor(SIGMA), torch.tensor(LABELS))
        lines = accumulator.reduce(step=10 * (interval + 1), steps=10, last=interval == 2)
        found.append(lines[0]["layer_detail"].get("tokens_per_class"))
    once = torch.tensor(found[2]["counts"])
    assert [None if table is None else table["steps"] for table in found] == [None, 20, 10, None]
    assert (torch.tensor(found[1]["counts"]) == 2 * once).all() and once.sum() == 3 * 4 * 2


def test_lines_prototypes_are_compared_with_the_centroids_of_their_tokens() -> None:
    network = make_network("token_choice")
    entered: list[torch.Tensor] = []
    router = network.moe_layers()[1].router
    router.register_forward_pre_hook(lambda _, given: entered.append(given[0].flatten(0, 1)))
    accumulator, passes = accumulate(network)
    detail = accumulator.reduce(step=1, steps=1)[0]["layer_detail"]
    sums = torch.zeros(4, 16)
    for plans, tokens in zip(passes, entered, strict=True):
        for row, expert, _ in rows_of([plans], 1):
            sums[expert] += tokens[row]
    keys = router.prototypes.detach()
    cosines = cosine_similarity(keys[:, None], sums[None], dim=-1).tolist()
    fed = [expert for expert in range(4) if sums[expert].any()]
    assert len(fed) < 4  # an expert without tokens has no centroid, and counts in no mean
    for expert in range(4):
        others = [cosines[expert][other] for other in fed if other != expert]
        own = pytest.approx(cosines[expert][expert], abs=1e-4) if expert in fed else None
        assert detail["prototype_to_centroid"][expert] == own
        mean = pytest.approx(sum(others) / len(others), abs=1e-4)
        assert detail["prototype_to_other_centroids"][expert] == mean
    own = cosine_similarity(keys[:, None], keys[None], dim=-1)
    found = torch.tensor(detail["prototype_similarity_matrix"])
    torch.testing.assert_close(found, own, atol=1e-4, rtol=0)


def test_sums_of_tokens_are_the_same_either_way_and_where_nothing_is_routed() -> None:
    network = make_network("dit_moe")
    tokens = random_tensor(20, 16)
    for labels in (LABELS, [NULL] * 5):
        assignment = run(network, labels=labels)[1].assignment
        sums = sum_tokens_by_expert(tokens, assignment)
        torch.testing.assert_close(sums, sum_by_product(tokens, assignment), rtol=1e-5, atol=1e-5)


def test_plans_carry_sums_of_tokens_in_training_only() -> None:
    network = make_network("token_choice")
    assert run(network)[1].stats.token_sums_ED.shape == (4, 16)
    assert run(network.eval())[1].stats.token_sums_ED is None


def sharded(ranks: int, clock: WaitClock | None) -> tuple[DiT, list[RoutingAccumulator]]:
    """Return a network as two of the ranks share its experts, and each rank's accumulator; a group
    is named by its first rank.
    """
    network = make_network("token_choice", parallel={"ep_size": 2})
    accumulators = []
    for rank in range(ranks):
        for layer in network.moe_layers().values():
            layer.dispatcher.group, layer.dispatcher.clock = f"from_{rank // 2 * 2}", clock
        accumulators.append(RoutingAccumulator(network.config, network, one_of(ranks, rank)))
    return network, accumulators


def test_lines_say_what_each_rank_computed_and_how_uneven_passes_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, accumulators = sharded(4, WaitClock())
    passes = [[run(network, 10 * rank + seed) for seed in range(3)] for rank in range(4)]
    for accumulator, plans_of_rank in zip(accumulators, passes, strict=True):
        for plans in plans_of_rank:
            accumulator.add(plans, torch.tensor(SIGMA))
    groups = {"from_0": (0, 1), "from_2": (2, 3)}
    lines, *_ = call_together(monkeypatch, accumulators, "reduce", step=3, steps=3, groups=groups)
    for layer, line in ((1, lines[0]), (3, lines[BINS])):
        fullest, of_ep_rank = 0, torch.zeros(2, dtype=torch.int64)
        for seed in range(3):
            sent = [
                plans_of_rank[seed][layer].assignment.tokens_per_expert_E.view(2, 2).sum(dim=1)
                for plans_of_rank in passes
            ]
            computed = [sent[0] + sent[1], sent[2] + sent[3]]
            fullest += torch.cat(computed).max().item()
            of_ep_rank += sum(computed)
        detail = line["layer_detail"]
        assert detail["tokens_per_ep_rank"] == of_ep_rank.tolist()
        mean = of_ep_rank.sum().item() / 4
        assert detail["rank_max_over_mean"] == pytest.approx(fullest / mean)
        assert (detail["passes"], detail["ranks"], detail["ep_size"]) == (3, 4, 2)
        sent_counts = 3 * 4 * 8 * 4 // 2  # passes, ranks, int64, experts; half stay
        assert detail["exchanges"]["counts"]["bytes"] == sent_counts


def test_lines_of_another_backend_leave_open_what_nobody_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, accumulators = sharded(2, None)
    accumulators[0].add(run(network), torch.tensor(SIGMA))
    accumulators[1].add(run(network, 1), torch.tensor(SIGMA))
    lines, _ = call_together(
        monkeypatch, accumulators, "reduce", step=1, steps=1, groups={"from_0": (0, 1)}
    )
    exchanges = lines[0]["layer_detail"]["exchanges"].values()
    assert all(each == {"bytes": None, "seconds": None} for each in exchanges)
    VALIDATOR.validate(lines[0])
    assert "exchange_wait_seconds/layer_1" not in flatten({"step": 1}, lines)[0]


def test_lines_large_matrix_comes_by_the_step_wherever_a_run_was_resumed() -> None:
    train = {"max_steps": 130, "log_every": 3}
    network = random_network(routing={"num_experts": 33}, train=train).train()

    def steps_with_matrix(start: int, stop: int) -> list[int]:
        accumulator, passes = accumulate(network, passes=1)
        found = []
        for step in range(start + 3, stop + 1, 3):
            line = accumulator.reduce(step=step, steps=3, last=step == stop)[0]
            VALIDATOR.validate(line)
            found += [step] if "prototype_similarity_matrix" in line["layer_detail"] else []
            accumulator.add(passes[0], torch.tensor(SIGMA), torch.tensor(LABELS))
        return found

    assert steps_with_matrix(0, 126) == [60, 120]
    assert steps_with_matrix(0, 27) + steps_with_matrix(27, 126) == [60, 120]
    assert steps_with_matrix(127, 130) == [130]  # the run's last


def test_lines_without_a_matrix_are_read_with_the_newest_one(tmp_path: Path) -> None:
    network = make_network("token_choice", logging={"counts_every": 2}, train={"log_every": 5})
    accumulator, passes = accumulate(network, passes=1)
    written = []
    for step in (5, 10, 15):
        lines = accumulator.reduce(step=step, steps=5)
        append_lines(tmp_path / "routing.jsonl", lines)
        details = [line["layer_detail"] for line in lines[::BINS]]
        written.append([detail.get("prototype_similarity_matrix") for detail in details])
        accumulator.add(passes[0], torch.tensor(SIGMA), torch.tensor(LABELS))
    assert written[0] == written[2] == [None, None]
    assert load_log(tmp_path).matrix_LEE.tolist() == written[1]
