"""What samples are conditioned on: one frozen value on its way from the data to the router.

Routing asks for `is_null_B` alone, the network's `ConditionEmbedding` for what is inside. Letters:
B images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition(ABC):
    """The condition of each of B samples; some are null: an empty label, an empty text.

    A subclass is a frozen dataclass. num_null: how many are null, where the host knows it, so that
    nobody has to ask the device.
    """

    num_null: int | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def is_null_B(self) -> Tensor:
        """Which samples are under the null condition, bool."""

    @property
    @abstractmethod
    def group_B(self) -> Tensor | None:
        """What statistics sort samples by, int64; None where there are no groups."""

    @abstractmethod
    def __len__(self) -> int:
        """Return B."""

    @abstractmethod
    def drop(self, mask_B: Tensor) -> Self:
        """Return the condition with the masked samples null."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the condition with a function applied to each tensor, whose first dimension is
        B.
        """

    @abstractmethod
    def cat(self, others: Sequence[Self]) -> Self:
        """Return this condition and others of its kind behind it, as one."""

    def null_like(self) -> Self:
        """Return as many samples, all null."""
        return replace(self.drop(torch.ones_like(self.is_null_B)), num_null=len(self))

    def counted(self) -> Self:
        """Return the same samples with `num_null`; call where the tensors are on the host."""
        return replace(self, num_null=int(self.is_null_B.sum()))

    def moved(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the same samples elsewhere, by a function that changes no value."""
        return replace(self.map(function), num_null=self.num_null)

    def to(self, device: torch.device) -> Self:
        """Return the condition on a device."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def select(self, ids: Tensor | slice) -> Self:
        """Return some of the samples, in this order."""
        return self.map(lambda tensor: tensor[ids])


@dataclass(frozen=True)
class ClassCondition(Condition):
    """A class label a sample; the label behind the last class is null."""

    #: int64 in 0 ... null_label.
    labels_B: Tensor
    null_label: int

    @property
    def is_null_B(self) -> Tensor:
        """Which labels are the null label."""
        return self.labels_B == self.null_label

    @property
    def group_B(self) -> Tensor:
        """Return the labels."""
        return self.labels_B

    def __len__(self) -> int:
        return len(self.labels_B)

    def drop(self, mask_B: Tensor) -> ClassCondition:
        """Return the labels with the masked ones null."""
        return ClassCondition(torch.where(mask_B, self.null_label, self.labels_B), self.null_label)

    def map(self, function: Callable[[Tensor], Tensor]) -> ClassCondition:
        """Return the labels with a function applied."""
        return ClassCondition(function(self.labels_B), self.null_label)

    def cat(self, others: Sequence[ClassCondition]) -> ClassCondition:
        """Return these labels and the others'."""
        counts = [each.num_null for each in (self, *others)]
        known = [count for count in counts if count is not None]
        return ClassCondition(
            torch.cat([self.labels_B, *(each.labels_B for each in others)]),
            self.null_label,
            num_null=sum(known) if len(known) == len(counts) else None,
        )
