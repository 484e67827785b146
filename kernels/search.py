"""Top-k search in plain PyTorch: the gallery is read once, strip by strip, and never copied or compared all at once."""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from kernels.reference import at_least_float32, strips, unit


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


@torch.no_grad()
def top_k(queries, gallery, k):
    """The k gallery rows most similar to each query, best first: (Q, D), (N, D) → cosines (Q, k), indices (Q, k).
    k is cut to N. The gallery is read once, strip by strip, and neither copied nor compared all at once. There are no
    gradients. Raises ValueError where the shapes do not fit."""
    check_search(queries, gallery)
    queries, longer = unit(at_least_float32(queries)), max(queries.shape)
    with torch.autocast(queries.device.type, enabled=False):
        parts = (
            (rows.start, queries @ unit(at_least_float32(gallery[rows])).T) for rows in strips(len(gallery), longer)
        )
        nothing = queries.new_empty(len(queries), 0)
        return best_so_far(parts, k) or (nothing, nothing.long())


def main():
    gallery = torch.tensor([[0, 1.0, 0, 0], [1, 1, 0, 0], [3, 0, 0, 0]])
    values, indices = top_k(torch.eye(2, 4), gallery, 2)
    print(f"the two nearest of three to each of two queries {indices.tolist()}, cosines {values.tolist()}")


if __name__ == "__main__":
    main()
