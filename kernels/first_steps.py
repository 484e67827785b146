"""Triton from nothing, in four kernels, each after the loop that it replaces.

A *kernel* is a function that runs on the GPU. A launch starts many copies of it, called *programs*; how many is the
*grid*. Every program gets the same arguments, asks for its own number, and does its part of the work. A GPU has some
hundred processors (an H100 132), and each takes on a few programs at a time, in an order that nobody promises. So no
program may wait for another or build on what another one writes.

    the numbers    0  1  2  3 │ 4  5  6  7 │ 8  9  ·  ·      N = 10, in blocks of BLOCK = 4
    the program         0     │      1     │      2          grid = (3,); program 2 masks two places off

A program handles a whole block of numbers at once, as NumPy does; the compiler deals the block out to the GPU's
threads. `@triton.jit` marks a kernel, which is compiled at its first launch. If TRITON_INTERPRET=1 is in the
environment when Triton is imported, nothing is compiled: Triton's *interpreter* runs the programs on the CPU, one after
the other, with NumPy. That is slow, but it needs no GPU, and `print` works inside a kernel.

    python kernels/first_steps.py       # on the GPU if there is one, else in the interpreter

Try changing this (without a GPU): print(program, i, exists) in `add_kernel`. With BLOCK=2 in `add` five programs share
the work; 5 is refused, as a block's size must be a power of 2. With mask=d < BLOCK in `row_norm_kernel` the lengths
are too large: x is a slice, and the three numbers beside each row are counted too. Subtract 500 from S, and start
`maximum` in `row_logsumexp_kernel` at 0.0: every exponential underflows, and the result is -inf.
"""

import os

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # to be set before Triton is imported

import triton
import triton.language as tl

# --- 1. Vector addition: program, block, pointer, mask ---------------------------------------------------------------
#
#     for i in range(N):
#         out[i] = a[i] + b[i]
#
# A tensor reaches a kernel as a *pointer*, the address of its first number. Pointer + i is the address of number i;
# pointer + a block of indices is a block of addresses, and `tl.load` fetches them all. A block's size is fixed, and N
# need not be a multiple of it: where the *mask* is false, nothing is read or written. Without a mask, the last program
# would write over whatever lies behind `out`.
#
# `add_kernel[grid](…)` launches: grid is a tuple with the number of programs, and the arguments follow.
#
# BLOCK is a `tl.constexpr`, a number that is known when the kernel is compiled: the compiler must know how large a
# block is to lay it out. Each value of BLOCK is compiled to a kernel of its own.


@triton.jit
def add_kernel(a, b, out, owner, N, BLOCK: tl.constexpr):
    program = tl.program_id(0)  # its number along axis 0 of the grid: all that tells the programs apart
    i = program * BLOCK + tl.arange(0, BLOCK)  # our places
    exists = i < N
    total = tl.load(a + i, mask=exists) + tl.load(b + i, mask=exists)
    tl.store(out + i, total, mask=exists)
    tl.store(owner + i, program, mask=exists)  # only to show who did what


def add(a, b, BLOCK=4):
    """(N,), (N,), contiguous → a + b, and which program did which sum: (N,), (N,)."""
    out, owner = torch.empty_like(a), torch.empty(len(a), dtype=torch.int32, device=a.device)
    grid = (triton.cdiv(len(a), BLOCK),)  # cdiv divides and rounds up; a grid is a tuple of up to three numbers
    add_kernel[grid](a, b, out, owner, len(a), BLOCK)
    return out, owner


# --- 2. The length of each row: strides, `other`, warps and registers ------------------------------------------------
#
#     for row in range(N):
#         out[row] = sqrt(sum(x[row, d] ** 2 for d in range(D)))
#
# Memory is one long line. A *stride* is how far apart two neighbours lie on it: in a contiguous (N, D) tensor the next
# row is D numbers on, the next column 1. A kernel that is told the strides takes any layout, such as a slice of a
# larger tensor. Here each program has one row, in a block that is at least as large. The places beyond D would count in
# the sum, so the mask needs a partner: `other` is what they read as, and 0 adds nothing.
#
# The GPU runs threads in *warps*: 32 threads that do the same instruction at the same time, each on its own number.
# `num_warps` says how many warps share a program (4 unless told otherwise). With 4, a block of 1,024 numbers gives each
# of the 128 threads 8, which it holds in *registers*, the fastest memory there is. A thread has at most 255 of them. A
# kernel that needs more *spills*: it parks numbers in the GPU's memory and fetches them back, which is slow. Then
# smaller blocks help, or more warps.


@triton.jit
def row_norm_kernel(x, out, row_stride, column_stride, D, BLOCK: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * row_stride + d * column_stride, mask=d < D, other=0)
    tl.store(out + row, tl.sqrt(tl.sum(values * values)))  # one number; the warps' partial sums are added for us


def row_norm(x):
    """(N, D) → (N,): the length of each row."""
    N, D = x.shape
    out = torch.empty(N, device=x.device)
    row_norm_kernel[(N,)](x, out, x.stride(0), x.stride(1), D, BLOCK=triton.next_power_of_2(D), num_warps=4)
    return out


# --- 3. The logsumexp of each row: a loop inside a program -----------------------------------------------------------
#
#     for row in range(N):
#         maximum, total = -inf, 0
#         for column in range(M):                                         # the online softmax of reference.py
#             larger = max(maximum, S[row, column])
#             total = total * exp(maximum - larger) + exp(S[row, column] - larger)
#             maximum = larger
#         out[row] = maximum + log(total)
#
# A row may be too long for the registers, so a program walks along it, a block at a time. The running maximum and sum
# stay in registers: each number is read once, and one number a row is written. Here a kernel gains most. PyTorch, one
# operation after the other, would write exp(S − maximum) to memory and read it back. What does not exist reads as −∞,
# as exp(−∞) adds nothing.


@triton.jit
def row_logsumexp_kernel(S, out, row_stride, M, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    maximum, total = float("-inf"), 0.0
    for start in range(0, M, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(S + row * row_stride + column, mask=column < M, other=float("-inf"))
        larger = tl.maximum(maximum, tl.max(values))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(values - larger))
        maximum = larger
    tl.store(out + row, maximum + tl.log(total))


def row_logsumexp(S, BLOCK=16):
    """(N, M), its rows contiguous → (N,)."""
    out = torch.empty(len(S), device=S.device)
    row_logsumexp_kernel[(len(S),)](S, out, S.stride(0), S.shape[1], BLOCK)
    return out


# --- 4. A matrix product: two-dimensional tiles, shared memory, tensor cores -----------------------------------------
#
#     for i in range(N):
#         for j in range(M):
#             S[i, j] = sum(x[i, d] * y[j, d] for d in range(D))          # S = x yᵀ, as in the contrastive loss
#
# Now the grid has two dimensions, and a program computes a *tile* of S. `rows[:, None]` and `d[None, :]` broadcast to a
# block of addresses, as in NumPy. The program walks along D, and `tl.dot` multiplies two blocks and adds the product to
# the tile. It reads (BLOCK_N + BLOCK_M)·D numbers for 2·BLOCK_N·BLOCK_M·D operations. So large tiles read less, but
# they must fit into the registers.
#
# Every warp needs numbers that other warps have loaded, so the two blocks go through *shared memory*: fast memory of
# one processor, at most 163 KiB a program on an A100, 227 on an H100. `num_stages` is how many steps' blocks lie there:
# one step is multiplied while the next are on their way. They come from the *second-level cache*, which all processors
# share (50 MB on an H100), or else from the GPU's main memory, which is larger and slower.
#
# *Tensor cores* are units that multiply small matrices, some 15 times as fast as the ordinary units. They take 16-bit
# numbers. They take float32 only when it is rounded to *TF32*, with 10 digits after the binary point instead of 23.
# `tl.dot` does so by default; input_precision="ieee" asks for full float32, on the ordinary units. (The interpreter
# makes no difference between the two.) Which instructions a GPU has is its *compute capability*: an A100's is 8.0,
# written sm_80, an H100's sm_90.


@triton.jit
def matmul_kernel(x, y, S, N, M, D, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    # All three are contiguous, so their strides are D, D and M.
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(x + rows[:, None] * D + d[None, :], mask=(rows < N)[:, None] & (d < D)[None, :], other=0)
        b = tl.load(y + columns[None, :] * D + d[:, None], mask=(columns < M)[None, :] & (d < D)[:, None], other=0)
        tile = tl.dot(a, b, tile, input_precision="ieee")  # (BLOCK_N, BLOCK_D) @ (BLOCK_D, BLOCK_M)
    tl.store(S + rows[:, None] * M + columns[None, :], tile, mask=(rows < N)[:, None] & (columns < M)[None, :])


# Three things more that the real kernels use. A kernel may call other `@triton.jit` functions, which are compiled into
# it. It may read a global only if that is a `tl.constexpr`. `out.dtype.element_ty` is the type of the numbers that the
# pointer `out` points to; what is stored there is converted with `.to(…)`.


def matmul(x, y):
    """(N, D), (M, D), contiguous → x yᵀ (N, M) float32."""
    (N, D), M = x.shape, len(y)
    S = torch.empty(N, M, device=x.device)
    grid = (triton.cdiv(N, 32), triton.cdiv(M, 16))
    matmul_kernel[grid](x, y, S, N, M, D, BLOCK_N=32, BLOCK_M=16, BLOCK_D=32, num_warps=4, num_stages=2)
    return S


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"running {'on ' + torch.cuda.get_device_name() if device == 'cuda' else 'in the interpreter, on the CPU'}\n")
    a, b = torch.arange(10.0, device=device), torch.full((10,), 100.0, device=device)
    out, owner = add(a, b)
    print(f"1. sums           {[int(v) for v in out]}\n   by the program {'   '.join(str(int(v)) for v in owner)}")
    print(f"   PyTorch's: equal {torch.equal(out, a + b)}\n")

    x = torch.arange(1.0, 25, device=device).view(3, 8)[:, :5]
    print(
        f"2. x {tuple(x.shape)}, strides {x.stride()}: a program for each row, its block of 8 with 3 places masked off"
    )
    print(f"   lengths {row_norm(x).tolist()}\n   PyTorch {x.norm(dim=1).tolist()}\n")

    S = 100 * torch.randn(3, 50, device=device)
    print("3. S (3, 50): a program for each row, which takes 4 steps of 16 columns; the last one has 2")
    print(f"   logsumexp {row_logsumexp(S).tolist()}\n   PyTorch   {S.logsumexp(1).tolist()}\n")

    x, y = torch.randn(70, 100, device=device), torch.randn(40, 100, device=device)
    S = matmul(x, y)
    print("4. x (70, 100) times y (40, 100) transposed, a program for each tile of 32 × 16:")
    for i in range(triton.cdiv(70, 32)):
        tiles = "  ".join(f"({i}, {j})" for j in range(triton.cdiv(40, 16)))
        print(f"    {tiles}   rows {32 * i} to {min(32 * i + 31, 69)}")
    print(f"    largest difference to PyTorch {(S - x @ y.T).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
