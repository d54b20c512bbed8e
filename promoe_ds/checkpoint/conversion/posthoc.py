"""A moving average of another length, chosen after training, from the power-function averages that
were kept.

Source: EDM2 (Karras et al., 2024), Sec. 3.2 and Appendix C. An average at step t is a weighted mean
of the weights after each step; averages of several lengths and steps are mixed so that the mix's
weighting is nearest, in the least-squares sense, to the weighting asked for. Differs: the sums are
over the steps themselves, not integrals, and the mix's weights add up to 1, so that nothing is lost
of what all weights have in common.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from promoe_ds.checkpoint.conversion.sources import TrainingSource
from promoe_ds.checkpoint.manifest import list_checkpoints, named_checkpoints, step_of
from promoe_ds.config.optimizer import LONGEST_POWER_LENGTH, power_average, power_exponent
from promoe_ds.errors import CheckpointError

#: A mix whose profile misses the one asked for by more than this is another average.
LARGEST_MISFIT = 0.1
_CHUNK = 1 << 16
#: Mixing weights below this leave an average out.
_NEGLIGIBLE = 1e-8


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The weighting of an average at step `step`: a power function of exponent `exponent` over the
    steps before.
    """

    step: int
    exponent: float

    def weights(self, begin: int, end: int) -> np.ndarray:
        """Return the weights of the values after the updates begin + 1 ... end; over 0 ... step
        they add up to 1.

        The decays (1 - 1/i)^(gamma + 1), unrolled: (i/t)^(gamma + 1) - ((i - 1)/t)^(gamma + 1).
        """
        edges = np.minimum(np.arange(begin, end + 1) / self.step, 1.0)
        return np.diff(edges ** (self.exponent + 1))


def mixing_weights(held: list[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Return the weight of each profile held, and how far the mix is from the one wanted, relative
    to its norm.
    """
    count = len(held)
    products = np.zeros((count + 1, count + 1))
    for begin in range(0, wanted.step, _CHUNK):
        rows = np.stack(
            [
                profile.weights(begin, min(begin + _CHUNK, wanted.step))
                for profile in (*held, wanted)
            ]
        )
        products += rows @ rows.T
    products /= products[count, count]
    # Least squares under the condition that the weights add up to 1.
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = products[:count, :count], 0.0
    mix = np.linalg.lstsq(system, np.append(products[:count, count], 1.0), rcond=1e-13)[0][:count]
    signed = np.append(mix, -1.0)
    return mix, max(0.0, float(signed @ products @ signed)) ** 0.5


class PosthocSource:
    """A run's power-function averages, seen as one average of another length."""

    optimizer_step: int | None = None

    def __init__(self, path: Path, length: float) -> None:
        """Choose the mix.

        Args:
            path: a run directory, or one checkpoint of it: the average is that of its step, from
                all checkpoints up to it.
            length: relative standard deviation of the profile, as `optimizer.ema_sigma_rels`.
        Raises: CheckpointError if the run kept no power-function averages, a checkpoint is not
            sound, or the profile asked for cannot be had from what was kept.
        """
        if not 0 < length < LONGEST_POWER_LENGTH:
            raise CheckpointError(
                f"--ema-sigma-rel {length:g}: must be between 0 and {LONGEST_POWER_LENGTH:.3f}"
            )
        last = named_checkpoints(path)[0]
        last = last if last.name.strip(".") else last.resolve()  # `.` and `..` name no neighbours
        self._newest = TrainingSource(last)
        before = [
            folder
            for folder in list_checkpoints(last.parent)
            if step_of(folder) < self._newest.info.step
        ]
        self._sources = [self._newest, *map(TrainingSource, before)]
        self._terms, misfit = self._mix(length)
        self.kinds = {power_average(length): self._newest.kinds[self._terms[0][2]]}
        self.shapes = self._newest.shapes
        info = self._newest.info
        mixed = {f"{source.info.step}/{part}": weight for weight, source, part in self._terms}
        self.info = replace(
            info,
            origin={**info.origin, "ema_sigma_rel": length, "misfit": misfit, "mixed": mixed},
            note=f"mixed from {len(mixed)} averages, {misfit:.2%} off the one asked for",
        )

    def _mix(self, length: float) -> tuple[list[tuple[float, TrainingSource, str]], float]:
        """Return the averages to mix, each with its weight, and the misfit."""
        lengths = self._newest.info.config.optimizer.ema_sigma_rels
        known = {power_average(kept): kept for kept in lengths}
        held = [
            (source, name)
            for source in self._sources
            for name in known
            # Where a run starts from converted weights, its averages have seen no step yet.
            if name in source.kinds and source.info.step > source.info.averages_since.get(name, 0)
        ]
        if not held:
            raise CheckpointError(
                f"{self._newest.info.path}: holds no power-function averages of its own training"
                f" (optimizer.ema_sigma_rels={list(lengths)}): a length can be chosen only of a"
                " run that kept them"
            )
        begins = {source.info.averages_since.get(name, 0) for source, name in held}
        orders = {source.info.config.parallel.expert_order for source in self._sources}
        if len(begins) != 1 or len(orders) != 1:
            raise CheckpointError(
                f"{self._newest.info.path.parent}: averages that began at different steps"
                f" ({', '.join(map(str, sorted(begins)))}), or experts moved in between, cannot be"
                " mixed"
            )
        (begin,) = begins
        weights, misfit = mixing_weights(
            [
                Profile(step=source.info.step - begin, exponent=power_exponent(known[name]))
                for source, name in held
            ],
            Profile(step=self._newest.info.step - begin, exponent=power_exponent(length)),
        )
        if misfit > LARGEST_MISFIT:
            kept = f"lengths {', '.join(f'{one:g}' for one in lengths)}, steps " + ", ".join(
                str(source.info.step) for source in reversed(self._sources)
            )
            raise CheckpointError(
                f"--ema-sigma-rel {length:g}: the nearest mix of what was kept ({kept}) is"
                f" {misfit:.0%} off it: ask for a length nearer to them, or keep more checkpoints"
                " (train.keep_every)"
            )
        return [
            (float(weight), source, name)
            for weight, (source, name) in zip(weights, held, strict=True)
            if abs(weight) > _NEGLIGIBLE
        ], misfit

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor, mixed in fp64; the routers' running state is the newest
        checkpoint's.
        """
        if name in self._newest.buffers:
            return self._newest.read(self._terms[0][2], name)
        return torch.as_tensor(
            sum(weight * source.read(part, name).double() for weight, source, part in self._terms)
        ).float()

    def check(self, kind: str) -> int:
        """Raise CheckpointError unless every value of every average mixed was read once; return how
        many.
        """
        return sum(source.check(part) for _, source, part in self._terms)
