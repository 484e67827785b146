"""Top-k search in plain PyTorch: the gallery is read once, strip by strip, and never copied or compared all at once.

A strip is small enough to stay in the processor's cache while it is turned into float32 and multiplied. So a gallery in
float16, which is half as long to read, is searched faster than one in float32, although PyTorch multiplies matrices of
float16 slowly on a CPU. A matrix times a vector is fast, though. So a single query first looks for candidates that
way, and only these are compared exactly. `python tests/benchmarks/search.py` measures it.
"""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from kernels.reference import at_least_float32, inverse_norm, unit

STRIP = 2**19  # entries converted at once: 2 MiB of float32
ROUNDING = 1e-3  # a cosine of unit vectors in float16 is off by less: 2⁻¹¹ for the query's digits, 2⁻¹² for its own
MERGE = 64  # strips whose cosines are put together before the best are looked for


def best_so_far(parts, k):
    """Cosines of queries with one part of a gallery after another, each (Q, n) with the number of its first row → the k
    largest of all (Q, k), best first, and their rows (Q, k). Memory grows with Q·(n + k), not with the gallery."""
    best = None
    for first, cosines in parts:
        values, rows = cosines.topk(min(k, cosines.shape[1]))
        rows += first
        if best:
            values, rows = torch.cat([best[0], values], 1), torch.cat([best[1], rows], 1)
            values, places = values.topk(min(k, values.shape[1]))
            rows = rows.gather(1, places)
        best = values, rows
    return best


def check_search(queries, gallery):
    """Raises ValueError where shapes do not fit."""
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"expected (Q, D) and (N, D), got {tuple(queries.shape)} and {tuple(gallery.shape)}")


def cosines_of_strips(queries, gallery, unit_rows):
    """Yield the first row of a few strips and their cosines with unit queries, (Q, n)."""
    step = max(1, STRIP // max(queries.shape))
    for first in range(0, len(gallery), MERGE * step):
        some = gallery[first : first + MERGE * step]
        cosines = queries.new_empty(len(queries), len(some))
        for i in range(0, len(some), step):
            strip = at_least_float32(some[i : i + step]).to(queries.dtype)
            product = queries @ strip.T
            cosines[:, i : i + step] = product if unit_rows else product * inverse_norm(strip).T
        yield first, cosines


def candidates(query, gallery, k):
    """Unit query (1, D), gallery (N, D) of unit rows in float16 → the rows that may be among the k nearest (n,), a few
    more than k unless many are equally near."""
    rough = gallery @ query[0].half()  # (N,)
    kth = rough.topk(k).values[-1].float()
    return (~(rough < kth - 2 * ROUNDING)).nonzero()[:, 0]  # what is not a number is among them, so that it shows


@torch.no_grad()
def top_k(queries, gallery, k, unit_rows=False):
    """The k gallery rows most similar to each query, best first: (Q, D), (N, D) → cosines (Q, k), indices (Q, k).
    k is cut to N. The gallery is read once, strip by strip, and neither copied nor compared all at once. There are no
    gradients. unit_rows: its rows have unit length already, which saves time. Raises ValueError where the shapes do not
    fit."""
    check_search(queries, gallery)
    queries = unit(at_least_float32(queries))
    with torch.autocast(queries.device.type, enabled=False):
        nothing = queries.new_empty(len(queries), 0)
        single = unit_rows and len(queries) == 1 and 0 < k < len(gallery)
        if single and gallery.is_cpu and gallery.dtype == torch.float16:
            rows = candidates(queries, gallery, k)
            if len(rows) < len(gallery) / 4:
                values, places = best_so_far(cosines_of_strips(queries, gallery[rows], unit_rows), k)
                return values, rows[places]
        return best_so_far(cosines_of_strips(queries, gallery, unit_rows), k) or (nothing, nothing.long())


def main():
    gallery = torch.tensor([[0, 1.0, 0, 0], [1, 1, 0, 0], [3, 0, 0, 0]])
    values, indices = top_k(torch.eye(2, 4), gallery, 2)
    print(f"the two nearest of three to each of two queries {indices.tolist()}, cosines {values.tolist()}")


if __name__ == "__main__":
    main()
