"""Leading singular vectors against LAPACK's of the whole matrix."""

import numpy as np
import pytest
from scipy import sparse

from recllm.retrieval.singular import leading

DIM = 12


def sparse_matrix(rows, columns, rank=None, seed=0):
    """A tenth of the cells filled; or a product of two factors of so many columns, one of them sparse."""
    rng = np.random.default_rng(seed)
    if rank is None:
        return sparse.random(rows, columns, 0.1, "csr", np.float32, rng)
    left = rng.standard_normal((rows, rank)) * (rng.random((rows, rank)) < 0.3)
    return sparse.csr_matrix((left @ rng.standard_normal((rank, columns))).astype(np.float32))


@pytest.mark.parametrize("shape", [(900, 600), (600, 900)], ids=["more rows", "more columns"])
def test_equals_the_svd_of_the_dense_matrix(shape):
    matrix = sparse_matrix(*shape)
    values, vectors = leading(matrix, DIM, seed=3)
    _, wanted, right = np.linalg.svd(matrix.toarray().astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(values, wanted[:DIM], rtol=1e-4)
    # Within a thousandth of the eigenvalue: |M^T M v - s^2 v| <= 1e-3 s^2, and some float32 noise.
    square = (matrix.T @ matrix).toarray().astype(np.float64)
    residual = np.linalg.norm(square @ vectors - vectors * values**2, axis=0)
    assert (residual <= 2e-3 * values**2).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(DIM), atol=1e-4)
    # The first vector stands apart from the rest: it is the same one but for its sign.
    assert abs(vectors[:, 0] @ right[0]) > 0.99999


def test_a_matrix_of_lower_rank_has_that_many_values():
    matrix = sparse_matrix(800, 600, rank=5)
    values, vectors = leading(matrix, DIM, seed=0)
    wanted = np.linalg.svd(matrix.toarray(), compute_uv=False)
    np.testing.assert_allclose(values[:5], wanted[:5], rtol=1e-4)
    assert (values[5:] < 1e-3 * values[0]).all()
    assert np.isfinite(vectors).all()


def test_two_seeds_find_the_same_space():
    matrix = sparse_matrix(900, 600)
    matrix.data *= 1 + 5 * (matrix.indices < DIM)  # twelve columns weigh more: a gap behind the twelfth value
    first = leading(matrix, DIM, seed=0)[1]
    second = leading(matrix, DIM, seed=1)[1]
    # Cosines of the angles between the two spaces.
    np.testing.assert_allclose(np.linalg.svd(first.T @ second, compute_uv=False), 1, atol=1e-4)
