"""One mixing matrix: what every one must be, and how far it lets the peers be from their mean."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from dlora.decentralized.finite_time import Matrix
from dlora.errors import TopologyError

# largest rounding error of float64 in a sum, a symmetry or a disagreement that is exact on paper
ROUNDING = 1e-12


def check_mixing(mixing: ArrayLike) -> None:
    """Raise TopologyError unless the matrix is square, finite, non-negative and symmetric, with
    rows that sum to 1.

    The error names the row or the entry, counted from 0.
    """
    matrix = np.asarray(mixing, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise TopologyError(
            f"a mixing matrix is (n, n), a row and a column for each peer, got shape {matrix.shape}"
        )
    for wrong, rule in (
        (~np.isfinite(matrix), "is not a finite number"),
        (matrix < 0, "is negative, but a neighbour weight is at least 0"),
        (
            ~np.isclose(matrix, matrix.T, rtol=0, atol=ROUNDING),
            "is not its mirror image, but both ends must give the same weight",
        ),
    ):
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            raise TopologyError(
                f"mixing[{i}, {j}] = {matrix[i, j]:.6g} (mixing[{j}, {i}] = {matrix[j, i]:.6g})"
                f" {rule}"
            )
    sums = matrix.sum(axis=1)
    row = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[row] - 1) > ROUNDING:
        raise TopologyError(
            f"row {row} of the mixing matrix sums to {sums[row]:.12g}; it must sum to 1"
        )


def disagreement(product: Matrix) -> float:
    """|product - J|_2: the largest factor by which ``product`` multiplies the peers' distance to
    their mean.

    The norm of a symmetric matrix is its largest absolute eigenvalue. The norm of any other matrix
    M is the root of the largest eigenvalue of M^T M. This equals a singular value decomposition up
    to rounding, and takes a fraction of its time (1,000 peers).
    """
    if _is_circulant(product):
        # its eigenvalues are the transform of its first row, and the first of them belongs to the
        # mean
        others = np.abs(np.fft.fft(product[0]))[1:]
        largest = float(others.max()) if len(others) else 0.0
        return largest if largest > ROUNDING else 0.0
    apart = product - 1 / len(product)
    # the Frobenius norm is never smaller than the norm asked for
    if np.linalg.norm(apart) <= ROUNDING:
        return 0.0
    if np.array_equal(apart, apart.T):
        norm = float(np.abs(np.linalg.eigvalsh(apart)).max())
    else:
        norm = math.sqrt(max(0.0, float(np.linalg.eigvalsh(apart.T @ apart)[-1])))
    return norm if norm > ROUNDING else 0.0


def _is_circulant(matrix: Matrix) -> bool:
    """Whether each row is the one above, moved by one: a ring, a complete or exponential graph."""
    rest = matrix[1:]
    return np.array_equal(rest[:, 1:], matrix[:-1, :-1]) and np.array_equal(
        rest[:, 0], matrix[:-1, -1]
    )
