"""The kernels in plain PyTorch: what they compute, and how to do it without an N×M matrix.

The contrastive loss is a ladder of three rungs. Running this file checks each against the one before:

    naive_loss         as anyone would write it: holds the N×M matrix, several times
    online_loss        the same over strips of rows; autograd does the backward, so it keeps every strip, and some more
    contrastive_loss   strips, and a gradient derived by hand: holds one strip at a time

                M texts
            ┌──────────────┐
            │ done, freed  │ → logsumexp of these rows
   N images ├──────────────┤
            │ strip in use │ → logsumexp of these rows: complete, as a strip holds whole rows
            ├──────────────┤
            │ to come      │
            └─↓──↓──↓──↓───┘ logsumexp of the columns: a running maximum and sum go from strip to strip

float16 and bfloat16 inputs are computed in float32, float64 stays float64. Gradients come back in the inputs' types.

Try changing this. In `online`, take a bound for the maximum: `new_max = torch.full_like(column_max, 100)`. The column
of a text that is opposite to all images underflows, and the loss is -inf. In `show_example`, give image 2 a label that
no text has, [0, 2, 1]: its row of G turns positive, so the loss pushes it away even from the text that it equals. In
CLIP's own loss k images of a text bring k copies of it: each is pulled to its own and pushed from the other k − 1.
"""

import math

import torch

CHUNK = 2**19  # entries of the similarity matrix held at once: 2 MB in float32, about a CPU core's own cache


def unit(x):
    """(…, D) → x / ‖x‖. A zero vector has no direction: it stays zero, and so does its gradient."""
    square = (x * x).sum(-1, keepdim=True)
    return torch.where(square > 0, x, 0) * torch.where(square > 0, square, 1).rsqrt()


def inverse_norm(x):
    """(…, D) → 1 / ‖x‖ (…, 1), 0 for a zero vector."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0)


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def as_tensor(value, dtype, device):
    """A number or a tensor → a tensor. A number is written on the device, as a copy there would wait for the GPU."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def strips(rows, columns):
    """Slices that cut the rows into strips of about CHUNK entries."""
    step = max(1, CHUNK // max(1, columns))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


# --- Rung 1: the definition ------------------------------------------------------------------------------------------
# N images x and M texts y, with unit vectors x̂ᵢ, ŷⱼ. Logits Sᵢⱼ = s·x̂ᵢ·ŷⱼ: cosines times a scale s. Pᵢⱼ is 1 where
# image i and text j have the same label (a "positive"), else 0. Row i asks: which text belongs to image i? Its loss is
# the cross entropy of a positive, −log softmax, averaged over the row's positives:
#
#     ℓᵢ = logsumexpⱼ Sᵢⱼ − (Σⱼ Pᵢⱼ Sᵢⱼ) / (Σⱼ Pᵢⱼ)
#
# The columns ask the same for each text. The loss is ½ (mean over rows + mean over columns); a row or column without a
# positive does not count. One softmax with one positive is InfoNCE (van den Oord et al., arXiv 1807.03748); rows and
# columns together are CLIP's loss (Radford et al., arXiv 2103.00020); many positives, averaged outside the logarithm,
# are L_out of SupCon (Khosla et al., arXiv 2004.11362). An example: s = ln 4, texts (1, 0, 0, 0) and (0, 1, 0, 0),
#
#     x                         P       exp S   softmax of rows   of columns    G = ∂loss/∂S
#     image 1: (2, 0, 0, 0)     1  0    4  1    0.8  0.2          0.4  0.25     -0.0583   0.0958   (G: rung 3)
#     image 2: (3, 0, 0, 0)     1  0    4  1    0.8  0.2          0.4  0.25     -0.0583   0.0958
#     image 3: (1, 1, 1, 1)     0  1    2  2    0.5  0.5          0.2  0.5       0.1333  -0.2083
#     rows: -ln 0.8, -ln 0.8, -ln 0.5   columns: -ln 0.4, -ln 0.5   loss = ½ (0.3798 + 0.8047) = 0.5923
def weights(count):
    """count: (N,), the positives of each row (or column). Returns weight (N,), ½ / rows that have a positive, 0 for the
    others, and share (N,), weight / count."""
    has_positive = (count > 0).to(count.dtype)
    weight = has_positive / (2 * has_positive.sum().clamp(min=1))
    return weight, weight / count.clamp(min=1)


def half_loss(lse, positive, count):
    """Of the rows, or of the columns: logsumexp (N,), sum of the positive logits (N,), number of positives (N,)."""
    return (weights(count)[0] * (lse - positive / count.clamp(min=1))).sum()


def naive_loss(x, y, scale, x_labels, y_labels):
    """(N, D), (M, D), scalar, (N,), (M,) → scalar."""
    S = scale * unit(x) @ unit(y).T  # (N, M)
    P = (x_labels[:, None] == y_labels).to(S.dtype)  # (N, M)
    return half_loss(S.logsumexp(1), (S * P).sum(1), P.sum(1)) + half_loss(S.logsumexp(0), (S * P).sum(0), P.sum(0))


# --- Rung 2: the online softmax --------------------------------------------------------------------------------------
# exp S overflows in float32 above S = 88.7, so log Σ exp S is computed as m + log Σ exp(S − m), with m the maximum.
# While strips come one by one, m is the maximum so far. When it grows to m′, the sum, in units of exp m, is converted:
#
#     m′ = max(m, S)        sum ← sum · exp(m − m′) + exp(S − m′)
#
#     S = ln 2:   m = ln 2   sum = 0 · exp(−∞) + 1 = 1
#     S = ln 8:   m = ln 8   sum = 1 · 2/8 + 1 = 1.25      the maximum grew, from units of 2 to units of 8
#     S = ln 4:   m = ln 8   sum = 1.25 · 1 + 4/8 = 1.75   it stayed
#     logsumexp = ln 8 + ln 1.75 = ln 14, and 2 + 8 + 4 = 14
#
# Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867).
def online(column_max, column_sum, S):
    """One step: running maximum and sum of M columns (M,), and a strip S (n, M) → the new maximum and sum."""
    # Any number may be taken out and the logsumexp stays: m is a constant for the gradient.
    new_max = torch.maximum(column_max, S.amax(0)).detach()
    return new_max, column_sum * (column_max - new_max).exp() + (S - new_max).exp_().sum(0)


def online_loss(x, y, scale, x_labels, y_labels):
    """As `naive_loss`. No step is larger than a strip, but autograd keeps what each step needs for its backward."""
    x, y = unit(x), unit(y)
    column_max, column_sum = y.new_full((len(y),), -torch.inf), y.new_zeros(len(y))
    column_positive, column_count, of_rows = 0, 0, []
    for rows in strips(len(x), len(y)):
        S = scale * x[rows] @ y.T  # (n, M)
        P = (x_labels[rows, None] == y_labels).to(S.dtype)
        of_rows.append((S.logsumexp(1), (S * P).sum(1), P.sum(1)))  # complete
        column_max, column_sum = online(column_max, column_sum, S)
        column_positive, column_count = column_positive + (S * P).sum(0), column_count + P.sum(0)
    row_lse, row_positive, row_count = (torch.cat(parts) for parts in zip(*of_rows, strict=True))
    column_lse = column_max + column_sum.log()
    return half_loss(row_lse, row_positive, row_count) + half_loss(column_lse, column_positive, column_count)


# --- Rung 3: the gradient by hand ------------------------------------------------------------------------------------
# 1. One row with k positives. The derivative of log Σ exp Sⱼ is exp Sⱼ / Σ exp, the softmax; of the positives' mean it
#    is 1/k for each. So ∂ℓ/∂Sⱼ = softmaxⱼ − Pⱼ/k: what the row believes, less what is true.
# 2. Row i has the weight wᵢ = ½ / (rows with a positive) in the loss, column j a vⱼ likewise. Sᵢⱼ stands in both, so
#    its gradient has a part from each (kᵢ and cⱼ are their numbers of positives; wᵢ/kᵢ and vⱼ/cⱼ are called shares):
#
#        Gᵢⱼ = ∂loss/∂Sᵢⱼ = wᵢ (softmax of row i − Pᵢⱼ/kᵢ) + vⱼ (softmax of column j − Pᵢⱼ/cⱼ)
#
#    In the example G₁₁ = ⅙ (0.8 − 1) + ¼ (0.4 − ½) = -0.0583. A softmax is exp(S − logsumexp), so forward only has to
#    keep one number for each row and column, and backward computes S again.
# 3. Sᵢⱼ = s·x̂ᵢ·ŷⱼ has the derivative s·ŷⱼ by x̂ᵢ, and all of row i depends on x̂ᵢ: the parts add up. ŷⱼ likewise:
#
#        ∂loss/∂x̂ᵢ = s Σⱼ Gᵢⱼ ŷⱼ = s (G ŷ)ᵢ        ∂loss/∂ŷⱼ = s (Gᵀ x̂)ⱼ
#
# 4. The derivative of Sᵢⱼ by s is x̂ᵢ·ŷⱼ, so ∂loss/∂s = Σᵢⱼ Gᵢⱼ x̂ᵢ·ŷⱼ = Σᵢ ⟨x̂ᵢ, ∂loss/∂x̂ᵢ⟩ / s: no further product.
# 5. x̂ = x/‖x‖. A step along x̂ changes nothing, a step across it turns x̂ by the step's length / ‖x‖; in one formula,
#    dx̂ = (dx − x̂ ⟨x̂, dx⟩)/‖x‖. This map is symmetric, so the gradient comes back through the same one:
#
#        ∂loss/∂x = (∂loss/∂x̂ − x̂ ⟨x̂, ∂loss/∂x̂⟩) / ‖x‖
# Backward costs three matrix products: S again, G ŷ and Gᵀ x̂. On many processors it may be four: one that walks along
# row i can add up (G ŷ)ᵢ in its registers, its fastest memory, but (Gᵀ x̂)ⱼ has parts from every walk. To add those up
# in registers, too, takes walks down the columns, which compute S once more.
def check_pairs(image_features, text_features, image_labels, text_labels):
    """Raises ValueError where shapes do not fit."""
    if image_features.dim() != 2 or text_features.dim() != 2 or image_features.shape[1] != text_features.shape[1]:
        raise ValueError(f"expected (N, D) and (M, D), got {tuple(image_features.shape)}, {tuple(text_features.shape)}")
    N, M = image_features.shape[0], text_features.shape[0]
    if (image_labels is None) != (text_labels is None):
        raise ValueError("give image_labels and text_labels, or neither")
    if image_labels is None and N != M:
        raise ValueError(f"without labels image i belongs to text i, but there are {N} images and {M} texts")
    if image_labels is not None and (image_labels.shape != (N,) or text_labels.shape != (M,)):
        raise ValueError(f"expected labels ({N},) and ({M},), got {image_labels.shape}, {text_labels.shape}")


def contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None):
    """Label-aware symmetric contrastive loss; with one positive in each row and column it is exactly CLIP's.

    image_features: (N, D), text_features: (M, D), of any length; they are normalized here.
    scale: s = exp(logit_scale), a number or a scalar tensor, which then gets a gradient.
    image_labels: (N,), text_labels: (M,) integers; equal ones are positives. Without them image i belongs to text i.
    Returns a scalar; rows and columns without a positive do not count, and the loss is 0 if there are none with one.
    Memory grows with the inputs, (N + M)·D, not as N·M. Not differentiable twice. Raises ValueError where the shapes or
    the labels do not fit together.
    """
    check_pairs(image_features, text_features, image_labels, text_labels)
    x, y = at_least_float32(image_features), at_least_float32(text_features)
    scale = as_tensor(scale, x.dtype, x.device)
    if not len(x) or not len(y):
        return 0 * (x.sum() + y.sum() + scale)
    if image_labels is None:  # image i and text i share label i
        image_labels = text_labels = torch.arange(len(x), device=x.device)
    with torch.autocast(x.device.type, enabled=False):  # at s = 100 a bfloat16 logit is off by up to 0.25
        return _ContrastiveLoss.apply(x, y, scale, image_labels, text_labels)


class _ContrastiveLoss(torch.autograd.Function):
    """Kept for backward: the features, and a few numbers for each row and column. x̂ and ŷ are `unit_x`, `unit_y`."""

    @staticmethod
    def forward(ctx, x, y, scale, x_labels, y_labels):
        x_inverse, y_inverse = inverse_norm(x), inverse_norm(y)  # (N, 1), (M, 1)
        unit_y = y * y_inverse
        row_lse, row_positive, row_count = (x.new_empty(len(x)) for _ in range(3))
        column_max, column_sum = x.new_full((len(y),), -torch.inf), x.new_zeros(len(y))
        column_positive, column_count = x.new_zeros(len(y)), x.new_zeros(len(y))
        for rows in strips(len(x), len(y)):
            S = (scale * (x[rows] * x_inverse[rows])) @ unit_y.T  # (n, M)
            P = x_labels[rows, None] == y_labels
            PS = S * P
            row_lse[rows], row_positive[rows], row_count[rows] = S.logsumexp(1), PS.sum(1), P.sum(1, dtype=x.dtype)
            column_positive += PS.sum(0)
            column_count += P.sum(0, dtype=x.dtype)
            column_max, column_sum = online(column_max, column_sum, S)
        column_lse = column_max + column_sum.log()
        of_rows, of_columns = (row_lse, *weights(row_count)), (column_lse, *weights(column_count))
        ctx.save_for_backward(x, y, scale, x_labels, y_labels, x_inverse, y_inverse, *of_rows, *of_columns)
        return half_loss(row_lse, row_positive, row_count) + half_loss(column_lse, column_positive, column_count)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True; autograd would take our gradient for a constant
            raise RuntimeError("contrastive_loss can't be differentiated twice; do not pass create_graph=True")
        x, y, scale, x_labels, y_labels, x_inverse, y_inverse, *of_rows_and_columns = ctx.saved_tensors
        row_lse, row_weight, row_share, column_lse, column_weight, column_share = of_rows_and_columns
        dx, dy, dscale = torch.empty_like(x), torch.zeros_like(y), torch.zeros_like(scale)
        with torch.autocast(x.device.type, enabled=False):  # backward may run within the user's
            unit_y = y * y_inverse
            for rows in strips(len(x), len(y)):
                unit_x = x[rows] * x_inverse[rows]
                S = (scale * unit_x) @ unit_y.T  # (n, M), the first product
                G = (S - row_lse[rows, None]).exp_().mul_(row_weight[rows, None])  # in place, on the new difference
                G += (S - column_lse).exp_().mul_(column_weight)
                G -= (row_share[rows, None] + column_share).mul_(x_labels[rows, None] == y_labels)
                G *= grad * scale  # step 3's s, and the gradient that comes in
                dx[rows] = G @ unit_y  # the second
                dy.addmm_(G.T, unit_x)  # the third
                dscale += through_normalization_(dx[rows], unit_x, x_inverse[rows])
            through_normalization_(dy, unit_y, y_inverse)
        return dx, dy, dscale / scale, None, None


def through_normalization_(gradient, unit_x, inverse):
    """Step 5: ∂loss/∂x̂ (n, D) becomes ∂loss/∂x, in place, as a copy of (M, D) would be large → Σᵢ ⟨x̂ᵢ, ∂loss/∂x̂ᵢ⟩."""
    along = torch.einsum("nd,nd->n", gradient, unit_x)
    gradient.addcmul_(unit_x, along[:, None], value=-1)
    gradient *= inverse
    return along.sum()


# --- Slerp: spherical linear interpolation ---------------------------------------------------------------------------
# With unit vectors â, b̂ at the angle θ,   slerp(a, b, t) = sin((1−t)θ)/sin θ · â + sin(tθ)/sin θ · b̂.
#
# It goes along the great circle, the shortest way on the sphere. Why not average and renormalize? At θ = 120° the
# quarters of that lie at 19°, 60° and 101°, slerp's at 30°, 60° and 90°: with random t, points would crowd at the ends.
# Why not θ = arccos(â·b̂)? The cosine, 1 − θ²/2, is flat at 0, and float32 has no number between 1 and 1 − 6e-8:
# for all θ below 2.4e-4 the cosine is 1, and so the angle 0; near π likewise. Of ‖â − b̂‖ = 2 sin θ/2 and ‖â + b̂‖ =
# 2 cos θ/2 one always changes as fast as θ/2 does, so θ = 2·atan2 of the two keeps every digit. Three cases:
#   nearly parallel   sin(tθ)/sin θ = t (1 + (1−t²)θ²/6) + O(θ⁴), and θ² = ‖â − b̂‖² + O(θ⁴): smooth, no division by 0.
#                     With 1−t in t's place, 1−t² becomes t(2−t)
#   nearly opposite   sin θ → 0, and b̂ no longer says which way round to go. Any great circle is right; we take the one
#                     through the coordinate axis that is most perpendicular to â, and hold that direction fixed in the
#                     gradient, so that it stays finite
#   else              the formula

PARALLEL = 1e-2  # radians; the series' next term is below 1e-9 here
OPPOSITE = 1e-3  # radians short of π; closer, float32 can't tell the great circle from rounding


def check_slerp(a, b, t):
    """→ t as a tensor (1,) or (N,). Raises ValueError where something does not fit."""
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"expected two (N, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    double = torch.float64 in (a.dtype, b.dtype)
    t = as_tensor(t, torch.float64 if double else torch.float32, a.device)
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, a.shape[0])):
        raise ValueError(f"expected t of shape () or ({len(a)},), got {tuple(t.shape)}")
    return t.reshape(-1)


def slerp(a, b, t):
    """Interpolate along the great circle from a to b: (N, D), (N, D), t a number, a scalar or (N,) → (N, D).

    t = 0 gives a / ‖a‖, t = 1 gives b / ‖b‖ (for nearly opposite vectors, the end of a half circle). The result has
    unit length, to within rounding, which grows as 1 / (π − θ). A zero vector has no direction: its term is zero.
    Differentiable in a, b and t. Raises ValueError where the shapes do not fit.
    Source: Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985).
    """
    t = check_slerp(a, b, t)[:, None]  # (1 or N, 1)
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = unit(at_least_float32(a)), unit(at_least_float32(b))
    difference, total = ((a - b) ** 2).sum(-1, keepdim=True), ((a + b) ** 2).sum(-1, keepdim=True)  # 4 sin², 4 cos² θ/2
    parallel, opposite = difference < PARALLEL**2, total < OPPOSITE**2
    regular = ~(parallel | opposite)
    # `where` inside and out: a branch not taken must not see values at which its gradient is infinite.
    theta = 2 * torch.atan2(torch.where(regular, difference, 1).sqrt(), torch.where(regular, total, 1).sqrt())
    formula = (((1 - t) * theta).sin() * a + (t * theta).sin() * b) / theta.sin()
    square = torch.where(parallel, difference, 0)
    series = (1 - t) * (1 + t * (2 - t) * square / 6) * a + t * (1 + (1 - t * t) * square / 6) * b

    with torch.no_grad():
        axis = torch.zeros_like(a).scatter_(-1, a.abs().argmin(-1, keepdim=True), 1)
        perpendicular = unit(axis - (axis * a).sum(-1, keepdim=True) * a)
    half_circle = (t * torch.pi).cos() * a + (t * torch.pi).sin() * perpendicular
    return torch.where(parallel, series, torch.where(opposite, half_circle, formula)).to(dtype)


def show_example():
    """The 3 × 2 case of rung 1; G by autograd."""
    x, y = torch.tensor([[2.0, 0, 0, 0], [3, 0, 0, 0], [1, 1, 1, 1]]), torch.eye(2, 4)
    S = (math.log(4) * unit(x) @ unit(y).T).requires_grad_()
    P = (torch.tensor([0, 0, 1])[:, None] == torch.arange(2)).float()
    loss = half_loss(S.logsumexp(1), (S * P).sum(1), P.sum(1)) + half_loss(S.logsumexp(0), (S * P).sum(0), P.sum(0))
    (G,) = torch.autograd.grad(loss, S)
    print("            P                exp S            row softmax      column softmax   G")
    for i, row in enumerate(torch.cat([P, S.exp(), S.softmax(1), S.softmax(0), G], 1).tolist()):
        print(f"image {i + 1} ", *(f"{round(v, 4):8g}" for v in row), sep="")
    print(f"loss {loss:.4f}\n")


def show_ladder():
    state = torch.full((1,), -torch.inf), torch.zeros(1)
    for value in (2.0, 8.0, 4.0):
        state = online(*state, torch.full((1, 1), math.log(value)))
        print(f"online softmax after ln {value:g}: maximum ln {state[0].exp().item():g}, sum {state[1].item():g}")
    direction, labels, classes = torch.randn(1, 64), torch.arange(3000) % 500, torch.arange(500)
    x, y = direction + 0.2 * torch.randn(3000, 64), torch.cat([-direction, direction + torch.randn(499, 64)])
    print("\n3,000 images, 500 texts, s = 100, one text opposite to all images. Gaps: relative, to the rung before")
    print("                        loss  gaps: loss  ∂x      ∂y      ∂s       numbers kept for backward")
    before = None
    for rung in (naive_loss, online_loss, contrastive_loss):
        inputs, kept = [v.clone().requires_grad_() for v in (x, y, torch.tensor(100.0))], []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, kept=kept: kept.append(v.numel()) or v, lambda v: v):
            loss = rung(*inputs, labels, classes)
        now = [loss.detach(), *torch.autograd.grad(loss, inputs)]
        gaps = [f"{(a - b).norm() / b.norm():.0e}" for a, b in zip(now, before or now, strict=True)]
        print(f"{rung.__name__:16} {loss:12.6f}  {'   '.join(gaps)} {sum(kept):12,}")
        before = now


def show_slerp():
    print("\nslerp: the angle θ between (1, 0) and (cos θ, sin θ) in float32, by arccos and by atan2")
    for theta in (1e-5, 1e-4, 3e-4, 1e-3, 1.0):
        a, b = torch.tensor([1.0, 0]), torch.tensor([math.cos(theta), math.sin(theta)])
        print(f"{theta:8g}  {(a @ b).arccos():.8f}  {2 * torch.atan2((a - b).norm(), (a + b).norm()):.8f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    show_example()
    show_ladder()
    show_slerp()
