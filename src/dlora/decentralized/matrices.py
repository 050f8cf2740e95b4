"""One mixing matrix: how it is stored, what every one must be, and how far a cycle of them lets the
peers be from their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array, csr_array, issparse
from scipy.sparse.linalg import LinearOperator, eigsh

from dlora.errors import TopologyError

# (n, n) float64, row = receiver. Only the entries that are not zero are stored: row by row, in
# order of their columns. A matrix takes the memory of its edges.
Matrix: TypeAlias = csr_array
Ends: TypeAlias = NDArray[np.integer[Any]]  # (E, 2): the two peers of each edge
Vector: TypeAlias = NDArray[np.float64]

# largest rounding error of float64 in a sum, a symmetry or a disagreement that is exact on paper
ROUNDING = 1e-12
VECTORS = 60  # of Lanczos iterations; a path of 3,000 peers takes a quarter of the time of 20
EXACT = 1000  # most peers for whom eigenvalues are computed from the whole (n, n) array


def matrix_of(kept: Vector, ends: Ends, weights: Vector) -> Matrix:
    """The symmetric matrix of peers that keep ``kept`` of their own, and give each other
    ``weights`` over the edges ``ends``.
    """
    peers, (i, j) = np.arange(len(kept)), ends.T
    entries = np.concatenate([kept, weights, weights])
    places = np.concatenate([peers, i, j]), np.concatenate([peers, j, i])
    return coo_array((entries, places), shape=(len(kept), len(kept))).tocsr()


def edges_of(mixing: Matrix) -> tuple[Ends, Vector]:
    """The pairs (i, j), i < j, that exchange, in order, and their weights."""
    entries = mixing.tocoo()
    above = entries.row < entries.col
    return np.column_stack([entries.row, entries.col])[above], entries.data[above]


def check_mixing(mixing: ArrayLike | Matrix) -> Matrix:
    """A read-only copy of the matrix. Raises TopologyError unless it is square, finite,
    non-negative and symmetric, with rows that sum to 1.

    The error names the row or the entry, counted from 0.
    """
    given: Any = mixing if issparse(mixing) else np.asarray(mixing, dtype=np.float64)
    if given.ndim != 2 or given.shape[0] != given.shape[1] or not given.shape[0]:
        raise TopologyError(
            f"a mixing matrix is (n, n), a row and a column for each peer, got shape {given.shape}"
        )
    matrix = csr_array(given, dtype=np.float64, copy=True)
    matrix.sum_duplicates()  # and sorts
    matrix.eliminate_zeros()
    _refuse(matrix, matrix, ~np.isfinite(matrix.data), "is not a finite number")
    _refuse(matrix, matrix, matrix.data < 0, "is negative, but a neighbour weight is at least 0")
    apart = (matrix - matrix.T).tocsr()
    _refuse(
        matrix,
        apart,
        np.abs(apart.data) > ROUNDING,
        "is not its mirror image, but both ends must give the same weight",
    )
    sums = matrix.sum(axis=1)
    row = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[row] - 1) > ROUNDING:
        raise TopologyError(
            f"row {row} of the mixing matrix sums to {sums[row]:.12g}; it must sum to 1"
        )
    for part in (matrix.data, matrix.indices, matrix.indptr):
        part.flags.writeable = False
    return matrix


def _refuse(matrix: Matrix, looked_at: Matrix, wrong: NDArray[np.bool_], rule: str) -> None:
    """Raise TopologyError if an entry that ``looked_at`` stores is ``wrong``; it names the first,
    row by row.
    """
    if wrong.any():
        entries = looked_at.tocoo()
        i, j = min(zip(entries.row[wrong].tolist(), entries.col[wrong].tolist(), strict=True))
        raise TopologyError(
            f"mixing[{i}, {j}] = {matrix[i, j]:.6g} (mixing[{j}, {i}] = {matrix[j, i]:.6g}) {rule}"
        )


def disagreement(matrices: Sequence[Matrix]) -> float:
    """|W_(T-1) ... W_0 - J|_2 for the mixing matrices of T rounds, in order; every entry of J is
    1/n. It is the largest factor by which the rounds multiply the peers' distance to their mean.

    It is right up to rounding if the matrices are circulant, or there are at most ``EXACT`` peers.
    Else Lanczos iterations find it, with an error of at most about 1e-12: six digits of a spectral
    gap above 1e-6 are right, and five of the gap of a path of 10,000 peers, 3e-8.
    """
    n = matrices[0].shape[0]
    if _all_agree(matrices):
        return 0.0
    if all(map(_is_circulant, matrices)):
        # circulant matrices have the same eigenvectors, and the first belongs to the mean
        products = np.prod([_eigenvalues(matrix) for matrix in matrices], axis=0)
        norm = float(np.abs(products)[1:].max())
    elif n <= EXACT:
        norm = _norm(reduce(lambda done, mixing: mixing @ done, matrices, np.eye(n)) - 1 / n)
    else:

        def there_and_back(values: Vector) -> Vector:
            """M^T M values, where M is the product less J."""
            apart = values - values.mean()
            return reduce(lambda x, mixing: mixing @ x, (*matrices, *reversed(matrices)), apart)

        norm = math.sqrt(max(0.0, _by_lanczos(there_and_back, n)))
    return norm if norm > ROUNDING else 0.0


def largest_eigenvalue(symmetric: Matrix) -> float:
    """The largest eigenvalue, found as in `disagreement`."""
    n = symmetric.shape[0]
    if n <= EXACT:
        return float(np.linalg.eigvalsh(symmetric.toarray())[-1])
    if _is_circulant(symmetric):
        return float(_eigenvalues(symmetric).real.max())
    return _by_lanczos(lambda values: symmetric @ values, n)


def _all_agree(matrices: Sequence[Matrix]) -> bool:
    """Whether the rounds take random values to their mean, and so any values."""
    values = np.random.default_rng(0).standard_normal((matrices[0].shape[0], 4))
    mixed = reduce(lambda x, mixing: mixing @ x, matrices, values)
    return bool(np.abs(mixed - values.mean(axis=0)).max() <= ROUNDING)


def _is_circulant(matrix: Matrix) -> bool:
    """Whether each row is the one above, moved by one: a ring, a complete or exponential graph."""
    n = matrix.shape[0]
    entries = matrix.tocoo()
    if len(entries.data) % n or (np.diff(matrix.indptr) != len(entries.data) // n).any():
        return False
    # how far each entry is to the right of the diagonal, in order
    right = (entries.col - entries.row) % n
    order = np.lexsort((right, entries.row))
    right, weights = (of[order].reshape(n, -1) for of in (right, entries.data))
    return bool((right == right[0]).all() and (weights == weights[0]).all())


def _eigenvalues(circulant: Matrix) -> NDArray[np.complex128]:
    """The transform of its first row; the first eigenvalue belongs to the mean."""
    return np.fft.fft(circulant[[0]].toarray()[0])


def _norm(apart: NDArray[np.float64]) -> float:
    """The norm of a symmetric matrix is its largest absolute eigenvalue. The norm of any other
    matrix M is the root of the largest eigenvalue of M^T M. This equals a singular value
    decomposition up to rounding, and takes a fraction of its time (1,000 peers).
    """
    if np.array_equal(apart, apart.T):
        return float(np.abs(np.linalg.eigvalsh(apart)).max())
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(apart.T @ apart)[-1])))


def _by_lanczos(symmetric: Callable[[Vector], Vector], n: int) -> float:
    """The largest eigenvalue of the symmetric (n, n) matrix that multiplies a vector."""
    start = np.random.default_rng(0).standard_normal(n)  # fixed, so that all peers find the same
    operator = LinearOperator((n, n), matvec=symmetric, dtype=np.float64)
    [largest] = eigsh(
        operator, 1, which="LA", v0=start, ncv=VECTORS, tol=1e-12, return_eigenvectors=False
    )
    return float(largest)
