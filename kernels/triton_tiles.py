"""The contrastive loss in Triton where its matrix does not fit into one program: tiles, and never the whole matrix.

`triton_tiny.py` has the same for a few images and texts, and explains K. Here the matrix is cut into tiles, and every
tile is a program of its own:

                         M texts
              128 columns  128 columns    …
             ┌────────────┬────────────┬─────┐
    128 rows │ tile (0,0) │ tile (0,1) │  …  │ → row_part: from each tile a logsumexp of each of its rows
             ├────────────┼────────────┼─────┤
    128 rows │ tile (1,0) │ tile (1,1) │  …  │   positive_part: from each tile two sums, over its positives
             └────────────┴────────────┴─────┘
                   ↓            ↓               column_part: from each tile a logsumexp of each of its columns

(Tiles of float32 features are 64 × 64.) In NumPy's words, with the inverse lengths rx, ry, and with x_each, y_each, 1 /
number of a row's or a column's positives, all of which `measure_kernel` computes:

    for I, J in tiles:                                       # `statistics_kernel`; many at a time, in any order
        S = s * rx[I, None] * ry[J] * (x[I] @ y[J].T)        # stays in registers
        row_part[J, I], column_part[I, J] = logsumexp(S, axis=1), logsumexp(S, axis=0)
        positive_part[I, J] = sum(P * S * x_each[I, None]), sum(P * S * y_each[J])
    row_lse = logsumexp(row_part, axis=0)                    # `combine_kernel`; column_lse likewise
    loss = ½ (sum(row_lse) - sum(positive_part[…, 0])) / rows + ½ (the same of the columns)        # `loss_kernel`

Rows without a positive are left out of the sum and of the number of rows. The logsumexp of logsumexps is the logsumexp
of everything. Each is taken about its own maximum, so nothing under- or overflows, whatever the scale. Exponentials and
logarithms are to the base 2, as those are what a GPU has: S is multiplied by log₂ e beforehand, and eᵃ = 2^(a log₂ e).

For the gradient S is computed again, which is cheaper than to store it:

    G = ½ [(softmax of rows − P x_each) / rows + (softmax of columns − P y_each) / columns]

`gradient_kernel` writes K = rx s G ry for a strip of rows, at most STRIP entries or 128 rows. The library's matrix
products K y and Kᵀ x, as fast as the hardware goes, do most of the rest; `project_kernel` takes away the part along x̂.
The scale gets, by step 4 of `reference.py`, ∂loss/∂s = Σᵢ ⟨x̂ᵢ, (G ŷ)ᵢ⟩ = Σᵢ ⟨xᵢ, (K y)ᵢ⟩ / s. No program adds to what
another one wrote, so the same inputs give the same bits.

    python kernels/triton_tiles.py       # without a GPU it runs in Triton's interpreter

Try changing this (without a GPU). In `tile_shape` give float32 tiles of 32 × 16: ten programs instead of five, and the
same loss. Set STRIP = 1: K is made for 128 rows at a time, the same gradients. In `statistics_kernel` take of_row =
S: the 57 columns of a tile beyond the seventh count as texts of similarity 0, and the loss is 10.16 instead of 9.95.
"""

import functools
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

from kernels.triton_slerp import launch_shape
from kernels.triton_tiny import SIZES, compare_with_reference, inverse_length, same_label

STRIP = 2**27  # entries of K at once: 256 MiB in bfloat16, 512 in float32
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1e30)  # a logit that far below others counts as −∞: 2^(−FAR) is 0. But −∞ − (−∞) is no number

# i·D + d may exceed 2³¹ now. So a tile's first address is 64-bit; what is added to it is 32-bit, which is faster. Masks
# cost, too, where each entry needs its own. So rows past the last one are taken for copies of it, arrays that hold a
# number for each row are as long as whole tiles (`padded`), and so is K. What is computed for them is never used.


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def measure_kernel(x, labels, other_labels, inverse, each, copy, N, M, D, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr):
    """For a block of rows: 1 / length, 0 for a zero vector; 1 / number of the other side's rows with the same label, 0
    for none, and past the last row; and, if asked for, a copy in another type."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, exists = tl.minimum(rows, N - 1), rows < N
    square = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        place, in_row = row[:, None] * D + d[None, :], (d < D)[None, :]
        block = tl.load(x + place, in_row, other=0).to(tl.float32)
        square += block * block
        if copy is not None:
            tl.store(copy + place, block, exists[:, None] & in_row)
    tl.store(inverse + rows, inverse_length(tl.sum(square, 1)))

    if labels is None:
        tl.store(each + rows, tl.where(exists, 1.0, 0.0))
    else:
        label, same = tl.load(labels + row), tl.zeros((BLOCK_N, BLOCK), tl.int32)
        for start in range(0, M, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            other = tl.load(other_labels + columns, columns < M, other=0)
            same += (label[:, None] == other[None, :]) & (columns < M)[None, :]
        count = tl.where(exists, tl.sum(same, 1), 0)
        tl.store(each + rows, tl.where(count > 0, 1.0 / tl.maximum(count, 1), 0.0))


@triton.jit
def tile_numbers(N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which tile (i, j) this program computes. Programs that run at the same time should read the same features, while
    these are in the second-level cache. So they take eight rows of tiles at once, column by column."""
    down, across = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    group, within = tl.program_id(0) // (8 * across), tl.program_id(0) % (8 * across)
    height = tl.minimum(down - 8 * group, 8)
    return 8 * group + within % height, within // height


@triton.jit
def product_tile(
    x, y, i, j, N, M, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of x yᵀ, (BLOCK_N, BLOCK_M) float32. The features are multiplied as they came, and the product is
    scaled to unit lengths afterwards: unit vectors, rounded to 16 bits, would lose digits. EVEN: D is a multiple of
    BLOCK_D.

    Tensor cores take float32 rounded to TF32, with 10 of its 23 binary digits. "tf32x3" splits a number into its TF32
    value and what the rounding left, and adds three products of such parts: nearly full precision, several times as
    fast as "ieee" on the ordinary units. Numbers of 16 bits are multiplied as they are."""
    row = tl.minimum(tl.arange(0, BLOCK_N), N - i * BLOCK_N - 1)
    column = tl.minimum(tl.arange(0, BLOCK_M), M - j * BLOCK_M - 1)
    x, y = x + i.to(tl.int64) * BLOCK_N * D, y + j.to(tl.int64) * BLOCK_M * D
    xy = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        if EVEN:
            a, b = tl.load(x + row[:, None] * D + d[None, :]), tl.load(y + column[None, :] * D + d[:, None])
        else:
            a = tl.load(x + row[:, None] * D + d[None, :], (d < D)[None, :], other=0)
            b = tl.load(y + column[None, :] * D + d[:, None], (d < D)[:, None], other=0)
        xy = tl.dot(a, b, xy, input_precision="tf32x3")
    return xy


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def statistics_kernel(
    x, y, x_labels, y_labels, rx, ry, x_each, y_each, scale, row_part, column_part, positive_part, N, M, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile: what it adds to each row's and each column's logsumexp, and to the sums over positives."""
    i, j = tile_numbers(N, M, BLOCK_N, BLOCK_M)
    xy = product_tile(x, y, i, j, N, M, D, BLOCK_N, BLOCK_M, BLOCK_D, EVEN)
    rows, columns = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_M + tl.arange(0, BLOCK_M)
    of_row, of_column = tl.load(rx + rows, rows < N, other=0), tl.load(ry + columns, columns < M, other=0)
    S = xy * (of_row * tl.load(scale) * LOG2_E)[:, None] * of_column[None, :]  # 0 beyond the edges

    positive = tl.where(same_label(x_labels, y_labels, rows, columns, 0, N, M), S, 0.0)
    tile = 2 * (i.to(tl.int64) * tl.cdiv(M, BLOCK_M) + j)
    tl.store(positive_part + tile, tl.sum(positive * tl.load(x_each + rows)[:, None]))
    tl.store(positive_part + tile + 1, tl.sum(positive * tl.load(y_each + columns)[None, :]))

    of_row = S + tl.where(columns < M, 0.0, -FAR)[None, :]
    row_max = tl.max(of_row, 1)
    row_lse = row_max + tl.log2(tl.sum(tl.exp2(of_row - row_max[:, None]), 1))
    tl.store(row_part + j.to(tl.int64) * N + rows, row_lse, rows < N)
    of_column = S + tl.where(rows < N, 0.0, -FAR)[:, None]
    column_max = tl.max(of_column, 0)
    column_lse = column_max + tl.log2(tl.sum(tl.exp2(of_column - column_max[None, :]), 0))
    tl.store(column_part + i.to(tl.int64) * M + columns, column_lse, columns < M)


@triton.jit(do_not_specialize=["N", "TILES"], do_not_specialize_on_alignment=["N", "TILES"])
def combine_kernel(part, lse, N, TILES, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """(TILES, N) logsumexps to the base 2 → (N,), their logsumexp: the online softmax of `reference.py`."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    maximum, total = tl.full((BLOCK_N,), -FAR, tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, TILES, BLOCK_T):
        tile = (start + tl.arange(0, BLOCK_T))[:, None]
        value = tl.load(part + tile.to(tl.int64) * N + rows[None, :], (tile < TILES) & (rows < N)[None, :], other=-FAR)
        larger = tl.maximum(maximum, tl.max(value, 0))
        total = total * tl.exp2(maximum - larger) + tl.sum(tl.exp2(value - larger[None, :]), 0)
        maximum = larger
    tl.store(lse + rows, tl.where(rows < N, maximum + tl.log2(total), FAR))


@triton.jit
def sum_of_positive_rows(lse, each, N, BLOCK: tl.constexpr):
    """The sum of the logsumexps of rows that have a positive, and the number of these rows."""
    total, number = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        has_positive = tl.load(each + rows, rows < N, other=0) > 0
        total += tl.where(has_positive, tl.load(lse + rows, rows < N, other=0), 0.0)
        number += has_positive
    return tl.sum(total), tl.sum(number)


@triton.jit(do_not_specialize=["N", "M", "TILES"], do_not_specialize_on_alignment=["N", "M", "TILES"])
def loss_kernel(row_lse, column_lse, x_each, y_each, positive_part, loss, divisors, N, M, TILES, BLOCK: tl.constexpr):
    """One program: the loss, and how many rows and columns have a positive. The sums nearly cancel where the loss is
    small: double precision keeps what float32 left of them."""
    x_total, x_number = sum_of_positive_rows(row_lse, x_each, N, BLOCK)
    y_total, y_number = sum_of_positive_rows(column_lse, y_each, M, BLOCK)
    of_rows, of_columns = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, TILES, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        of_rows += tl.load(positive_part + 2 * tile, tile < TILES, other=0)
        of_columns += tl.load(positive_part + 2 * tile + 1, tile < TILES, other=0)
    x_mean = (x_total - tl.sum(of_rows)) / tl.maximum(x_number, 1)
    y_mean = (y_total - tl.sum(of_columns)) / tl.maximum(y_number, 1)
    tl.store(loss, (x_mean + y_mean) * 0.5 * LN_2)
    tl.store(divisors, 2.0 * tl.maximum(x_number, 1))
    tl.store(divisors + 1, 2.0 * tl.maximum(y_number, 1))


@triton.jit
def parts(lse, each, divisor, rows):
    """For rows or columns: what their softmax is multiplied by in G, and a positive; 0 for those without a positive."""
    each, factor = tl.load(each + rows), 1.0 / tl.load(divisor)
    return tl.load(lse + rows), tl.where(each > 0, factor, 0.0), each * factor


@triton.jit(do_not_specialize=[*SIZES, "first"], do_not_specialize_on_alignment=[*SIZES, "first"])
def gradient_kernel(
    x, y, x_labels, y_labels, rx, ry, x_each, y_each, row_lse, column_lse, divisors, scale, K, first, N, M, D, stride,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of K = s · G · rx · ry for a strip of rows; what is given of rows begins with the strip's first
    one, which is number `first` of all."""
    i, j = tile_numbers(N, M, BLOCK_N, BLOCK_M)
    xy = product_tile(x, y, i, j, N, M, D, BLOCK_N, BLOCK_M, BLOCK_D, EVEN)
    rows, columns = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_M + tl.arange(0, BLOCK_M)
    of_row, of_column = tl.load(rx + rows) * tl.load(scale), tl.load(ry + columns)
    S = xy * (of_row * LOG2_E)[:, None] * of_column[None, :]
    x_lse, x_weight, x_part = parts(row_lse, x_each, divisors, rows)
    y_lse, y_weight, y_part = parts(column_lse, y_each, divisors + 1, columns)
    P = same_label(x_labels, y_labels, rows, columns, first, N, M)
    G = x_weight[:, None] * tl.exp2(S - x_lse[:, None]) + y_weight[None, :] * tl.exp2(S - y_lse[None, :])
    G -= tl.where(P, x_part[:, None] + y_part[None, :], 0.0)
    K_tile = G * of_row[:, None] * of_column[None, :]
    place = K + i.to(tl.int64) * BLOCK_N * stride + j * BLOCK_M
    place += tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_M)[None, :]
    tl.store(place, K_tile)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["N"])
def project_kernel(product, x, rx, dx, along, scale, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """K y → ∂loss/∂x = K y − x̂ ⟨x̂, K y⟩, for a few whole rows; and, if asked for, ⟨x, K y⟩ / s, a row's part of the
    scale's gradient."""
    rows, d = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    place, exists = rows[:, None] * D + d[None, :], (rows < N)[:, None] & (d < D)[None, :]
    Ky, features = tl.load(product + place, exists, other=0), tl.load(x + place, exists, other=0).to(tl.float32)
    inner, inverse = tl.sum(Ky * features, 1), tl.load(rx + rows, rows < N, other=0)
    tl.store(dx + place, Ky - (inverse * inverse * inner)[:, None] * features, exists)
    if along is not None:
        tl.store(along + rows, inner / tl.load(scale), rows < N)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def tile_shape(dtype, capability, even):
    """Tile and launch options for a type and a compute capability; even: D is a multiple of 64. Larger tiles would
    spill. So do those of the H100 (9.0), whose accumulators take half of a thread's registers; but with 4 warps two of
    them fit into a processor, one multiplies while the other takes exponentials, and that gains more (LOG.md)."""
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3}
    block_m = 64 if capability[0] in (10, 11) else 128
    warps = 4 if capability[0] == 9 and even else 8
    return {"BLOCK_N": 128, "BLOCK_M": block_m, "BLOCK_D": 64, "num_warps": warps, "num_stages": 3}


def padded(size):
    """Up to whole tiles."""
    return 128 * triton.cdiv(size, 128)


def measure(x, labels, other_labels, M, dtype):
    """→ inverse lengths (N,), 1 / number of positives (N,), and the features in `dtype`."""
    N, D = x.shape
    inverse, each = (torch.empty(padded(N), dtype=torch.float32, device=x.device) for _ in range(2))
    copy = None if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    measure_kernel[(padded(N) // 16,)](x, labels, other_labels, inverse, each, copy, N, M, D, 16, 128)
    return inverse, each, x if copy is None else copy


def add_product(total, K, features):
    """total + K · features in float32, in one launch; total: None or a float32 matrix."""
    if K.dtype == torch.bfloat16 and K.is_cuda:
        wide = {"out_dtype": torch.float32}
    else:
        K, features, wide = K.float(), features.float(), {}
    return torch.mm(K, features, **wide) if total is None else torch.addmm(total, K, features, out=total, **wide)


def project(product, x, inverse, dx, along, scale):
    """K y, (n, D) → ∂loss/∂x into dx, and into `along`, if it is not None, what the scale's gradient sums up."""
    (N, D), shape = x.shape, launch_shape(x.shape[1])
    grid = (triton.cdiv(N, shape["BLOCK_N"]),)
    project_kernel[grid](product, x, inverse, dx, along, scale, N, D, **shape)


def tiled(x, y, scale, x_labels, y_labels, loss, dx, dy, dscale, wanted):
    """Fills the last four: six launches for the loss, six more for the gradients, four for each further strip."""
    (N, D), M = x.shape, y.shape[0]
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    shape = tile_shape(x.dtype, capability, even=D % 64 == 0)
    # K in bfloat16 even for float16 features: its entries, about 1 / (N·M), may lie below float16's range.
    dtype = torch.bfloat16 if x.dtype == torch.float16 and any(wanted) else x.dtype
    rx, x_each, x_factor = measure(x, x_labels, y_labels, M, dtype)
    ry, y_each, y_factor = measure(y, y_labels, x_labels, N, dtype)
    down, across = triton.cdiv(N, shape["BLOCK_N"]), triton.cdiv(M, shape["BLOCK_M"])
    row_part, column_part, positive_part = (rx.new_empty(size) for size in ((across, N), (down, M), (down, across, 2)))
    even = D % shape["BLOCK_D"] == 0
    statistics_kernel[(down * across,)](
        x, y, x_labels, y_labels, rx, ry, x_each, y_each, scale, row_part, column_part, positive_part, N, M, D,
        EVEN=even, **shape,
    )  # fmt: skip
    row_lse, column_lse, divisors = torch.empty_like(rx), torch.empty_like(ry), rx.new_empty(2)
    combine_kernel[(padded(N) // 64,)](row_part, row_lse, N, across, 64, 16)
    combine_kernel[(padded(M) // 64,)](column_part, column_lse, M, down, 64, 16)
    loss_kernel[(1,)](row_lse, column_lse, x_each, y_each, positive_part, loss, divisors, N, M, down * across, 1024)
    if not any(wanted):
        return
    along, Kx = rx.new_empty(N), None
    stride = across * shape["BLOCK_M"]
    strip = max(128, STRIP // stride // 128 * 128)
    K = torch.empty(min(strip, down * shape["BLOCK_N"]), stride, dtype=dtype, device=x.device)
    for first in range(0, N, strip):
        rows = slice(first, min(first + strip, N))
        count = rows.stop - first
        gradient_kernel[(triton.cdiv(count, shape["BLOCK_N"]) * across,)](
            x[rows], y, None if x_labels is None else x_labels[rows], y_labels, rx[first:], ry, x_each[first:],
            y_each, row_lse[first:], column_lse, divisors, scale, K, first, count, M, D, stride, EVEN=even, **shape,
        )  # fmt: skip
        used = K[:count, :M]
        if wanted[0] or wanted[2]:
            project(add_product(None, used, y_factor), x[rows], rx[first:], dx[rows], along[rows], scale)
        if wanted[1]:
            Kx = add_product(Kx, used.T, x_factor[rows])
    if wanted[1]:
        project(Kx, y, ry, dy, None, scale)
    if wanted[2]:
        torch.sum(along, 0, out=dscale)


def main():
    N, M, shape = 300, 7, tile_shape(torch.float32, (0, 0), even=True)
    compare_with_reference(functools.partial(tiled, wanted=[True] * 3), N, M)
    down, across = triton.cdiv(N, shape["BLOCK_N"]), triton.cdiv(M, shape["BLOCK_M"])
    print(f"{N} images and {M} texts: {down} × {across} tiles of {shape['BLOCK_N']} × {shape['BLOCK_M']}")


if __name__ == "__main__":
    main()
