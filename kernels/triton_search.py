"""Cosines of some queries with a large gallery, in Triton: the gallery is read once, as it is, and never copied.

In PyTorch the gallery would be converted to float32, normalized and multiplied; each step reads and writes all of it. A
program here has a block of queries and a block of gallery rows, and computes their products and the rows' lengths from
the same numbers, in one walk along the features:

    for rows in blocks of the gallery:
        out[:, rows] = queries @ gallery[rows].T / sqrt(sum(gallery[rows] ** 2))

`top_k` does so for as many rows at a time as SCORES allows, and keeps the best so far (`search.best_so_far`).
"""

import os
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # to be set before Triton is imported

import triton
import triton.language as tl

from kernels import search
from kernels.reference import unit
from kernels.triton_tiny import inverse_length

SCORES = 2**25  # cosines held at once: 128 MiB


@triton.jit(do_not_specialize=["Q", "N"], do_not_specialize_on_alignment=["Q", "N"])
def cosines_kernel(
    queries, gallery, out, Q, N, D,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """queries: (Q, D) of unit length, float32; gallery: (N, D); out: (Q, N) float32; all contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    query = tl.program_id(1).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_ok, query_ok = (rows < N)[None, :], (query < Q)[:, None]
    product, square = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(queries + query[:, None] * D + d[None, :], query_ok & (d < D)[None, :], other=0)
        b = tl.load(gallery + rows[None, :] * D + d[:, None], row_ok & (d < D)[:, None], other=0).to(tl.float32)
        product = tl.dot(a, b, product, input_precision=PRECISION)
        square += tl.sum(b * b, 0)
    cosines = product * inverse_length(square)[None, :]
    tl.store(out + query[:, None] * N + rows[None, :], cosines, query_ok & row_ok)


def search_shape(Q):
    """tl.dot takes no side below 16. triton_tiles.py explains "tf32x3"."""
    block_q = min(64, max(16, triton.next_power_of_2(Q)))
    options = {"PRECISION": "tf32x3", "num_warps": 8 if block_q == 64 else 4, "num_stages": 3}
    return {"BLOCK_Q": block_q, "BLOCK_N": 128 if block_q == 16 else 64, "BLOCK_D": 32, **options}


def cosines(queries, gallery):
    """(Q, D) of unit length, float32, and (n, D) of any length → (Q, n) float32."""
    (Q, D), n, shape = queries.shape, len(gallery), search_shape(len(queries))
    out = torch.empty(Q, n, device=gallery.device)
    grid = triton.cdiv(n, shape["BLOCK_N"]), triton.cdiv(Q, shape["BLOCK_Q"])
    cosines_kernel[grid](queries, gallery, out, Q, n, D, **shape)
    return out


@torch.no_grad()
def top_k(queries, gallery, k, unit_rows=False):
    """As `kernels.search.top_k`, on the GPU. The gallery is float32, float16 or bfloat16; only one whose rows are
    not contiguous is copied. Unit rows are measured all the same, which costs nothing here."""
    search.check_search(queries, gallery)
    queries, gallery = unit(queries.float()).contiguous(), gallery.contiguous()
    if not len(queries) or not len(gallery):
        return search.top_k(queries, gallery, k)
    step = max(1, SCORES // len(queries))
    with torch.cuda.device_of(gallery):
        return search.best_so_far(
            ((i, cosines(queries, gallery[i : i + step])) for i in range(0, len(gallery), step)), k
        )


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"running {'on ' + torch.cuda.get_device_name() if device == 'cuda' else 'in the interpreter, on the CPU'}")
    queries, gallery = torch.randn(3, 512, device=device), torch.randn(1000, 512, device=device).half()
    values, rows = top_k(queries, gallery, 4)
    for query, (own, plain) in enumerate(
        zip(rows.tolist(), search.top_k(queries, gallery, 4)[1].tolist(), strict=True)
    ):
        print(
            f"query {query}: the nearest of 1,000 are {own}, in plain PyTorch {plain}; cosines {values[query].tolist()}"
        )


if __name__ == "__main__":
    main()
