"""Explicit routing guidance (Sec. 4.2): a classifier of whole samples, one expert per superclass.

Letters: B images, S tokens per image, D width, E routed experts = superclasses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.registry import register
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import ROUTERS, Router
from promoe_ds.routing.scores import linear_fp32


@register(ROUTERS, "classification")
class ClassificationRouter(Router):
    """Sends all tokens of a sample to the expert of the superclass that their mean is classified
    as.
    """

    per_expert = ("classifier.weight", "classifier.bias")

    def __init__(self, width: int, settings: RoutingConfig) -> None:
        """Create the classifier, uninitialised; `set_superclasses` gives it its labels, which only
        training needs.
        """
        super().__init__(width, settings)
        self.classifier = nn.Linear(width, self.num_experts)
        self._superclass_of: Tensor | None = None

    def set_superclasses(self, superclass_of: Sequence[int]) -> None:
        """Take the superclass of every class, in the order of the classes; the null label has
        none.
        """
        self._superclass_of = torch.tensor(
            [*superclass_of, 0], device=self.classifier.weight.device
        )

    def expert_keys_ED(self) -> Tensor:
        """Return the classifier's rows."""
        return self.classifier.weight

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: Sec. 4.2, explicit routing guidance; the gate is the softmax of the affinity scores.
        Null samples that have no expert of their own follow the classifier and do not count in its
        loss.
        Returns: RoutingPlan; the cross-entropy, already weighted, only in training mode.
        Gradient: reaches tokens and classifier.  Sync: none.  Collectives: none.
        Raises: RuntimeError in training without `set_superclasses`.
        """
        mean_BD = tokens_BSD.mean(dim=1, dtype=torch.promote_types(tokens_BSD.dtype, torch.float32))
        logits_BE = linear_fp32(mean_BD, self.classifier)
        gate_B, expert_B = logits_BE.softmax(dim=-1).max(dim=-1)
        shape = (*tokens_BSD.shape[:2], 1)
        assignment, stats = self.plan_token_choice(
            tokens_BSD,
            gate_B[:, None, None].expand(shape),
            expert_B[:, None, None].expand(shape),
            partition,
        )
        aux_losses = {}
        weight = self.settings.classification_weight
        if self.training and weight > 0:
            if self._superclass_of is None or partition.group_B is None:
                raise RuntimeError(
                    "training a ClassificationRouter needs set_superclasses first, and classes"
                )
            targets_B = self._superclass_of[partition.group_B]
            aux_losses["classification"] = weight * classification_loss(
                logits_BE, targets_B, ~partition.is_null_B
            )
        return RoutingPlan(assignment=assignment, aux_losses=aux_losses, stats=stats)


def classification_loss(logits_BE: Tensor, superclasses_B: Tensor, is_labelled_B: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labelled samples; 0 without any.

    Source: Sec. 4.2, L_cls.
    Args:
        superclasses_B: int64 in 0 ... E-1; ignored where not labelled.
    Gradient: reaches logits.  Sync: none.
    """
    losses_B = F.cross_entropy(logits_BE, superclasses_B, reduction="none")
    labelled_B = is_labelled_B.to(losses_B.dtype)
    return (losses_B * labelled_B).sum() / labelled_B.sum().clamp_min(1.0)
