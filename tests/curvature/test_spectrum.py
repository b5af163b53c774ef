"""Kronecker-factored inverses against dense ones."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sklearn_gradfeat.curvature import _spectrum
from sklearn_gradfeat.curvature._spectrum import KroneckerInverse, Spectrum

ALPHA = 0.01


def decaying(n, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 2 * n, dtype=torch.float64, generator=generator)
    rows *= torch.logspace(0, -3, n, dtype=torch.float64)[:, None]
    return rows @ rows.T / n


def flattened(matrix, rank):
    """The matrix with all but its largest eigenvalues replaced by their mean."""
    values, vectors = torch.linalg.eigh(matrix)
    values[:-rank] = values[:-rank].mean()
    return (vectors * values) @ vectors.T


@pytest.mark.parametrize(("largest", "rank"), [(100, None), (25, 12), (10, 12)])
def test_inverse_against_dense_solve(monkeypatch, largest, rank):
    monkeypatch.setattr(_spectrum, "_rank", lambda n: rank)
    monkeypatch.setattr(_spectrum, "_ITERATIONS", 60)
    output, inputs = decaying(20, 0), decaying(30, 1)
    matrix = torch.randn(20, 30, dtype=torch.float64)
    spectra = [Spectrum.from_matrix(m, largest) for m in (output, inputs)]
    solved = KroneckerInverse(*spectra, ALPHA)(matrix)
    kept = [m if len(m) <= largest else flattened(m, rank) for m in (output, inputs)]
    dense = torch.kron(*kept) + ALPHA * torch.eye(600, dtype=torch.float64)
    expected = torch.linalg.solve(dense, matrix.reshape(-1)).view(20, 30)
    torch.testing.assert_close(solved, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["exact", "partial", "partial outputs", "wide", "diagonal"])
def test_matrix_and_last_column_are_solved_in_place_and_in_blocks(monkeypatch, kind):
    """The same as the matrix with the column, where nothing is split."""
    output, inputs = (torch.stack([decaying(n, i) for i in range(2)]) for n in (6, 9))
    matrix = torch.randn(2, 6, 9, dtype=torch.float64)
    monkeypatch.setattr(_spectrum, "_rank", lambda n: 4)
    monkeypatch.setattr(_spectrum, "_RANGE", 1e-9 if kind == "wide" else 1e9)
    largest = {"exact": 9, "partial outputs": 5}.get(kind, 8)
    spectra = [Spectrum.from_matrix(m, largest) for m in (output, inputs)]
    if kind == "diagonal":
        spectra[1] = Spectrum(inputs.diagonal(dim1=1, dim2=2), None)
    inverse = KroneckerInverse(*spectra, ALPHA)
    factors = [
        torch.diag_embed(s.values) if s.vectors is None else s.vectors @ torch.diag_embed(s.values)
        @ s.vectors.mT + (0 if s.rest is None else s.rest.view(-1, 1, 1)
        * (torch.eye(s.vectors.shape[1]).double() - s.vectors @ s.vectors.mT))
        for s in spectra
    ]  # fmt: skip
    dense = torch.stack([torch.kron(*pair) for pair in zip(*factors, strict=True)])
    dense += ALPHA * torch.eye(54, dtype=torch.float64)
    expected = torch.linalg.solve(dense, matrix.reshape(2, -1)).view_as(matrix)
    torch.testing.assert_close(inverse(matrix), expected)
    monkeypatch.setattr(_spectrum, "block_size", lambda device: 30)
    first, last = matrix[..., :-1].clone(), matrix[..., -1:].clone()
    inverse.solve_(first, last)
    torch.testing.assert_close(torch.cat([first, last], 2), expected)


def test_batches_of_matrices():
    output = torch.stack([decaying(4, 0), decaying(4, 1)])
    inputs = torch.stack([decaying(5, 2), decaying(5, 3)])
    matrix = torch.randn(2, 4, 5, dtype=torch.float64)
    together = KroneckerInverse(Spectrum.from_matrix(output), Spectrum.from_matrix(inputs), ALPHA)(
        matrix
    )
    for i in range(2):
        alone = KroneckerInverse(
            Spectrum.from_matrix(output[i]), Spectrum.from_matrix(inputs[i]), ALPHA
        )(matrix[i])
        torch.testing.assert_close(together[i], alone)


def test_leading_part_in_float32():
    wide = decaying(120, 4)
    found, basis = _spectrum._leading(wide.float())
    values = torch.linalg.eigvalsh(wide)[-20:]
    torch.testing.assert_close(found[-20:].double(), values, rtol=1e-2, atol=0)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(40), atol=1e-5, rtol=0)


def test_few_rows_are_decomposed_by_their_products():
    rows = torch.randn(1, 40, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[0, 7] = rows[0, 8]  # of rank 39
    matrix = torch.randn(1, 5, 300, dtype=torch.float64)
    output = Spectrum.from_matrix(torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))[None])
    few, gram = Spectrum.from_rows(rows), Spectrum.from_matrix(rows.mT @ rows)
    assert few.values.shape == (1, 39)
    solved, expected = (KroneckerInverse(output, s, ALPHA)(matrix) for s in (few, gram))
    torch.testing.assert_close(solved, expected, rtol=1e-6, atol=1e-7)
    one = Spectrum.from_rows(rows[0])
    assert torch.equal(one.values, few.values[0])
    assert torch.equal(one.vectors, few.vectors[0])


@pytest.mark.parametrize("shape", [(6, 6), (2, 6, 6)])
def test_decomposition_that_fails_is_done_in_another_way(shape, monkeypatch):
    rows = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = rows.mT @ rows
    expected = Spectrum.from_matrix(matrix)

    def failing(matrix):
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    monkeypatch.setattr("torch.linalg.eigh", failing)
    found = Spectrum.from_matrix(matrix)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.vectors @ (found.values[..., None] * found.vectors.mT), matrix)


def random_basis(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=generator)).Q


def spectrum_and_matrix(lead, n, kind):
    """A spectrum, and the matrices that it stands for."""
    n_values = {"partial": n // 2, "small rest": n // 2, "few": n // 2, "nothing": 0}.get(kind, n)
    steps = torch.logspace(-2, 0, n_values, dtype=torch.float64)
    values = steps * torch.linspace(1, 2, max(1, lead)).double()[:, None]
    rest = {"partial": 0.003, "small rest": 1e-18, "few": 0.0, "nothing": 0.0}.get(kind)
    vectors = random_basis(max(1, lead), n, n)
    if kind == "diagonal":
        vectors = torch.eye(n, dtype=torch.float64).expand_as(vectors)
    all_values = torch.cat([values, values.new_full((len(values), n - n_values), rest or 0.0)], 1)
    dense = vectors @ torch.diag_embed(all_values) @ vectors.mT
    rests = None if rest is None else values.new_full((len(values),), rest)
    parts = values, None if kind == "diagonal" else vectors[..., :n_values], rests
    if not lead:
        parts = [None if part is None else part[0] for part in parts]
    return Spectrum(*parts), dense


CASES = list(
    itertools.product(
        ["exact", "partial", "diagonal"],
        ["exact", "partial", "small rest", "few", "nothing", "diagonal"],
        [0, 1, 3],
    )
)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("table", [2**18, 0])
@pytest.mark.parametrize("narrow", [0, 1e9])
@pytest.mark.parametrize("block", [2**20, 20])
def test_every_kind_of_spectra_against_dense_solve(monkeypatch, wide, table, narrow, block):
    """With and without a column elsewhere, kept tables, and blocks of columns."""
    monkeypatch.setattr(_spectrum, "_RANGE", 0 if wide else 1e9)
    monkeypatch.setattr(_spectrum, "_TABLE", table)
    monkeypatch.setattr(_spectrum, "_NARROW", narrow)
    monkeypatch.setattr(_spectrum, "block_size", lambda device: block)
    m, n = 6, 9
    for of_outputs, of_inputs, lead in CASES:
        output, left = spectrum_and_matrix(lead, m, of_outputs)
        inputs, right = spectrum_and_matrix(lead, n, of_inputs)
        shape = (lead, m, n) if lead else (m, n)
        matrix = torch.randn(shape, dtype=torch.float64)
        inverse = KroneckerInverse(output, inputs, ALPHA)
        rows = matrix.view(-1, m, n)
        dense = torch.stack([torch.kron(*pair) for pair in zip(left, right, strict=True)])
        dense += ALPHA * torch.eye(m * n, dtype=torch.float64)
        expected = torch.linalg.solve(dense, rows.reshape(len(rows), -1)).view(shape)
        case = f"{of_outputs} {of_inputs} {lead}"
        before = matrix.clone()
        torch.testing.assert_close(inverse(matrix), expected, msg=case)
        assert torch.equal(matrix, before)
        first, last = matrix[..., :-1].clone(), matrix[..., -1:].clone()
        inverse.solve_(first, last)
        torch.testing.assert_close(torch.cat([first, last], -1), expected, msg=case)


@pytest.mark.parametrize("rest", [0.0, 1e-4, 1e-7])
@pytest.mark.parametrize("of_outputs", [False, True])
@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 1e-8])
def test_accuracy_in_float32(alpha, rest, of_outputs):
    """In the norm of the curvature, which the errors of a wide range of eigenvalues dominate."""
    m, n, k = 40, 120, 60
    left, right = random_basis(m, m), random_basis(n, n)
    a = torch.logspace(-4, 0, m, dtype=torch.float64)
    b = torch.logspace(-3, 0, k, dtype=torch.float64)
    inputs = Spectrum(b.float(), right[:, :k].float(), torch.tensor(rest))
    spectra = Spectrum(a.float(), left.float()), inputs
    inverse = KroneckerInverse(*(reversed(spectra) if of_outputs else spectra), alpha)
    curvature = a[:, None] * torch.cat([b, b.new_full((n - k,), rest)]) + inverse.damping
    solution = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = (left @ (solution * curvature) @ right.T).float()
    exact = (left.T @ matrix.double() @ right) / curvature
    solved = (inverse(matrix.mT).mT if of_outputs else inverse(matrix)).double()
    error = (left.T @ solved @ right - exact) * curvature.sqrt()
    assert error.norm() < 3e-4 * (exact * curvature.sqrt()).norm()


class Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = {"alias", "expand", "select", "slice", "split_with_sizes", "t", "transpose", "view"}
        self.n += func.overloadpacket.__name__ not in views | {"_unsafe_view", "unsqueeze"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "bias", "n"),
    [("exact", False, 5), ("few", False, 5), ("few", True, 7), ("partial", False, 7)],
)
def test_operators_on_small_matrices(kind, bias, n):
    """Every one of them is a kernel on a GPU."""
    inverse = KroneckerInverse(
        *(spectrum_and_matrix(0, *s)[0] for s in ((6, "exact"), (9, kind))), 1
    )
    matrix = torch.randn(6, 9, dtype=torch.float64)
    parts = (matrix[:, :-1].clone(), matrix[:, -1:].clone()) if bias else (matrix,)
    with Operators() as operators:
        inverse.solve_(*parts)
    assert operators.n <= n
