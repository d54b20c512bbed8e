"""What samples are conditioned on: one frozen value on its way from the data to the router.

Routing asks for `is_null_B` alone, the network's `ConditionEmbedding` for what is inside. Letters:
B images, L tokens of a text, C width of an encoded text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded_length(length: int) -> int:
    """Return how many places a batch has whose longest text has so many tokens: a multiple of 16,
    for few shapes and rows that fast kernels take as they are.
    """
    return -(-length // 16) * 16


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
    def _joined(self, others: Sequence[Self]) -> Self:
        """Return this condition and others of its kind behind it, `num_null` left out."""

    def cat(self, others: Sequence[Self]) -> Self:
        """Return this condition and others of its kind behind it, as one."""
        counts = [each.num_null for each in (self, *others)]
        known = [count for count in counts if count is not None]
        return replace(
            self._joined(others), num_null=sum(known) if len(known) == len(counts) else None
        )

    def null_like(self) -> Self:
        """Return as many samples, all null."""
        return replace(self.drop(torch.ones_like(self.is_null_B)), num_null=len(self))

    def counted(self) -> Self:
        """Return the same samples with what only the host can know without asking a device:
        `num_null`, and no more room than they need. Call where the tensors are on the host.
        """
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

    def _joined(self, others: Sequence[ClassCondition]) -> ClassCondition:
        labels = [each.labels_B for each in (self, *others)]
        return ClassCondition(torch.cat(labels), self.null_label)


@dataclass(frozen=True)
class EmptyText:
    """What the encoder makes of the empty text: the null condition."""

    tokens_LC: Tensor
    pooled_C: Tensor


@dataclass(frozen=True)
class TextCondition(Condition):
    """An encoded text a sample; a sample is null where its text is empty or was dropped.

    A negative prompt is not null: it is a text.
    """

    #: The encoder's states, any float dtype; zero behind a text's end.
    tokens_BLC: Tensor
    #: Which of them are tokens, bool: a text's first places, at least one.
    mask_BL: Tensor
    #: One vector for the whole text; its width may differ from the states'.
    pooled_BC: Tensor
    #: Which texts are empty, bool.
    null_B: Tensor
    empty: EmptyText
    #: int64 in 0 ... num_groups, the last of which is null; None where texts have no groups.
    groups_B: Tensor | None = None
    num_groups: int = 0

    @classmethod
    def of_states(
        cls, states: Sequence[Tensor], pooled_BC: Tensor, empty: EmptyText, **others: Any
    ) -> Self:
        """Return texts whose states have lengths of their own, each (L, C); none is null.

        Args:
            others: fields by their names.
        """
        lengths = torch.tensor([len(each) for each in states])
        null_B = torch.zeros(len(states), dtype=torch.bool)
        tokens_BLC = pad_sequence(list(states), batch_first=True)
        mask_BL = torch.arange(tokens_BLC.shape[1]) < lengths[:, None]
        return cls(tokens_BLC, mask_BL, pooled_BC, null_B, empty, **others)

    @property
    def is_null_B(self) -> Tensor:
        """Which texts are empty."""
        return self.null_B

    @property
    def group_B(self) -> Tensor | None:
        """Return the groups of the texts."""
        return self.groups_B

    def __len__(self) -> int:
        return len(self.pooled_BC)

    def drop(self, mask_B: Tensor) -> TextCondition:
        """Return the texts with the masked ones empty."""
        padded = self.padded(max(self.mask_BL.shape[1], len(self.empty.tokens_LC)))
        empty = F.pad(
            self.empty.tokens_LC, (0, 0, 0, padded.mask_BL.shape[1] - len(self.empty.tokens_LC))
        )
        is_token = torch.arange(len(empty), device=mask_B.device) < len(self.empty.tokens_LC)
        return replace(
            padded,
            tokens_BLC=torch.where(mask_B[:, None, None], empty, padded.tokens_BLC),
            mask_BL=torch.where(mask_B[:, None], is_token, padded.mask_BL),
            pooled_BC=torch.where(mask_B[:, None], self.empty.pooled_C, self.pooled_BC),
            null_B=self.null_B | mask_B,
            groups_B=self.groups_B
            if self.groups_B is None
            else torch.where(mask_B, self.num_groups, self.groups_B),
            num_null=None,
        )

    def null_like(self) -> TextCondition:
        """Return as many empty texts, in the places that these need."""
        batch, length = len(self), len(self.empty.tokens_LC)
        room = replace(
            self,
            tokens_BLC=self.empty.tokens_LC.expand(batch, -1, -1),
            mask_BL=self.mask_BL.new_ones(batch, length),
        ).padded(padded_length(length))
        return replace(room.drop(torch.ones_like(self.null_B)), num_null=batch)

    def counted(self) -> TextCondition:
        """Return the same texts with `num_null`, in as many places as the longest one needs, up to
        a multiple: however they were padded, the same value.
        """
        longest = int(self.mask_BL.sum(dim=1).max())
        return replace(self.padded(padded_length(longest)), num_null=int(self.null_B.sum()))

    def map(self, function: Callable[[Tensor], Tensor]) -> TextCondition:
        """Return the texts with a function applied to each tensor of B rows."""
        return replace(
            self,
            tokens_BLC=function(self.tokens_BLC),
            mask_BL=function(self.mask_BL),
            pooled_BC=function(self.pooled_BC),
            null_B=function(self.null_B),
            groups_B=None if self.groups_B is None else function(self.groups_B),
            num_null=None,
        )

    def moved(self, function: Callable[[Tensor], Tensor]) -> TextCondition:
        """Return the same texts elsewhere, the empty one with them."""
        empty = EmptyText(function(self.empty.tokens_LC), function(self.empty.pooled_C))
        return replace(super().moved(function), empty=empty)

    def _joined(self, others: Sequence[TextCondition]) -> TextCondition:
        length = max(each.mask_BL.shape[1] for each in (self, *others))
        parts = [each.padded(length) for each in (self, *others)]
        groups = [each.groups_B for each in parts if each.groups_B is not None]
        return replace(
            self,
            tokens_BLC=torch.cat([each.tokens_BLC for each in parts]),
            mask_BL=torch.cat([each.mask_BL for each in parts]),
            pooled_BC=torch.cat([each.pooled_BC for each in parts]),
            null_B=torch.cat([each.null_B for each in parts]),
            groups_B=torch.cat(groups) if len(groups) == len(parts) else None,
        )

    def padded(self, length: int) -> TextCondition:
        """Return the same texts with `length` places, none of which cuts a text."""
        more = length - self.mask_BL.shape[1]
        return replace(
            self,
            tokens_BLC=F.pad(self.tokens_BLC, (0, 0, 0, more)),
            mask_BL=F.pad(self.mask_BL, (0, more)),
            num_null=None,
        )
