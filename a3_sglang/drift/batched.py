"""The correction of drift on a GPU: all requests of a pass at once, by the kernels in ``kernels/``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from a3_sglang.attention.base import KV
from a3_sglang.drift.correction import DriftRotations, ObservedRows
from a3_sglang.drift.model import DriftModel, cut_blocks
from a3_sglang.drift.selection import most_candidates
from a3_sglang.drift.tables import covariance_table
from a3_sglang.rope import RopeTable


class BatchedCorrection:
    """A :data:`a3_sglang.drift.correction.DriftCorrectionFn` for several requests, two launches per layer.

    A block is a run of positions, and the rows of a pass are sorted by position, so the rows that are observed in a
    block are a run of the pass's rows; where it begins and ends is looked up on the device. Weights are computed once,
    for all layers. Forces no host-device sync.

    Args:
        drift: how the drift of rows varies.
        observed: the rows of each request in the pass.
        dtype: of the KV pools.
    """

    def __init__(self, drift: DriftModel, observed: Sequence[ObservedRows], dtype: torch.dtype) -> None:
        from a3_sglang.kernels.drift_weights import WIDTH_UNIT, Blocks, kriging_weights

        device = observed[0].slots.device
        table: list[tuple[int, int, int, int, int]] = []
        shifted_pos, wanted, first_pos, row = [], [], 0, 0
        for request, part in enumerate(observed):
            for start, end in part.spans:
                for offset, rows in cut_blocks([end - start]):
                    table.append((first_pos + start + offset, rows, offset, row, request))
                    row += rows
            shifted_pos.append(part.pos + first_pos)
            wanted += [_on_device(bound, device) + first_pos for bound in (part.begin_pos, part.end_pos)]
            first_pos += len(part.slots)
        edges = torch.tensor([[entry[0] for entry in table], [entry[0] + entry[1] for entry in table]])
        width = max(most_candidates(part.lengths, part.recomputed) for part in observed)
        pos = torch.cat(shifted_pos)
        self._blocks = Blocks(
            torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True),
            pos,
            torch.searchsorted(pos, edges.to(device, non_blocking=True)),
            torch.stack(wanted).view(-1, 2),
            max(entry[1] for entry in table),
            width + -width % WIDTH_UNIT,
        )
        self._slots = torch.cat([part.slots for part in observed])
        self._observed_slots = self._slots[pos]
        rows_of = [torch.arange(p.first_row, p.first_row + len(p.pos), device=device) for p in observed]
        self._observed_rows = torch.cat(rows_of)
        self._rotations = DriftRotations(
            torch.cat([part.pos for part in observed]), torch.cat([part.reused_pos for part in observed])
        )
        longest = max(max(part.lengths) for part in observed)
        self._weights = [
            kriging_weights(self._blocks, covariance_table(kind, longest, device), dtype)
            for kind in (drift.keys, drift.values)
        ]

    def __call__(self, pools: KV, fresh: KV, rope: RopeTable) -> None:
        from a3_sglang.kernels.drift_correction import correct_drift

        to_zero, from_zero = self._rotations(rope)
        key_weights, value_weights = self._weights
        correct_drift(
            *pools,
            *fresh,
            blocks=self._blocks,
            observed_rows=self._observed_rows,
            observed_slots=self._observed_slots,
            slots=self._slots,
            key_weights=key_weights,
            value_weights=value_weights,
            to_zero=to_zero,
            from_zero=from_zero,
            neox=rope.neox,
        )


def _on_device(bound: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(bound, torch.Tensor):
        return bound
    return torch.full((), bound, dtype=torch.int64, device=device)
