"""How a row travels in an exchange: as it is, in bf16, or in FP8 with a scale for each row.

What arrives has the dtype of what was sent, and its gradient travels back the same way. A narrower
dtype rounds both; the gradient is that of the unrounded exchange (straight through).
Letters: N rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes of the scale that an FP8 row carries.
_SCALE_BYTES = 4


class CommDtype:
    """Packs rows for an exchange and unpacks them; this one leaves them as they are."""

    def pack(self, rows_ND: Tensor, *, is_gradient: bool) -> Tensor:
        """Return the rows as they travel, (N, elements)."""
        return rows_ND

    def unpack(
        self, packed: Tensor, width: int, dtype: torch.dtype, *, is_gradient: bool
    ) -> Tensor:
        """Return (N, width) rows of `dtype`."""
        return packed.to(dtype)

    def row_bytes(self, width: int, element_size: int) -> int:
        """Return the bytes of one row of `width` numbers that have `element_size` bytes before."""
        return width * element_size


class _Bf16(CommDtype):
    def pack(self, rows_ND: Tensor, *, is_gradient: bool) -> Tensor:
        return rows_ND.to(torch.bfloat16)

    def row_bytes(self, width: int, element_size: int) -> int:
        return 2 * width


class _Fp8(CommDtype):
    """Values as e4m3, gradients, which need range, as e5m2; each row is scaled to the format's
    largest number.

    A row with a number that is not finite arrives as NaN, so that the check of the gradients still
    finds it.
    """

    def pack(self, rows_ND: Tensor, *, is_gradient: bool) -> Tensor:
        dtype = self._format(is_gradient)
        rows = rows_ND.float()
        largest_N1 = rows.abs().amax(dim=1, keepdim=True)
        scale_N1 = (largest_N1 / torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.cat(
            [(rows / scale_N1).to(dtype).view(torch.uint8), scale_N1.view(torch.uint8)], dim=1
        )

    def unpack(
        self, packed: Tensor, width: int, dtype: torch.dtype, *, is_gradient: bool
    ) -> Tensor:
        scale_N1 = packed[:, width:].contiguous().view(torch.float32)
        values_ND = packed[:, :width].contiguous().view(self._format(is_gradient)).float()
        return (values_ND * scale_N1).to(dtype)

    def row_bytes(self, width: int, element_size: int) -> int:
        return width + _SCALE_BYTES

    @staticmethod
    def _format(is_gradient: bool) -> torch.dtype:
        return torch.float8_e5m2 if is_gradient else torch.float8_e4m3fn


SAME = CommDtype()
#: The choices of `parallel.comm_dtype`.
COMM_DTYPES: dict[str, CommDtype] = {"same": SAME, "bf16": _Bf16(), "fp8": _Fp8()}
