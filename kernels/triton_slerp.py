"""Spherical linear interpolation in Triton: a row is read once, and its gradient written once.

`reference.py` has the formula and its three cases; there PyTorch runs some forty operations, each of which reads and
writes the whole (N, D) array. Here a program takes a few whole rows, and all between reading and writing happens in
registers. In NumPy's words, for a row:

    a, b = a / |a|, b / |b|
    theta = 2 * arctan2(|a - b|, |a + b|)
    out = sin((1 - t) * theta) / sin(theta) * a + sin(t * theta) / sin(theta) * b  =  α a + β b

Backward, g is the gradient that comes in, ∂loss/∂out. out = α a + β b depends on a in two ways: directly, with the
factor α, and through α and β, which depend on a and b only by c = cos θ = ⟨a, b⟩; ∂c/∂a = b and ∂c/∂b = a. So

    κ = ∂loss/∂c = ⟨g, a⟩ ∂α/∂c + ⟨g, b⟩ ∂β/∂c
    ∂loss/∂a = α g + κ b        ∂loss/∂b = β g + κ a        ∂loss/∂t = ⟨g, a⟩ ∂α/∂t + ⟨g, b⟩ ∂β/∂t

and normalization takes away the part along a and divides by the length (step 5 of `reference.py`).

    python kernels/triton_slerp.py       # without a GPU it runs in Triton's interpreter

Try changing this, in the line that sets PARALLEL here (without a GPU): with tl.constexpr(0.0) θ = 0 divides 0 by 0 and
gives nan; with 2.0 the series serves all angles, and θ = 1.5 comes out as 0.3526 instead of 0.375. In
`backward_kernel` leave `kappa[:, None] * unit_b` out of d_a: ∂a, and only it, is off by 2 %, the part that the
coefficients' own change contributes.
"""

import math
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
from kernels.triton_tiny import TINIEST

PARALLEL, OPPOSITE = tl.constexpr(reference.PARALLEL), tl.constexpr(reference.OPPOSITE)
PI = tl.constexpr(3.14159265358979)


@triton.jit
def load_unit(x, rows, d, N, D):
    """A block of rows as unit vectors, (BLOCK_N, BLOCK_D) float32, and their inverse lengths, 0 for a zero vector."""
    block = tl.load(x + rows[:, None] * D + d[None, :], (rows < N)[:, None] & (d < D)[None, :], other=0).to(tl.float32)
    square = tl.sum(block * block, 1)
    inverse = tl.where(square >= TINIEST, 1 / tl.sqrt(tl.maximum(square, TINIEST)), 0)
    return block * inverse[:, None], inverse


@triton.jit
def angle(difference, total):
    """2 · atan2(√difference, √total). Triton has no atan, so: atan x is a polynomial near 0 (Cephes' atanf), and larger
    arguments are brought there by atan x = π/2 − atan 1/x and atan x = π/4 + atan((x − 1)/(x + 1))."""
    u, v = tl.sqrt(difference), tl.sqrt(total)
    ratio = tl.minimum(u, v) / tl.maximum(u, v)
    large = ratio > 0.4142135623730950
    x = tl.where(large, (ratio - 1) / (ratio + 1), ratio)
    z = x * x
    atan = (((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1) * z * x + x
    atan += tl.where(large, PI / 4, 0.0)
    return 2 * tl.where(u > v, PI / 2 - atan, atan)


@triton.jit
def coefficients(a, b, t):
    """→ α, β; their derivatives by c = cos θ; by t; and whether the vectors are nearly opposite, where β is that of
    the direction `perpendicular`. All (BLOCK_N,)."""
    difference, total = tl.sum((a - b) * (a - b), 1), tl.sum((a + b) * (a + b), 1)  # 4 sin² θ/2, 4 cos² θ/2
    parallel = difference < PARALLEL * PARALLEL
    opposite = (total < OPPOSITE * OPPOSITE) & ~parallel  # two zero vectors are parallel
    regular = ~(parallel | opposite)

    # The formula. A row that is not regular takes θ = π/2 here, only so that nothing divides by zero.
    theta = tl.where(regular, angle(tl.where(regular, difference, 2.0), tl.where(regular, total, 2.0)), PI / 2)
    s = 1 - t
    sine, cosine = tl.sin(theta), tl.cos(theta)
    sine_s, cosine_s, sine_t, cosine_t = tl.sin(s * theta), tl.cos(s * theta), tl.sin(t * theta), tl.cos(t * theta)
    alpha, beta = sine_s / sine, sine_t / sine
    # By c: the quotient rule gives ∂α/∂θ = (s cos sθ − α cos θ) / sin θ, β likewise with t, and c = cos θ gives
    # ∂θ/∂c = −1 / sin θ. By t: only the numerators depend on it, through s = 1 − t and t.
    alpha_c, beta_c = (alpha * cosine - s * cosine_s) / (sine * sine), (beta * cosine - t * cosine_t) / (sine * sine)
    alpha_t, beta_t = -theta * cosine_s / sine, theta * cosine_t / sine

    # Nearly parallel: with q = difference = 2 − 2c ≈ θ² the series are β = t + (t − t³) q/6, and α the same in s, where
    # s (1 − s²) = s t (2 − t). By c: ∂q/∂c = −2, times (t − t³)/6. By t: 1 + (1 − 3t²) q/6, for α times ∂s/∂t = −1.
    square = tl.where(parallel, difference, 0.0)
    alpha = tl.where(parallel, s * (1 + t * (2 - t) * square / 6), alpha)
    beta = tl.where(parallel, t * (1 + (1 - t * t) * square / 6), beta)
    alpha_c = tl.where(parallel, -s * t * (2 - t) / 3, alpha_c)
    beta_c = tl.where(parallel, -t * (1 - t * t) / 3, beta_c)
    alpha_t = tl.where(parallel, -1 + (2 - 6 * t + 3 * t * t) * square / 6, alpha_t)
    beta_t = tl.where(parallel, 1 + (1 - 3 * t * t) * square / 6, beta_t)

    # Nearly opposite: a half circle, cos πt · a + sin πt · (a direction that is held fixed, so c has no influence).
    turn = t * PI
    alpha, beta = tl.where(opposite, tl.cos(turn), alpha), tl.where(opposite, tl.sin(turn), beta)
    alpha_c, beta_c = tl.where(opposite, 0.0, alpha_c), tl.where(opposite, 0.0, beta_c)
    alpha_t, beta_t = tl.where(opposite, -PI * tl.sin(turn), alpha_t), tl.where(opposite, PI * tl.cos(turn), beta_t)
    return alpha, beta, alpha_c, beta_c, alpha_t, beta_t, opposite


@triton.jit
def perpendicular(a, d, D):
    """The direction from a towards the coordinate axis that is most perpendicular to it."""
    axis = tl.argmin(tl.where((d < D)[None, :], tl.abs(a), float("inf")), 1)
    on_axis = d[None, :] == axis[:, None]
    along = tl.sum(tl.where(on_axis, a, 0.0), 1)
    direction = tl.where(on_axis, 1.0, 0.0) - along[:, None] * a
    square = tl.sum(direction * direction, 1)
    return direction / tl.sqrt(tl.where(square > 0, square, 1.0))[:, None]


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["N"])
def forward_kernel(a, b, t, out, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, d = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    unit_a, _ = load_unit(a, rows, d, N, D)
    unit_b, _ = load_unit(b, rows, d, N, D)
    alpha, beta, _, _, _, _, opposite = coefficients(unit_a, unit_b, tl.load(t + rows, rows < N, other=0))
    end = tl.where(opposite[:, None], perpendicular(unit_a, d, D), unit_b)
    value = alpha[:, None] * unit_a + beta[:, None] * end
    tl.store(
        out + rows[:, None] * D + d[None, :], value.to(out.dtype.element_ty), (rows < N)[:, None] & (d < D)[None, :]
    )


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["N"])
def backward_kernel(d_out, a, b, t, da, db, dt, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, d = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    place, exists = rows[:, None] * D + d[None, :], (rows < N)[:, None] & (d < D)[None, :]
    unit_a, inverse_a = load_unit(a, rows, d, N, D)
    unit_b, inverse_b = load_unit(b, rows, d, N, D)
    g = tl.load(d_out + place, exists, other=0).to(tl.float32)
    alpha, beta, alpha_c, beta_c, alpha_t, beta_t, opposite = coefficients(
        unit_a, unit_b, tl.load(t + rows, rows < N, other=0)
    )
    end = tl.where(opposite[:, None], perpendicular(unit_a, d, D), unit_b)
    g_a, g_step = tl.sum(g * unit_a, 1), tl.sum(g * (end - unit_a), 1)
    # ⟨g, a⟩ α_t + ⟨g, b⟩ β_t = ⟨g, a⟩ (α_t + β_t) + ⟨g, b − a⟩ β_t, and κ likewise. Of nearly parallel vectors ⟨g, a⟩
    # and ⟨g, b⟩ share most digits, and their difference would lose them; b − a, taken first, does not.
    tl.store(dt + rows, g_a * (alpha_t + beta_t) + g_step * beta_t, rows < N)

    kappa = g_a * (alpha_c + beta_c) + g_step * beta_c
    d_a = alpha[:, None] * g + kappa[:, None] * unit_b
    d_a = (d_a - tl.sum(d_a * unit_a, 1)[:, None] * unit_a) * inverse_a[:, None]
    tl.store(da + place, d_a.to(da.dtype.element_ty), exists)
    d_b = tl.where(opposite, 0.0, beta)[:, None] * g + kappa[:, None] * unit_a
    d_b = (d_b - tl.sum(d_b * unit_b, 1)[:, None] * unit_b) * inverse_b[:, None]
    tl.store(db + place, d_b.to(db.dtype.element_ty), exists)


# ---------------------------------------------------------------------------------------------------------------------
# Operators: `triton_contrastive.py` says what `custom_op` and its companions do.


def launch_shape(D):
    """About 1,024 entries a program, whole rows, so that a row's sums stay within one program."""
    block_d = max(16, triton.next_power_of_2(D))
    return {"BLOCK_N": max(1, 1024 // block_d), "BLOCK_D": block_d, "num_warps": 4}


@torch.library.custom_op("kernels::slerp_forward", mutates_args=())
def slerp_forward(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    a, b, t = a.contiguous(), b.contiguous(), t.contiguous()
    (N, D), shape = a.shape, launch_shape(a.shape[1])
    out = torch.empty_like(a)
    if N:
        with torch.cuda.device_of(a):
            forward_kernel[(triton.cdiv(N, shape["BLOCK_N"]),)](a, b, t, out, N, D, **shape)
    return out


@torch.library.custom_op("kernels::slerp_backward", mutates_args=())
def slerp_backward(grad: Tensor, a: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad, a, b, t = (tensor.contiguous() for tensor in (grad, a, b, t))
    (N, D), shape = a.shape, launch_shape(a.shape[1])
    da, db, dt = (torch.empty_like(tensor) for tensor in (a, b, t))
    if N:
        with torch.cuda.device_of(a):
            backward_kernel[(triton.cdiv(N, shape["BLOCK_N"]),)](grad, a, b, t, da, db, dt, N, D, **shape)
    return da, db, dt


@slerp_forward.register_fake
def _(a, b, t):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@slerp_backward.register_fake
def _(grad, a, b, t):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (a, b, t))


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    return slerp_backward(grad, *ctx.saved_tensors)


def refuse(ctx, *_):
    raise RuntimeError(
        "this slerp can't be differentiated twice; do not pass create_graph=True, or use kernels.reference"
    )


slerp_forward.register_autograd(backward, setup_context=save_for_backward)
slerp_backward.register_autograd(refuse)


def slerp(a, b, t):
    """As `kernels.reference.slerp`, on the GPU. a and b are float32, float16 or bfloat16; of two types, both are copied
    to one that holds both. Rows that are not contiguous are copied, and t, if it is a number, is copied to the GPU."""
    t = reference.check_slerp(a, b, t)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return slerp_forward(a.to(dtype), b.to(dtype), t.expand(a.shape[0]))


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"running {'on ' + torch.cuda.get_device_name() if device == 'cuda' else 'in the interpreter, on the CPU'}")
    print("from (1, 0) a quarter of the way to (cos θ, sin θ), in radians: slerp, exact, and by arccos of the cosine")
    for theta in (0.0, 1e-4, 0.1, 1.5, 3.0):
        a = torch.tensor([[1.0, 0.0]], device=device)
        b = torch.tensor([[math.cos(theta), math.sin(theta)]], device=device)
        x, y = slerp(a, b, 0.25)[0].tolist()
        naive = torch.arccos((a * b).sum()).item() / 4
        print(f"  θ = {theta:<6}  {math.atan2(y, x):.9f}  {theta / 4:.9f}  {naive:.9f}")
    torch.manual_seed(0)
    a, b = (torch.randn(100, 512, device=device, requires_grad=True) for _ in range(2))
    t = torch.rand(100, device=device, requires_grad=True)
    weight = torch.randn(100, 512, device=device)
    ours = torch.autograd.grad((slerp(a, b, t) * weight).sum(), (a, b, t))
    theirs = torch.autograd.grad((reference.slerp(a, b, t) * weight).sum(), (a, b, t))
    for name, x, y in zip("abt", ours, theirs, strict=True):
        print(f"100 × 512, ∂/∂{name}: relative distance to the plain version's {(x - y).norm() / y.norm():.1e}")


if __name__ == "__main__":
    main()
