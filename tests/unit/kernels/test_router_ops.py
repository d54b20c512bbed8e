"""The router's fused operations against plain torch operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton: pip install triton")

from promoe_ds.kernels import ops, router_ops, sort_ops
from promoe_ds.kernels.ops import rows_of_tokens
from promoe_ds.routing.assignment import assign_token_choice, count_pairs, sum_by_product
from promoe_ds.routing.losses import contrast_centroids
from promoe_ds.routing.router import mean_prototype_similarity
from promoe_ds.routing.scores import cosine_scores

from .test_ops import DEVICE, SIZES, _assignment, _draw, _gradients, _same, every_dtype, every_size

#: Whether something is computed from the tokens that an operation passes on.
is_used = pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])


def _and_use(output: Tensor, tokens: Tensor, used: bool) -> Tensor:
    more = (tokens * _draw(*tokens.shape, seed=5, dtype=tokens.dtype)).float()
    return torch.cat([output.flatten(), more.flatten()]) if used else output


@is_used
@every_dtype
@every_size
def test_sums_by_expert_and_their_gradient(size, dtype, used) -> None:
    assignment, (num_tokens, width, _, _) = _assignment(size), size
    places = rows_of_tokens(assignment.token_ids_N, num_tokens)
    ends = assignment.tokens_per_expert_E.cumsum(0).to(torch.int32)
    tokens = _draw(num_tokens, width, seed=3, dtype=dtype).requires_grad_()
    passed, again, fused = ops.sum_by_expert(tokens, assignment.token_ids_N, ends, places)
    exact = sum_by_product(tokens.float(), assignment)
    found, expected = _and_use(fused, passed, used), _and_use(exact, tokens, used)
    found, expected = _and_use(found, again, used), _and_use(expected, tokens, used)
    _same(_gradients(found, tokens), _gradients(expected, tokens), dtype)


@is_used
@every_dtype
@every_size
def test_cosine_reads_tokens_once_and_has_the_gradient_of_the_eager_one(size, dtype, used) -> None:
    num_tokens, width, experts, _ = size
    tokens, keys = (_draw(n, width, seed=3, dtype=dtype) for n in (num_tokens, experts))
    tokens[num_tokens // 2] = 0
    keys[0] = 0 if experts > 2 else keys[0]
    results = []
    for fused in (True, False):
        x, k = tokens.clone().requires_grad_(), keys.clone().requires_grad_()
        passed, scores = router_ops.cosine(x, k) if fused else (x, cosine_scores(x, k))
        gradients = _gradients(_and_use(scores, passed, used), x, k)
        gradients[1][num_tokens // 2] = 0  # of a zero token: |gradient| is 1e12 in both
        gradients[2][0] = 0
        results.append(gradients)
    _same(*results, dtype)


def test_passed_tokens_alone_have_their_gradient() -> None:
    tokens = _draw(5, 24, seed=3).requires_grad_()
    passed, _ = router_ops.cosine(tokens, _draw(2, 24, seed=4))
    order = torch.arange(5, device=DEVICE)
    places = rows_of_tokens(order, 5)
    ends = torch.tensor([3, 5], dtype=torch.int32, device=DEVICE)
    passed, again, _ = ops.sum_by_expert(passed, order, ends, places)
    (found,) = torch.autograd.grad(passed.sum() + again.sum(), tokens)
    assert torch.equal(found, torch.full_like(tokens, 2.0))


def test_rows_behind_the_last_end_are_in_no_sum() -> None:
    tokens, order = _draw(5, 24, seed=3).requires_grad_(), torch.arange(5, device=DEVICE)
    ends = torch.tensor([1, 3], dtype=torch.int32, device=DEVICE)
    *_, sums = ops.sum_by_expert(tokens, order, ends, rows_of_tokens(order, 5))
    torch.testing.assert_close(sums, torch.stack([tokens[0], tokens[1:3].sum(dim=0)]))
    (found,) = torch.autograd.grad(sums.sum(), tokens)
    assert found.sum(dim=1).tolist() == [24.0] * 3 + [0.0] * 2


@pytest.mark.parametrize("null", ["some", "none", "all"])
@pytest.mark.parametrize(
    "size", [(1, 1, 2, 1), (3, 37, 5, 1), (3, 50, 20, 3), (70, 4, 3, 2)], ids=str
)
def test_choices_are_sorted_as_plain_operations_sort_them(size, null) -> None:
    batch, tokens, experts, top_k = size
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(batch, tokens, experts, generator=generator).argsort(-1)[..., :top_k]
    ids, gates = ids.to(DEVICE), _draw(batch, tokens, top_k, seed=2).requires_grad_()
    is_routed = (torch.arange(batch) % 3 != 1) | (null == "none")
    is_routed = (is_routed & (null != "all")).to(DEVICE)
    found = sort_ops.sort_choices(gates, ids, is_routed, int(is_routed.sum()), experts)
    _compare(found, gates, gates, ids, is_routed.nonzero()[:, 0], experts)
    # Joined, every image has rows, those of the others one more expert's.
    joined = sort_ops.sort_choices(gates, ids, is_routed, batch, experts + 1, joins=True)
    same_gates = gates.where(is_routed[:, None, None], 1.0)
    ids = ids.where(is_routed[:, None, None], experts)
    _compare(joined, gates, same_gates, ids, torch.arange(batch, device=DEVICE), experts + 1)


def _compare(
    found: sort_ops.SortedChoices,
    leaf: Tensor,
    gates: Tensor,
    ids: Tensor,
    routed: Tensor,
    experts: int,
) -> None:
    batch, tokens, top_k = ids.shape
    counts = torch.bincount(ids[routed].flatten(), minlength=experts)
    plain = assign_token_choice(gates[routed], ids[routed], routed, counts)
    assert torch.equal(found.token_ids_N, plain.token_ids_N)
    assert torch.equal(found.tokens_per_expert_E, counts)
    assert torch.equal(
        found.places.starts_T, rows_of_tokens(plain.token_ids_N, batch * tokens).starts_T
    )
    order = found.places.order_N
    assert torch.equal(plain.token_ids_N[order], plain.token_ids_N.sort().values)
    assert torch.equal(order.sort().values, torch.arange(len(order), device=DEVICE))
    samples = routed.repeat_interleave(tokens * top_k)
    pairs = count_pairs(samples, ids[routed].flatten(), num_samples=batch, num_experts=experts)
    assert torch.equal(found.counts_BE, pairs)
    sums = gates.new_zeros(batch * experts)
    sums.index_add_(0, samples * experts + ids[routed].flatten(), gates[routed].flatten())
    torch.testing.assert_close(found.gate_sums_BE, sums.view(batch, experts).detach())
    for one, other in zip(
        _gradients(found.gates_N, leaf), _gradients(plain.gates_N, leaf), strict=True
    ):
        assert torch.equal(one, other)


@every_dtype
@pytest.mark.parametrize("counts", [[3, 5], [0, 4, 1, 0, 2], [0, 7], [0] * 3, [2] * 20])
def test_contrast_and_its_gradients(counts, dtype) -> None:
    """Idle experts have sums of 0; with fewer than two active ones the loss is 0."""
    experts, width = len(counts), 136
    counts = torch.tensor(counts, device=DEVICE)
    sums = (_draw(experts, width, seed=3) * counts[:, None]).requires_grad_()
    keys = _draw(experts, width, seed=4, dtype=dtype).requires_grad_()
    results = [
        router_ops.contrast(sums, counts, keys, 0.5, 0.07),
        0.5 * contrast_centroids(sums, counts, keys, 0.07),
    ]
    _same(*[_gradients(loss[None], sums, keys) for loss in results], dtype)


@pytest.mark.parametrize("experts", [1, 2, 5, 20])
def test_mean_similarity(experts) -> None:
    keys = _draw(experts, 136, seed=4)
    keys[-1] = 0
    _same([router_ops.mean_similarity(keys)], [mean_prototype_similarity(keys)], keys.dtype)


@pytest.mark.parametrize("name", ["sort_choices", "contrast", "cosine", "sum_by_expert"])
def test_operations_are_whole_for_tracing(name) -> None:
    size = SIZES[1]
    assignment, (num_tokens, width, experts, _) = _assignment(size), size
    ends = assignment.tokens_per_expert_E.cumsum(0).to(torch.int32)
    sums, keys = _draw(experts, width, seed=3), _draw(experts, width, seed=4)
    ids = torch.zeros(2, 5, 1, dtype=torch.int64, device=DEVICE)
    is_routed = torch.ones(2, dtype=torch.bool, device=DEVICE)
    arguments = {
        "sort_choices": (_draw(2, 5, 1, seed=5).requires_grad_(), ids, is_routed, 2, 3, False),
        "contrast": (
            sums.requires_grad_(),
            assignment.tokens_per_expert_E,
            keys.requires_grad_(),
            1.0,
            0.1,
        ),
        "cosine": (_draw(num_tokens, width, seed=3), keys.detach()),
        "sum_by_expert": (_draw(num_tokens, width, seed=3), assignment.token_ids_N, ends),
    }
    torch.library.opcheck(
        getattr(torch.ops.promoe_ds, name).default,
        arguments[name],
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
