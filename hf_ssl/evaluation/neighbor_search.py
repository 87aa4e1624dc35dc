# SPDX-License-Identifier: Apache-2.0
"""The nearest neighbors of feature vectors by exact search.

Where a CPU multiplies bfloat16 numbers fast, a rounded product finds candidates, and only their cosines are
computed in float32. A bound of the rounding errors guarantees that no neighbor is missed.

Legend: M bank images, N queries, B queries in a chunk, D features, k neighbors, C candidates.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from hf_ssl.precision import fastest_precision
from hf_ssl.resources import processor_field

# A chunk of similarities takes 4 * 1024 * 65536 bytes = 256 MiB.
QUERY_CHUNK, BANK_CHUNK = 1024, 65536
_TIED_ROWS = 64  # whose similarities are copied at once
_GROUP = 8  # values whose maximum is compared first
_GROUPS_PER_NEIGHBOR = 3
_MOST_CANDIDATES = 1 / 64  # of the values; with more, the complete float32 product is faster
_WIDEST = 1 / 8  # of the bank: most candidates of one query, which determine the memory of all
_ROWS_AT_ONCE = 4096
_FEW_FEATURES = 16  # which are compared first
_FEWEST_PRODUCTS = 2**32  # M N D of the smallest search with rounded products
_FEWEST_IN_NUMPY = 2**33  # B M D of the smallest product by NumPy, which takes about 40 ms
_HALF_UNIT = torch.finfo(torch.bfloat16).eps / 2  # largest relative error of rounding to bfloat16


def nearest(bank: Tensor, queries: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and the bank rows of the nearest neighbors of each query, both (N, k), best first.

    Of bank rows with equal cosines, the lower one comes first.

    Args:
        bank: (M, D) float32, L2-normalized, with M >= neighbors.
        queries: (N, D) float32, L2-normalized.
        neighbors: k.
    """
    cosines, rows = zip(*nearest_in_chunks(bank, queries, neighbors), strict=True)
    return torch.cat(cosines), torch.cat(rows)


def nearest_others(rows_ND: Tensor, chosen_Q: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """Return `nearest` for some of the rows among all others, both (Q, k). No row is its own neighbor.

    Args:
        rows_ND: float32, L2-normalized, with N > neighbors.
        chosen_Q: row numbers of the queries.
        neighbors: k.
    """
    cosines, found = nearest(rows_ND, rows_ND[chosen_Q], neighbors + 1)
    own = found == chosen_Q[:, None]
    own[:, -1] |= ~own.any(dim=1)  # an image with many copies may not be among its own neighbors
    shape = (len(found), neighbors)
    return cosines[~own].view(shape), found[~own].view(shape)


def nearest_in_chunks(bank: Tensor, queries: Tensor, neighbors: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what `nearest` returns for chunks of queries, so that memory holds k neighbors of few queries."""
    parts = bank.chunk(-(-len(bank) // BANK_CHUNK))  # of equal size, so that no small one is left
    rounded = [_round(part) for part in parts] if _rounds(parts, queries, neighbors) else None
    copies = find_copies(bank, len(parts[0]))
    # All chunks share one buffer. New memory pages for each product would take a fifth of its time.
    buffer = queries.new_empty(min(QUERY_CHUNK, len(queries)) * _padded(len(parts[0])))
    for chunk in queries.split(QUERY_CHUNK):
        found = _search(chunk, parts, rounded, copies, neighbors, buffer)
        if found is None:  # the features are so similar that rounded products do not separate them
            rounded = None
            found = _search(chunk, parts, None, copies, neighbors, buffer)
        assert found is not None
        yield found


class Copies(NamedTuple):
    """The rows that are in the bank more than once.

    Attributes:
        rows: (U, D) the distinct rows.
        places: for each part of the bank, the columns (C,) of the copies, and their numbers (C,) in `rows`.
    """

    rows: Tensor
    places: list[tuple[Tensor, Tensor]]


def find_copies(bank: Tensor, part_size: int) -> Copies | None:
    """Return the rows that are in the bank more than once, or None if there are none.

    MKL 2024.2 (torch 2.14.1) can round the products of equal rows differently, at the edges of a table. The
    neighbors among copies of an image would then depend on their places.
    """
    suspects = _equal_sums(bank[:, :_FEW_FEATURES])
    suspects = suspects[_equal_sums(bank[suspects])] if len(suspects) else suspects
    if not len(suspects):
        return None
    rows, number = bank[suspects].unique(dim=0, return_inverse=True)
    ends = torch.arange(part_size, len(bank) + part_size, part_size, device=bank.device)
    sizes = torch.searchsorted(suspects, ends).diff(prepend=ends.new_zeros(1)).tolist()
    columns = (suspects % part_size).split(sizes)
    return Copies(rows, list(zip(columns, number.split(sizes), strict=True)))


def _equal_sums(rows: Tensor) -> Tensor:
    """Return the numbers of the rows whose weighted sum equals that of another row, as sums of copies do."""
    weights = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows.device)
    sums = torch.cat([(part * weights).sum(dim=1) for part in rows.chunk(-(-len(rows) // _ROWS_AT_ONCE))])
    _, number, count = sums.unique(return_inverse=True, return_counts=True)
    return (count[number] > 1).nonzero()[:, 0]


class _Rounded(NamedTuple):
    """A part of the bank minus its mean, which changes no order of neighbors, rounded to bfloat16.

    Attributes:
        rows: (M, D) bfloat16.
        norm: largest norm of the rows before and after rounding.
        error: largest norm of the rounding errors of a row.
    """

    rows: Tensor
    norm: float
    error: float


def _search(
    queries: Tensor,
    parts: Sequence[Tensor],
    rounded: list[_Rounded] | None,
    copies: Copies | None,
    neighbors: int,
    buffer: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Return the cosines and bank rows (B, k) of the neighbors, or None if there are too many candidates."""
    best = queries.new_empty(len(queries), 0)
    best_rows = torch.empty(len(queries), 0, device=queries.device).long()
    first = 0
    repeated = queries @ copies.rows.T if copies is not None and rounded is None else None
    for number, part in enumerate(parts):
        count = min(neighbors, len(part))
        found: tuple[Tensor, Tensor] | None
        if rounded is None:
            known = None
            if copies is not None and repeated is not None:
                columns, numbers = copies.places[number]
                known = columns, repeated[:, numbers]
            found = _largest_cosines(queries, part, known, count, buffer)
        else:
            found = _largest_of_candidates(queries, part, rounded[number], count, buffer)
        if found is None:
            return None
        best, best_rows = torch.cat([best, found[0]], dim=1), torch.cat([best_rows, found[1] + first], dim=1)
        if first > 0:
            best, rank = largest(best, min(neighbors, best.shape[1]))
            best_rows = best_rows.gather(1, rank)
        first += len(part)
    return best, best_rows


def _largest_cosines(
    queries: Tensor, bank: Tensor, known: tuple[Tensor, Tensor] | None, count: int, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the largest float32 cosines and their bank rows, both (B, count).

    Args:
        known: bank rows (C,) whose cosines (B, C) are known.
    """
    padded, cosines = _table(buffer, len(queries), len(bank))
    _multiply(queries, bank, cosines)
    if known is not None:
        cosines.index_copy_(1, *known)
    candidates = _candidates(padded, count, lambda bound: bound) if cosines.device.type == "cpu" else None
    found = None if candidates is None else _largest_in_rows(*candidates, cosines.shape, count)
    return largest(cosines, count) if found is None else found


def _rounds(parts: Sequence[Tensor], queries: Tensor, neighbors: int) -> bool:
    """Return whether rounded products are possible and save time."""
    rows = sum(len(part) for part in parts)
    return (
        queries.device.type == "cpu"
        and len(queries) * rows * queries.shape[1] >= _FEWEST_PRODUCTS
        and len(parts[-1]) >= _GROUP * _GROUPS_PER_NEIGHBOR * neighbors
        and fastest_precision("cpu").name == "bfloat16"
    )


def _round(bank: Tensor) -> _Rounded:
    rows, mean = torch.empty_like(bank, dtype=torch.bfloat16), bank.mean(dim=0)
    norm = error = 0.0
    for out, part in zip(rows.split(_ROWS_AT_ONCE), bank.split(_ROWS_AT_ONCE), strict=True):
        centered = part - mean
        near = out.copy_(centered).float()
        norm = max(norm, float(_norms(centered).max()), float(_norms(near).max()))
        error = max(error, float(_norms(centered - near).max()))
    return _Rounded(rows, norm, error)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _largest_of_candidates(
    queries: Tensor, bank: Tensor, rounded: _Rounded, count: int, buffer: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return the largest cosines and their bank rows, both (B, count), or None if it would take too long.

    The queries are q + e and the rows are b + f, where q and b are in bfloat16. The product of q and b
    differs from the exact product by at most E: |e| |b + f| + |q| |f|, plus the rounding of the sum.

    At least `count` products reach the bound after their rounding to bfloat16. The exact products of the
    neighbors thus reach the bound minus half a unit and minus E. The products of the neighbors before their
    rounding reach that value minus E. Rounding keeps the order of numbers, so the limit is rounded, too.
    """
    near = queries.bfloat16()
    norm = torch.maximum(_norms(queries), _norms(near.float()))
    error = _norms(queries - near.float()) * rounded.norm + norm * rounded.error
    error += queries.shape[1] * torch.finfo(torch.float32).eps * norm * (1 + rounded.norm)

    def limits(bound: Tensor) -> Tensor:
        bound = bound.float()
        return (bound - _HALF_UNIT * bound.abs() - 2 * error).bfloat16()

    padded, products = _table(buffer.view(torch.bfloat16), len(queries), len(bank))
    torch.mm(near, rounded.rows.T, out=products)
    candidates = _candidates(padded, count, limits)
    if candidates is None:
        return None
    _, rows, columns = candidates
    cosines = _cosines_of(queries, bank, rows, columns)
    return _largest_in_rows(cosines, rows, columns, products.shape, count)


def _padded(width: int) -> int:
    return -(-width // _GROUP) * _GROUP


def _table(buffer: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a table of whole groups, with -infinity after the columns, and its part (B, M), in a buffer."""
    table = buffer[: rows * _padded(columns)].view(rows, -1)
    table[:, columns:] = -torch.inf
    return table, table[:, :columns]


def _candidates(
    values: Tensor, count: int, limits: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return those of the values (B, M) that may be among the `count` largest of their row.

    Only groups of 8 values whose maximum is large enough are searched.

    Args:
        values: (B, M) with M a multiple of 8.
        count: at least this many values of a row reach the bound.
        limits: function of a bound (B, 1). It returns what a value must reach to be a candidate.

    Returns:
        The values, their rows and their columns, each (C,), ordered by rows only. None: there are too few
        values for groups, or too many candidates.
    """
    groups = values.unflatten(1, (_GROUP, -1))
    maxima = bounds = groups.amax(dim=1)
    if maxima.shape[1] < _GROUPS_PER_NEIGHBOR * count:
        return None
    # At least `count` values reach maximum number `count`. With fewer groups it is lower, but found faster.
    while (size := bounds.shape[1] // (_GROUPS_PER_NEIGHBOR * count)) > 1:
        bounds = bounds[:, : bounds.shape[1] // size * size].unflatten(1, (size, -1)).amax(dim=1)
    limit = limits(bounds.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True))
    rows, places = (maxima >= limit).nonzero(as_tuple=True)
    if len(rows) > _MOST_CANDIDATES * values.numel():
        return None
    searched = groups[rows, :, places]
    found, number = (searched >= limit[rows]).nonzero(as_tuple=True)
    if len(found) > _MOST_CANDIDATES * values.numel():
        return None
    return searched[found, number], rows[found], number * groups.shape[2] + places[found]


def _cosines_of(queries: Tensor, bank: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the float32 products (C,) of queries (B, D) and bank rows, both given by their numbers.

    Each product has the same order of additions, so copies of an image have equal cosines.
    """
    ends = torch.bincount(rows, minlength=len(queries)).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)  # torch 2.6 to 2.14: "in beta state"
        wanted = torch.sparse_csr_tensor(
            torch.cat([ends.new_zeros(1), ends]),
            columns,
            queries.new_zeros(len(columns)),
            (len(queries), len(bank)),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(wanted, queries, bank.T, beta=0).values()


def _largest_in_rows(
    values: Tensor, rows: Tensor, columns: Tensor, shape: Sequence[int], count: int
) -> tuple[Tensor, Tensor] | None:
    """Return the largest values and their columns, both (B, count), as `largest` does.

    None: a row has so many values that the table of all rows would need too much memory.

    Args:
        values, rows, columns: (C,), ordered by rows.
        shape: (B, M).
        count: each row has at least this many values.
    """
    height, width = shape
    sizes = torch.bincount(rows, minlength=height)
    if int(sizes.max()) > max(_WIDEST * width, count):
        return None
    place = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[rows]
    table = values.new_full((height, int(sizes.max())), -torch.inf)
    table[rows, place] = values
    numbers = columns.new_full(table.shape, torch.iinfo(columns.dtype).max)
    numbers[rows, place] = columns
    top, places = table.topk(min(count + 1, table.shape[1]), dim=1)
    found = numbers.gather(1, places[:, :count])
    tied = (top[:, 1:] == top[:, :-1]).any(dim=1).nonzero()[:, 0]
    if len(tied):  # `largest` needs their columns in order
        ordered, order = numbers[tied].sort(dim=1)
        top[tied, :count], places = largest(table[tied].gather(1, order), count)
        found[tied] = ordered.gather(1, places)
    return top[:, :count], found


def _multiply(queries: Tensor, bank: Tensor, out: Tensor) -> None:
    """Write the float32 product of queries (B, D) and the transposed bank (M, D) to `out` (B, M).

    On AMD processors, OpenBLAS (in NumPy) needs 15 % less time than MKL (in torch): 2.5 s instead of 2.9 s
    for 50,000 x 10,000 x 512 on two cores, with AVX2 and with AVX-512 (NumPy 2.4.6, torch 2.14.1). Its own
    threads wait actively for about 50 ms after a product, which would slow torch. So each of our threads
    calls it for a part of the bank. Starting them is slower than a small product.
    """
    in_numpy = queries.device.type == "cpu" and processor_field("vendor_id") == "AuthenticAMD"
    if in_numpy and queries.numel() * len(bank) >= _FEWEST_IN_NUMPY:
        threads = torch.get_num_threads()
        size = -(-len(bank) // threads)

        def multiply(first: int) -> None:
            rows = slice(first, first + size)
            np.matmul(queries.numpy(), bank[rows].T.numpy(), out=out[:, rows].numpy())

        with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
            list(pool.map(multiply, range(0, len(bank), size)))
    else:
        torch.mm(queries, bank.T, out=out)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of each row of (N, M) and their columns, both (N, count), largest first.

    Of equal values, the one in the lower column comes first. The choice and the order of equal values in
    `topk` are undefined. Only rows with equal values need further work.
    """
    wider = min(count + 1, values.shape[1])
    top, columns = values.topk(wider, dim=1)
    tied = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    if wider > count:
        tied = top[:, count] == top[:, count - 1]  # equal values on both sides of the end
        for rows in tied.nonzero()[:, 0].split(_TIED_ROWS):
            candidates = values[rows]
            columns[rows, :count] = chosen = _first_columns(candidates, top[rows, count - 1], count)
            top[rows, :count] = candidates.gather(1, chosen)
    top, columns = top[:, :count], columns[:, :count]
    tied |= (top[:, 1:] == top[:, :-1]).any(dim=1)
    rows = tied.nonzero()[:, 0]
    if len(rows):
        ascending, order = columns[rows].sort(dim=1)
        top[rows], rank = top[rows].gather(1, order).sort(dim=1, descending=True, stable=True)
        columns[rows] = ascending.gather(1, rank)
    return top, columns


def _first_columns(values: Tensor, smallest: Tensor, count: int) -> Tensor:
    """Return the columns (N, count) of the largest values, ascending; `smallest` (N,) is the last of them."""
    larger, equal = values > smallest[:, None], values == smallest[:, None]
    left = count - larger.sum(dim=1, keepdim=True)
    kept = larger | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= left))
    return kept.nonzero()[:, 1].view(len(values), count)
