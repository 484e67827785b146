"""The contrastive loss in Triton: normalization, similarities and both softmaxes fused; the similarities are never
stored. Forward keeps a 32nd or less as many numbers, backward a matrix K of at most 2²⁵ entries at a time, or one row.

`reference.py` defines the loss and derives its gradient, `first_steps.py` explains Triton. The reference walks over
strips of rows, one after the other. Here the matrix is cut into tiles, and every tile is a program of its own:

                         M texts
               64 columns   64 columns    …
             ┌────────────┬────────────┬─────┐
     64 rows │ tile (0,0) │ tile (0,1) │  …  │ → row_part: from each tile a logsumexp of each of its rows
             ├────────────┼────────────┼─────┤
     64 rows │ tile (1,0) │ tile (1,1) │  …  │   positive_part: from each tile one sum, over its positives
             └────────────┴────────────┴─────┘
                   ↓            ↓               column_part: from each tile a logsumexp of each of its columns

(Tiles of 16-bit features have 128 rows.) In NumPy's words: rx, ry are the inverse lengths of the images and texts.
x_weight is 1 / number of images with a positive, and 0 for the other images; x_share is x_weight / positives of the
image. The same for the texts. (The weights of `reference.py` contain the loss's ½; here it comes at the end.)

    for I, J in tiles:                                               # a program each, many at a time, in any order
        S = s * rx[I, None] * ry[J] * (x[I] @ y[J].T)                # stays in registers
        row_part[J, I] = logsumexp(S, axis=1)                        # over this tile's columns
        column_part[I, J] = logsumexp(S, axis=0)                     # over this tile's rows
        positive_part[I, J] = sum(P * S * (x_share[I, None] + y_share[J]))
    row_lse, column_lse = logsumexp(row_part, axis=0), logsumexp(column_part, axis=0)
    loss = (sum(x_weight * row_lse) + sum(y_weight * column_lse) - sum(positive_part)) / 2

The logsumexp of logsumexps is the logsumexp of everything. Each is taken about its own maximum, so nothing under- or
overflows, whatever the scale.

Backward, S is computed again, which is cheaper than storing it. By steps 2, 3 and 5 of `reference.py`

    G = ½ [ x_weight exp(S − row_lse) + y_weight exp(S − column_lse) − P (x_share + y_share) ]
    ∂loss/∂x̂ = s G ŷ        ∂loss/∂x = rx (∂loss/∂x̂ − x̂ ⟨x̂, ∂loss/∂x̂⟩)

Unit vectors are not stored. With ŷ = ry y, row by row, the first term rx ∂loss/∂x̂ is rx s G (ry y). All factors but
the last go into one matrix, and that multiplies the features as they came:

    Kᵢⱼ = rxᵢ s Gᵢⱼ ryⱼ        rx ∂loss/∂x̂ = K y        ∂loss/∂x = K y − x̂ ⟨x̂, K y⟩

so all that is left of the normalization is to take away the part along x̂. The texts get the same from Kᵀ x, and the
scale, by step 4, ∂loss/∂s = Σᵢ ⟨x̂ᵢ, (G ŷ)ᵢ⟩ = Σᵢ ⟨xᵢ, (K y)ᵢ⟩ / s. A kernel writes K for a strip of rows, and the
library's matrix product, as fast as the hardware goes, does the rest. No program adds to what another one wrote, so the
same inputs give the same bits.

    python kernels/triton_contrastive.py       # without a GPU it runs in Triton's interpreter

Try changing this (without a GPU). In `tile_shape` give float32 tiles of 32 × 16: ten programs instead of five, three
times the memory for logsumexps at N = 32,768, the same loss. Set STRIP = 700: backward takes 100 rows at a time, the
same gradients. In `statistics_kernel` set of_row = S: the 57 columns beyond the seventh count as texts of similarity 0,
and the loss is 10.16 instead of 9.95. Make the features torch.randn(n, D).half().requires_grad_(): the gradients are
off by 4e-3, as K and the features are rounded to bfloat16 for the products.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # to be set before Triton is imported

import triton
import triton.language as tl

from kernels import reference

STRIP = 2**25  # entries of K that backward holds at once: 64 MiB in bfloat16, 128 in float32


def tile_shape(dtype):
    """Tile and launch options. float16 and bfloat16 are multiplied on tensor cores, float32 on the ordinary units, in
    full precision (Triton's default is TF32). A backward tile of 128 × 128 spills: it needs too many registers."""
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 128, "BLOCK_M": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Every tensor is contiguous here, so entry (i, d) of an (N, D) one is at i·D + d. That may exceed 2³¹, so
# program numbers are made 64-bit first. `other` is what entries beyond the matrix's edge read as.


@triton.jit
def measure_kernel(
    x, labels, other_labels, inverse_norm, positives, N, M, D, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr
):
    """For a block of rows: 1 / length, 0 for a zero vector, and how many of the other side have the same label."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        block = tl.load(x + rows[:, None] * D + d[None, :], row_ok[:, None] & (d < D)[None, :], other=0).to(tl.float32)
        square += tl.sum(block * block, 1)
    tl.store(inverse_norm + rows, tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1)), 0), row_ok)

    label, count = tl.load(labels + rows, row_ok, other=0), tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, M, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        other = tl.load(other_labels + columns, columns < M, other=0)
        same = (label[:, None] == other[None, :]) & (columns < M)[None, :]
        count += tl.sum(same.to(tl.int32), 1)
    tl.store(positives + rows, count, row_ok)


@triton.jit
def similarity(
    x, y, rx, ry, scale, rows, columns, N, M, D, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The tile S[rows, columns], (BLOCK_N, BLOCK_M) float32. The features are multiplied as they came, and the result
    is scaled to unit lengths: unit vectors, rounded to 16 bits, would lose digits that the features have."""
    S = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(x + rows[:, None] * D + d[None, :], (rows < N)[:, None] & (d < D)[None, :], other=0)
        b = tl.load(y + columns[None, :] * D + d[:, None], (columns < M)[None, :] & (d < D)[:, None], other=0)
        S = tl.dot(a, b, S, input_precision="ieee")
    S *= tl.load(rx + rows, rows < N, other=0)[:, None] * tl.load(scale)
    return S * tl.load(ry + columns, columns < M, other=0)[None, :]


@triton.jit
def positive_share(x_labels, y_labels, x_share, y_share, rows, columns, N, M):
    """P · (share of the row + share of the column) for a tile."""
    x_label, y_label = tl.load(x_labels + rows, rows < N, other=0), tl.load(y_labels + columns, columns < M, other=0)
    share = (
        tl.load(x_share + rows, rows < N, other=0)[:, None] + tl.load(y_share + columns, columns < M, other=0)[None, :]
    )
    same = (x_label[:, None] == y_label[None, :]) & (rows < N)[:, None] & (columns < M)[None, :]
    return tl.where(same, share, 0)


@triton.jit
def statistics_kernel(
    x, y, x_labels, y_labels, rx, ry, x_share, y_share, scale, row_part, column_part, positive_part, N, M, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Forward, one tile: what it adds to each row's and each column's logsumexp, and to the sum over positives."""
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_M + tl.arange(0, BLOCK_M)
    S = similarity(x, y, rx, ry, scale, rows, columns, N, M, D, BLOCK_N, BLOCK_M, BLOCK_D)

    of_row = tl.where((columns < M)[None, :], S, float("-inf"))  # what lies beyond the edge adds exp(−∞) = 0
    row_max = tl.max(of_row, 1)
    row_lse = row_max + tl.log(tl.sum(tl.exp(of_row - row_max[:, None]), 1))
    tl.store(row_part + j * N + rows, row_lse, rows < N)

    of_column = tl.where((rows < N)[:, None], S, float("-inf"))
    column_max = tl.max(of_column, 0)
    column_lse = column_max + tl.log(tl.sum(tl.exp(of_column - column_max[None, :]), 0))
    tl.store(column_part + i * M + columns, column_lse, columns < M)

    positive = S * positive_share(x_labels, y_labels, x_share, y_share, rows, columns, N, M)
    tl.store(positive_part + i * tl.num_programs(1) + j, tl.sum(positive))


@triton.jit
def gradient_kernel(
    x, y, x_labels, y_labels, rx, ry, x_share, y_share, x_weight, y_weight, row_lse, column_lse, scale, grad, K,
    first, N, M, D, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward, one tile of a strip that begins at row `first`: K = s · G · rx · ry, times the incoming gradient."""
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    local = i * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = first + local, j * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok, column_ok = rows < N, columns < M
    S = similarity(x, y, rx, ry, scale, rows, columns, N, M, D, BLOCK_N, BLOCK_M, BLOCK_D)

    G = tl.load(x_weight + rows, row_ok, other=0)[:, None] * tl.exp(
        S - tl.load(row_lse + rows, row_ok, other=0)[:, None]
    )
    lse = tl.load(column_lse + columns, column_ok, other=0)
    G += tl.load(y_weight + columns, column_ok, other=0)[None, :] * tl.exp(S - lse[None, :])
    G -= positive_share(x_labels, y_labels, x_share, y_share, rows, columns, N, M)
    G *= tl.load(rx + rows, row_ok, other=0)[:, None] * (0.5 * tl.load(scale) * tl.load(grad))
    G *= tl.load(ry + columns, column_ok, other=0)[None, :]
    tl.store(K + local[:, None] * M + columns[None, :], G.to(K.dtype.element_ty), row_ok[:, None] & column_ok[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Operators. `custom_op` makes a function an operator of PyTorch like any other: autograd and torch.compile take it as
# one step and do not look inside. For autograd an autograd.Function is one step, too; but torch.compile traces into its
# forward and backward, and must understand every launch in them, or break its graph in two there. `mutates_args=()`
# promises that it writes to none of its arguments, so the compiler may reorder and merge calls. `register_fake`, below,
# gives results of the right shape, type and strides without computing them. The compiler plans a whole step with such
# results; without them it cannot trace the call. Backward is named by `register_autograd`; its `setup_context` is
# called after forward and keeps what backward needs. train.py does not compile, so an autograd.Function as in
# reference.py would do for it.


def measure(x, labels, other_labels):
    """→ (3, N) float32: each row's inverse length, weight in the mean, and share of it for each positive."""
    N, D = x.shape
    inverse_norm, positives = (torch.empty(N, dtype=dtype, device=x.device) for dtype in (torch.float32, torch.int32))
    grid = (triton.cdiv(N, 32),)
    measure_kernel[grid](x, labels, other_labels, inverse_norm, positives, N, len(other_labels), D, 32, 128)
    weight = (positives > 0) / (positives > 0).sum().clamp(min=1)
    return torch.stack([inverse_norm, weight, weight / positives.clamp(min=1)])


@torch.library.custom_op("kernels::contrastive_forward", mutates_args=())
def contrastive_forward(
    x: Tensor, y: Tensor, scale: Tensor, x_labels: Tensor, y_labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """→ loss (); of the rows (4, N) and of the columns (4, M): inverse length, weight, share, logsumexp; float32."""
    x, y, x_labels, y_labels = (tensor.contiguous() for tensor in (x, y, x_labels, y_labels))
    (N, D), M = x.shape, len(y)
    of_rows, of_columns = measure(x, x_labels, y_labels), measure(y, y_labels, x_labels)
    (rx, x_weight, x_share), (ry, y_weight, y_share) = of_rows, of_columns
    shape = tile_shape(x.dtype)
    tiles = triton.cdiv(N, shape["BLOCK_N"]), triton.cdiv(M, shape["BLOCK_M"])
    row_part, column_part, positive_part = (rx.new_empty(size) for size in ((tiles[1], N), (tiles[0], M), tiles))
    statistics_kernel[tiles](
        x, y, x_labels, y_labels, rx, ry, x_share, y_share, scale, row_part, column_part, positive_part,
        N, M, D, **shape,
    )  # fmt: skip
    row_lse, column_lse = row_part.logsumexp(0), column_part.logsumexp(0)
    # The two sums nearly cancel where the loss is small: double precision keeps what float32 left of it.
    loss = (row_lse * x_weight).sum(dtype=torch.float64) + (column_lse * y_weight).sum(dtype=torch.float64)
    loss = (loss - positive_part.sum(dtype=torch.float64)) / 2
    return loss.float(), torch.cat([of_rows, row_lse[None]]), torch.cat([of_columns, column_lse[None]])


def through_normalization_(product, features, inverse_norm):
    """K y (n, D) float32 becomes ∂loss/∂x = K y − x̂ ⟨x̂, K y⟩, in place. Returns Σᵢ ⟨xᵢ, (K y)ᵢ⟩."""
    along = torch.einsum("nd,nd->n", features.float(), product)
    unit = features * inverse_norm[:, None]
    product.addcmul_(unit, (inverse_norm * along)[:, None], value=-1)
    return along.sum()


@torch.library.custom_op("kernels::contrastive_backward", mutates_args=())
def contrastive_backward(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, x_labels: Tensor, y_labels: Tensor,
    of_rows: Tensor, of_columns: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """→ gradients of x (N, D), y (M, D), in their type, and of scale ()."""
    x, y, x_labels, y_labels = (tensor.contiguous() for tensor in (x, y, x_labels, y_labels))
    (N, D), M = x.shape, len(y)
    (rx, x_weight, x_share, row_lse), (ry, y_weight, y_share, column_lse) = of_rows, of_columns
    shape = tile_shape(x.dtype)
    # K in bfloat16 even for float16 features: its entries, about 1 / (N·M), may lie below float16's range.
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    strip = max(1, STRIP // M)
    K = torch.empty(min(strip, N), M, dtype=dtype, device=x.device)
    x_factor, y_factor = x.to(dtype), y.to(dtype)
    dx, dscale = torch.empty_like(x), torch.zeros_like(scale)
    Kx = x.new_zeros(M, D, dtype=torch.float32)

    with torch.autocast(x.device.type, enabled=False):  # backward may run within the user's
        for first in range(0, N, strip):
            rows = slice(first, min(first + strip, N))
            count = rows.stop - first
            grid = triton.cdiv(count, shape["BLOCK_N"]), triton.cdiv(M, shape["BLOCK_M"])
            gradient_kernel[grid](
                x, y, x_labels, y_labels, rx, ry, x_share, y_share, x_weight, y_weight, row_lse, column_lse,
                scale, grad, K, first, rows.stop, M, D, **shape,
            )  # fmt: skip
            Kx += K[:count].T @ x_factor[rows]
            Ky = (K[:count] @ y_factor).float()
            dscale += through_normalization_(Ky, x[rows], rx[rows])
            dx[rows] = Ky
        through_normalization_(Kx, y, ry)
        return dx, Kx.to(y.dtype), dscale / scale


@contrastive_forward.register_fake
def _(x, y, scale, x_labels, y_labels):
    return tuple(x.new_empty(size, dtype=torch.float32) for size in ((), (4, len(x)), (4, len(y))))


@contrastive_backward.register_fake
def _(grad, x, y, scale, x_labels, y_labels, of_rows, of_columns):
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(())


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])


def backward(ctx, grad, *_):
    return *contrastive_backward(grad, *ctx.saved_tensors), None, None


def refuse(ctx, *_):
    raise RuntimeError("contrastive_loss can't be differentiated twice; do not pass create_graph=True")


contrastive_forward.register_autograd(backward, setup_context=save_for_backward)
contrastive_backward.register_autograd(refuse)


def contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None):
    """As `kernels.reference.contrastive_loss`, on the GPU, but for the memory that the page's first lines name. Both
    features are float32, float16 or bfloat16.

    What the inputs cost: features of two types are copied to a type that holds both; features that are not contiguous
    are copied in forward and again in backward; float16 features are copied to bfloat16 in backward, which keeps 7 of
    their 10 digits after the binary point; a scale that is a number is copied to the GPU. Triton compiles once for each
    type, and again when N, M or D changes between 1, multiples of 16, and the rest."""
    image_labels, text_labels = reference.check_pairs(image_features, text_features, image_labels, text_labels)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=image_features.device)
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    if dtype == torch.bfloat16 and not image_features.is_cuda:
        dtype = torch.float32  # Triton's interpreter (3.7) multiplies bfloat16's bit patterns as if they were integers
    return contrastive_forward(image_features.to(dtype), text_features.to(dtype), scale, image_labels, text_labels)[0]


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"running {'on ' + torch.cuda.get_device_name() if device == 'cuda' else 'in the interpreter, on the CPU'}")
    N, M, D = 300, 7, 512
    x, y = (torch.randn(n, D, device=device, requires_grad=True) for n in (N, M))
    scale = torch.tensor(100.0, device=device, requires_grad=True)
    labels = torch.arange(N, device=device) % M, torch.arange(M, device=device)
    shape = tile_shape(x.dtype)
    tiles = triton.cdiv(N, shape["BLOCK_N"]), triton.cdiv(M, shape["BLOCK_M"])
    size = f"{shape['BLOCK_N']} × {shape['BLOCK_M']}"
    print(f"{N} images and {M} texts of {D} dimensions: {tiles[0]} × {tiles[1]} tiles of {size}")

    loss = contrastive_loss(x, y, scale, *labels)
    gradients = torch.autograd.grad(loss, (x, y, scale))
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (x, y, scale)]
    exact = reference.contrastive_loss(*exact_inputs, *labels)
    print(f"loss {loss:.6f}, in double precision {exact:.6f}")
    for name, ours, theirs in zip("xys", gradients, torch.autograd.grad(exact, exact_inputs), strict=True):
        print(f"∂loss/∂{name}: relative error {(ours - theirs).norm() / theirs.norm():.1e}")
    N, mib, shape = 32768, 4 / 2**20, tile_shape(torch.float32)
    logsumexps = N * N / shape["BLOCK_M"] + N * N / shape["BLOCK_N"]
    print(f"{N:,} images and as many texts, all in float32: the similarities would take {N * N * mib:,.0f} MiB;")
    print(f"here the tiles' logsumexps take {logsumexps * mib:.0f} MiB, and K {STRIP * mib:.0f} MiB at a time")


if __name__ == "__main__":
    main()
