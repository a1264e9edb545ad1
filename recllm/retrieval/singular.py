"""The leading singular vectors of a large sparse matrix: block Lanczos with thick restarts.

A basis of X, M^T M X, (M^T M)^2 X, ... is built from a block X of some vectors, and M^T M, which is never
made, is projected onto it (Golub and Underwood 1977). Where the basis is full, the best of what it holds, and
the last block, begin the next one (Wu and Simon 2000). A product with eight vectors reads the matrix once,
and takes little more than twice the time of one with a single vector, which is what ARPACK asks for; and it
ends at a residual that no neighbor feels.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

Vectors = NDArray[np.float32]

BLOCK = 8
"""Vectors that the matrix is multiplied with at once."""
BASIS = 3
"""So many times as many vectors as are wanted are in a full basis."""
RESIDUAL = 1e-3
"""|M^T M v - s^2 v| of every vector is at most this share of s^2 in the end,"""
NOISE = 1e-6
"""or this share of the largest s^2: float32 knows no more of small ones."""
MOST_ROUNDS = 20
"""After so many full bases what is found is taken as it is: values that stand so close have no order."""


def fits(shape: tuple[int, ...], dim: int) -> bool:
    """Whether a matrix is large enough for `leading`; a smaller one is decomposed as a whole in no time."""
    return min(shape) > max(512, 2 * BASIS * (dim + BLOCK))


def leading(matrix: sparse.csr_matrix, dim: int, seed: int) -> tuple[Vectors, Vectors]:
    """The largest singular values of a matrix and their right vectors.

    Args:
        matrix: float32 `[rows, columns]`, so large that it `fits`.
        dim: how many.
        seed: of the vectors that it starts from.

    Returns:
        Values float32 `[dim]`, largest first, and vectors float32 `[columns, dim]`.
    """
    transposed = matrix.T.tocsr()
    if matrix.shape[0] < matrix.shape[1]:  # the basis lies on the shorter side
        values, left = _eigenvectors(_tensor(transposed), _tensor(matrix), dim, seed)
        vectors = (_tensor(transposed) @ left) / values.clamp(min=1e-30)
    else:
        values, vectors = _eigenvectors(_tensor(matrix), _tensor(transposed), dim, seed)
    return values.numpy(), vectors.numpy()


def _eigenvectors(
    there: torch.Tensor, back: torch.Tensor, dim: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots of the largest eigenvalues of `back @ there`, and eigenvectors `[n, dim]`."""
    n = there.shape[1]
    size = -(-BASIS * dim // BLOCK) * BLOCK
    basis = torch.zeros(size + BLOCK, n)
    projected = torch.zeros(size, size, dtype=torch.float64)
    start = np.random.default_rng(seed).standard_normal((n, BLOCK)).astype(np.float32)
    basis[:BLOCK] = torch.linalg.qr(torch.from_numpy(start)).Q.T
    filled = 0
    kept = size - (size - dim - BLOCK) // BLOCK * BLOCK  # so that blocks fill the basis again
    for _ in range(MOST_ROUNDS):
        while filled < size:
            own = slice(filled, filled + BLOCK)
            before = basis[: filled + BLOCK]
            product = (back @ (there @ basis[own].T.contiguous())).T
            part = before @ product.T
            projected[: filled + BLOCK, own] = part.double()
            projected[own, : filled + BLOCK] = part.T.double()
            once, rest = torch.linalg.qr((product - part.T @ before).T)
            # Once more: what is left of a product that lay in the basis is rounding.
            twice, more = torch.linalg.qr(once - before.T @ (before @ once))
            rest = more @ rest
            filled += BLOCK
            basis[filled : filled + BLOCK] = twice.T
        values, mixture = torch.linalg.eigh(projected)
        residual = torch.linalg.norm(rest.double() @ mixture[-BLOCK:, -dim:], dim=0)
        if bool((residual <= torch.clamp(RESIDUAL * values[-dim:], min=NOISE * float(values[-1]))).all()):
            break
        following = basis[size:].clone()
        basis[:kept] = mixture[:, -kept:].T.float() @ basis[:size]
        basis[kept : kept + BLOCK] = following
        projected.zero_()
        projected[:kept, :kept] = torch.diag(values[-kept:])
        filled = kept
    vectors = mixture[:, -dim:].flip(1).T.float() @ basis[:size]
    return values[-dim:].flip(0).clamp(min=0).sqrt().float(), vectors.T.contiguous()


def _tensor(matrix: sparse.csr_matrix) -> torch.Tensor:
    """The matrix as torch multiplies it, over the same memory."""
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    return torch.sparse_csr_tensor(
        torch.from_numpy(matrix.indptr),
        torch.from_numpy(matrix.indices),
        torch.from_numpy(matrix.data),
        size=matrix.shape,
        check_invariants=False,
    )
