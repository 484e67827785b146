"""The contrastive loss in Triton where its matrix fits into one program: the loss and its gradient on one screen.

`reference.py` defines the loss and derives its gradient, `first_steps.py` explains Triton. A training step compares
some 32 images with 7 to 20 texts. There the arithmetic takes next to no time, but each *launch* costs microseconds, and
PyTorch, operation by operation, needs about eighty. So with up to 64 images and 64 texts one program holds the whole
matrix in its registers, and one launch does everything: lengths, similarities S, both softmaxes, loss, and gradients.

    rx, ry = 1 / |x|, 1 / |y|
    S = s * rx[:, None] * ry * (x @ y.T)
    loss = sum(x_weight * (logsumexp(S, axis=1) - sum(P * S, axis=1) / x_count)) + the same of the columns
    G = x_weight[:, None] * (softmax of rows - P / x_count[:, None]) + y_weight * (softmax of columns - P / y_count)

x_count is the number of a row's positives, and x_weight is ½ / rows that have one, 0 for the others. The gradients are
steps 2 to 5 of `reference.py`. Unit vectors are not stored. With ŷ = ry y, row by row, ∂loss/∂x̂ = s G ŷ = s G (ry y),
and all factors but y go into one matrix, which multiplies the features as they came:

    Kᵢⱼ = rxᵢ s Gᵢⱼ ryⱼ        rx ∂loss/∂x̂ = K y        ∂loss/∂x = rx (∂loss/∂x̂ − x̂ ⟨x̂, ∂loss/∂x̂⟩) = K y − x̂ ⟨x̂, K y⟩

So all that is left of the normalization is to take away the part along x̂. The texts get the same from Kᵀ x.

The gradient is computed in forward, along with the loss: S and both softmaxes are in the registers then. Backward only
multiplies it by the gradient that comes in. `triton_tiles.py` is the same for a matrix that does not fit.

    python kernels/triton_tiny.py       # without a GPU it runs in Triton's interpreter

Try changing this (without a GPU). Take `of_row = S`: the nine columns that the block of 16 has beyond the 7 texts count
as texts of similarity 0, and the loss is 7.64 instead of 7.53. In the line that stores dx leave out `along_x[:, None] *
a`: a step along x̂ changes nothing in the loss, but now has a gradient, and ∂loss/∂x is off by 8 %.
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

TINY = 64  # rows and columns of a matrix that one program holds
TINIEST = tl.constexpr(1.1754944e-38)  # float32's smallest number with all its digits
# Triton would compile once more for an N or M of 1, and for multiples of 16; these change from step to step.
SIZES = ["N", "M"]

# Every tensor is contiguous here, so entry (i, d) of an (N, D) one is at i·D + d.


@triton.jit
def inverse_length(square):
    """Σ x² → 1 / ‖x‖, 0 for a zero vector, and for one so short that the GPU takes its square for 0."""
    return tl.where(square >= TINIEST, tl.rsqrt(tl.maximum(square, TINIEST)), 0.0)


@triton.jit
def same_label(x_labels, y_labels, rows, columns, first, N, M):
    """P for some rows and columns, which need not exist. Without labels image i belongs to text i; row 0 is image
    `first`."""
    if x_labels is None:
        same = first + rows[:, None] == columns[None, :]
    else:
        x_label = tl.load(x_labels + rows, rows < N, other=0)
        y_label = tl.load(y_labels + columns, columns < M, other=0)
        same = x_label[:, None] == y_label[None, :]
    return same


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def tiny_kernel(
    x, y, x_labels, y_labels, scale, loss, dx, dy, dscale, N, M, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (N, D), y (M, D), labels (N,), (M,) or None, scale () → loss (), dx (N, D), dy (M, D), dscale (), float32."""
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    row_ok, column_ok, s = rows < N, columns < M, tl.load(scale)

    # x yᵀ and the lengths, in one walk along the features.
    xy = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    xx, yy = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(x + rows[:, None] * D + d[None, :], row_ok[:, None] & (d < D)[None, :], other=0)
        b = tl.load(y + columns[None, :] * D + d[:, None], column_ok[None, :] & (d < D)[:, None], other=0)
        xy = tl.dot(a, b, xy, input_precision=PRECISION)
        xx += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
        yy += tl.sum(b.to(tl.float32) * b.to(tl.float32), 0)
    rx, ry = inverse_length(xx), inverse_length(yy)
    cosine = xy * rx[:, None] * ry[None, :]
    S = s * cosine

    # Both softmaxes. What does not exist counts as −∞: exp(−∞) adds nothing.
    of_row, of_column = tl.where(column_ok[None, :], S, float("-inf")), tl.where(row_ok[:, None], S, float("-inf"))
    row_max, column_max = tl.max(of_row, 1), tl.max(of_column, 0)
    row_exp, column_exp = tl.exp(of_row - row_max[:, None]), tl.exp(of_column - column_max[None, :])
    row_sum, column_sum = tl.sum(row_exp, 1), tl.sum(column_exp, 0)

    # Positives, their number, each row's and column's weight in the loss (0 without a positive), and the loss.
    exists = row_ok[:, None] & column_ok[None, :]
    P = (same_label(x_labels, y_labels, rows, columns, 0, N, M) & exists).to(tl.float32)
    x_count, y_count = tl.sum(P, 1), tl.sum(P, 0)
    x_weight = (x_count > 0) * (0.5 / tl.maximum(tl.sum((x_count > 0).to(tl.float32)), 1))
    y_weight = (y_count > 0) * (0.5 / tl.maximum(tl.sum((y_count > 0).to(tl.float32)), 1))
    x_count, y_count = tl.maximum(x_count, 1), tl.maximum(y_count, 1)
    row_loss = row_max + tl.log(row_sum) - tl.sum(P * S, 1) / x_count
    column_loss = column_max + tl.log(column_sum) - tl.sum(P * S, 0) / y_count
    tl.store(loss, tl.sum(x_weight * row_loss) + tl.sum(y_weight * column_loss))

    # G and K. x̂ ⟨x̂, K y⟩ is x times rx² ⟨x, K y⟩, and ⟨xᵢ, (K y)ᵢ⟩ = Σⱼ Kᵢⱼ xᵢ·yⱼ needs no further product.
    G = x_weight[:, None] * (row_exp / row_sum[:, None] - P / x_count[:, None])
    G += y_weight[None, :] * (column_exp / column_sum[None, :] - P / y_count[None, :])
    tl.store(dscale, tl.sum(G * cosine))
    K = s * G * rx[:, None] * ry[None, :]
    along_x, along_y = rx * rx * tl.sum(K * xy, 1), ry * ry * tl.sum(K * xy, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_place, x_ok = rows[:, None] * D + d[None, :], row_ok[:, None] & (d < D)[None, :]
        y_place, y_ok = columns[:, None] * D + d[None, :], column_ok[:, None] & (d < D)[None, :]
        a, b = tl.load(x + x_place, x_ok, other=0).to(tl.float32), tl.load(y + y_place, y_ok, other=0).to(tl.float32)
        tl.store(dx + x_place, tl.dot(K, b, input_precision=PRECISION) - along_x[:, None] * a, x_ok)
        tl.store(dy + y_place, tl.dot(tl.trans(K), a, input_precision=PRECISION) - along_y[:, None] * b, y_ok)


def tiny_shape(N, M, dtype):
    """A block that holds the matrix; tl.dot takes no side below 16."""
    block_n, block_m = (max(16, triton.next_power_of_2(size)) for size in (N, M))
    entries = block_n * block_m
    # triton_tiles.py explains "tf32x3"; for a large block it takes more registers than there are. Beside 16-bit
    # features K, which is float32, is multiplied with TF32's 10 binary digits.
    precision = "tf32" if dtype != torch.float32 else "tf32x3" if entries <= 1024 else "ieee"
    depth = max(16, 32768 // max(512, entries))  # the larger the block, the fewer features at a time fit beside it
    options = {"num_warps": 4, "num_stages": 1} if entries <= 1024 else {"num_warps": 8, "num_stages": 2}
    options["BLOCK_D"] = depth
    return {"BLOCK_N": block_n, "BLOCK_M": block_m, "PRECISION": precision, **options}


def tiny(x, y, scale, x_labels, y_labels, loss, dx, dy, dscale):
    """One launch: fills the last four."""
    (N, D), M = x.shape, y.shape[0]
    tiny_kernel[(1,)](x, y, x_labels, y_labels, scale, loss, dx, dy, dscale, N, M, D, **tiny_shape(N, M, x.dtype))


def compare_with_reference(fill, N, M, D=512):
    """Print how far loss and gradients, as `fill` computes them, are from the reference in double precision."""
    from kernels import reference

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"running {'on ' + torch.cuda.get_device_name() if device == 'cuda' else 'in the interpreter, on the CPU'}")
    x, y = (torch.randn(n, D, device=device) for n in (N, M))
    scale = torch.tensor(100.0, device=device)
    labels = torch.arange(N, device=device) % M, torch.arange(M, device=device)
    loss, *gradients = torch.empty_like(scale), torch.empty_like(x), torch.empty_like(y), torch.empty_like(scale)
    fill(x, y, scale, *labels, loss, *gradients)
    exact_inputs = [v.double().requires_grad_() for v in (x, y, scale)]
    exact = reference.contrastive_loss(*exact_inputs, *labels)
    print(f"loss {loss:.6f}, in double precision {exact:.6f}")
    for name, ours, theirs in zip("xys", gradients, torch.autograd.grad(exact, exact_inputs), strict=True):
        print(f"∂loss/∂{name}: relative error {(ours - theirs).norm() / theirs.norm():.1e}")


if __name__ == "__main__":
    compare_with_reference(tiny, N=32, M=7)
    shape = tiny_shape(32, 7, torch.float32)
    print(f"32 images and 7 texts in one program, in a block of {shape['BLOCK_N']} × {shape['BLOCK_M']}")
