"""Embeddings as unit vectors, a block at a time: the product of two blocks is the cosine of every pair.

Legend: N rows, U of them in use, D features, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import GuardError

ROWS = 4096
"""Of a block: 21 MB at 1,280 features."""


class Directions:
    """Some rows of an array as unit vectors. It holds their lengths; the rows are read where they lie and never all copied."""

    def __init__(self, features_ND: NDArray[np.float32], rows_U: NDArray[np.int64]) -> None:
        """Measure the lengths.

        Args:
            features_ND: (N, D) float32, any scale.
            rows_U: the rows in use, in any order.

        Raises:
            GuardError: one of them holds a value that is not finite.
        """
        self._features_ND, self._rows_U = features_ND, rows_U
        length_U = np.concatenate([np.empty(0, np.float32), *self._lengths()])
        if not np.isfinite(length_U).all():
            bad = rows_U[~np.isfinite(length_U)]
            raise GuardError(f"{len(bad)} embeddings hold values that are not finite, the first in row {bad[0]}.")
        # A vector of zeros has no direction, and is like nothing.
        self._inverse_U = np.divide(1, length_U, out=np.zeros_like(length_U), where=length_U > np.finfo(np.float32).tiny)

    def __len__(self) -> int:
        return len(self._rows_U)

    def __getitem__(self, which: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit vectors (R, D) float32."""
        block_RD = self._features_ND[self._rows_U[which]]
        block_RD *= self._inverse_U[which, None]
        return block_RD

    def _lengths(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(self._rows_U), ROWS):
            block_RD = self._features_ND[self._rows_U[start : start + ROWS]]
            yield np.sqrt(np.einsum("rd,rd->r", block_RD, block_RD))
