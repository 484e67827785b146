"""Plain PyTorch versions of the kernels: what they compute, and how without a large matrix.

float16 and bfloat16 inputs are computed in float32, float64 stays float64. Gradients come back in the inputs' types.
"""

import torch

CHUNK = 2**19  # entries of the similarity matrix held at once: 2 MB in float32, about a second-level cache


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


# ---------------------------------------------------------------------------------------------------------------------
# Contrastive loss. With unit rows x̂ᵢ (N images) and ŷⱼ (M texts), logits Sᵢⱼ = s·x̂ᵢ·ŷⱼ and positives
# Pᵢⱼ = [image_labelᵢ = text_labelⱼ],
#
#     L(image→text) = mean over rows with a positive of   logsumexpⱼ Sᵢⱼ − (Σⱼ Pᵢⱼ Sᵢⱼ) / (Σⱼ Pᵢⱼ)
#     L(text→image) = the same over columns;   loss = ½ (both)
#
# The obvious code holds S, its two softmaxes and their gradients: N×M each. This one walks over strips of rows.
# Forward, a row's logsumexp is complete within its strip; a column's is carried along as a running maximum and a
# running sum, rescaled whenever the maximum grows ("online softmax"). Backward, each strip of S is computed again, with
#
#     Gᵢⱼ = ∂loss/∂Sᵢⱼ = ½ [ rᵢ (softmax over row i − Pᵢⱼ/positives of i)
#                          + cⱼ (softmax over column j − Pᵢⱼ/positives of j) ]
#
# (rᵢ = 1 / number of rows with a positive, 0 for a row without one; cⱼ likewise), and then
#
#     ∂loss/∂x̂ᵢ = s Σⱼ Gᵢⱼ ŷⱼ,    ∂loss/∂ŷⱼ = s Σᵢ Gᵢⱼ x̂ᵢ,    ∂loss/∂s = Σᵢⱼ Gᵢⱼ Sᵢⱼ / s = Σᵢ ⟨x̂ᵢ, ∂loss/∂x̂ᵢ⟩ / s,
#
# and, as making x longer changes nothing,  ∂loss/∂x = (∂loss/∂x̂ − x̂ ⟨x̂, ∂loss/∂x̂⟩) / ‖x‖.


def check_pairs(image_features, text_features, image_labels, text_labels):
    """→ the labels, where there are none those of pairs. Raises ValueError where something does not fit."""
    if image_features.dim() != 2 or text_features.dim() != 2 or image_features.shape[1] != text_features.shape[1]:
        raise ValueError(f"expected (N, D) and (M, D), got {tuple(image_features.shape)}, {tuple(text_features.shape)}")
    N, M = len(image_features), len(text_features)
    if (image_labels is None) != (text_labels is None):
        raise ValueError("give image_labels and text_labels, or neither")
    if image_labels is None:
        if N != M:
            raise ValueError(f"without labels image i belongs to text i, but there are {N} images and {M} texts")
        image_labels = text_labels = torch.arange(N, device=image_features.device)
    if image_labels.shape != (N,) or text_labels.shape != (M,):
        raise ValueError(f"expected labels ({N},) and ({M},), got {image_labels.shape}, {text_labels.shape}")
    return image_labels, text_labels


def contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None):
    """Label-aware symmetric contrastive loss; with one positive in each row and column it is exactly CLIP's.

    image_features: (N, D), text_features: (M, D), of any length; they are normalized here.
    scale: s = exp(logit_scale), a number or a scalar tensor, which then gets a gradient.
    image_labels: (N,), text_labels: (M,) integers; equal ones are positives. Without them image i belongs to text i.
    Returns a scalar; rows and columns without a positive do not count, and the loss is 0 if there are none with one.
    Memory grows with the inputs, (N + M)·D, not as N·M. Not differentiable twice.
    Raises ValueError where the shapes or the labels do not fit together.
    """
    image_labels, text_labels = check_pairs(image_features, text_features, image_labels, text_labels)
    x, y = at_least_float32(image_features), at_least_float32(text_features)
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    return _ContrastiveLoss.apply(x, y, scale, image_labels, text_labels)


class _ContrastiveLoss(torch.autograd.Function):
    """Only what is as small as the labels is kept for backward, beside the features themselves."""

    @staticmethod
    def forward(ctx, x, y, scale, x_labels, y_labels):
        with torch.autocast(x.device.type, enabled=False):  # at s = 100 a half-precision logit is off by up to 0.25
            return _ContrastiveLoss._forward(ctx, x, y, scale, x_labels, y_labels)

    @staticmethod
    def _forward(ctx, x, y, scale, x_labels, y_labels):
        x_inverse, y_inverse = inverse_norm(x), inverse_norm(y)  # (N, 1), (M, 1)
        unit_y = y * y_inverse
        column_max = x.new_full((len(y),), -torch.inf)
        column_sum = x.new_zeros(len(y))
        column_count, column_positive = x.new_zeros(len(y)), x.new_zeros(len(y))
        row_lse, row_count, row_positive = (x.new_empty(len(x)) for _ in range(3))
        for rows in _strips(len(x), len(y)):
            S = (scale * (x[rows] * x_inverse[rows])) @ unit_y.T
            P = x_labels[rows, None] == y_labels  # (rows, M)
            positive = S * P
            row_count[rows], row_positive[rows] = P.sum(1, dtype=x.dtype), positive.sum(1)
            column_count += P.sum(0, dtype=x.dtype)
            column_positive += positive.sum(0)
            row_lse[rows] = S.logsumexp(1)
            new_max = torch.maximum(column_max, S.amax(0))
            column_sum = column_sum * (column_max - new_max).exp() + S.sub_(new_max).exp_().sum(0)
            column_max = new_max
        column_lse = column_max + column_sum.log()

        def side(lse, count, positive):
            """Mean loss over the lines with a positive; each line's weight in it; its share for each positive."""
            weight = (count > 0).to(lse.dtype) / (count > 0).sum().clamp(min=1)
            count = count.clamp(min=1)
            return ((lse - positive / count) * weight).sum(), weight, weight / count

        row_loss, row_weight, row_share = side(row_lse, row_count, row_positive)
        column_loss, column_weight, column_share = side(column_lse, column_count, column_positive)
        ctx.save_for_backward(
            x, y, scale, x_labels, y_labels, x_inverse, y_inverse,
            row_lse, row_weight, row_share, column_lse, column_weight, column_share,
        )  # fmt: skip
        return (row_loss + column_loss) / 2

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True; autograd would take our gradient for a constant
            raise RuntimeError("contrastive_loss can't be differentiated twice; leave create_graph away")
        x, y, scale, x_labels, y_labels, x_inverse, y_inverse, *lines = ctx.saved_tensors
        row_lse, row_weight, row_share, column_lse, column_weight, column_share = lines
        dx, dy, dscale = torch.empty_like(x), torch.zeros_like(y), torch.zeros_like(scale)
        half = grad / 2 * scale

        def through_normalization(gradient, unit_x, inverse):
            """In place; → Σᵢ ⟨x̂ᵢ, ∂loss/∂x̂ᵢ⟩."""
            along = torch.einsum("nd,nd->n", gradient, unit_x)
            gradient.addcmul_(unit_x, along[:, None], value=-1).mul_(inverse)
            return along.sum()

        with torch.autocast(x.device.type, enabled=False):
            unit_y = y * y_inverse
            for rows in _strips(len(x), len(y)):
                unit_x = x[rows] * x_inverse[rows]
                S = (scale * unit_x) @ unit_y.T
                G = (S - row_lse[rows, None]).exp_().mul_(row_weight[rows, None])
                G += S.sub_(column_lse).exp_().mul_(column_weight)
                share = torch.add(row_share[rows, None], column_share, out=S)
                G -= share.mul_(x_labels[rows, None] == y_labels)
                G *= half
                dx[rows] = G @ unit_y
                dy.addmm_(G.T, unit_x)
                dscale += through_normalization(dx[rows], unit_x, x_inverse[rows])
            through_normalization(dy, unit_y, y_inverse)
        return dx, dy, dscale / scale, None, None


def _strips(rows, columns):
    step = max(1, CHUNK // max(1, columns))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


# ---------------------------------------------------------------------------------------------------------------------
# Spherical linear interpolation. With unit vectors â, b̂ at the angle θ,
#
#     slerp(a, b, t) = sin((1−t)θ)/sin θ · â + sin(tθ)/sin θ · b̂
#
# θ = 2·atan2(‖â − b̂‖, ‖â + b̂‖) stays exact where arccos(â·b̂) has lost every digit: near 0 and near π. Three cases:
#
#   nearly parallel   sin(tθ)/sin θ = t (1 + (1−t²)θ²/6) + O(θ⁴), and θ² = ‖â − b̂‖² + O(θ⁴): smooth, no division by 0
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
    t = torch.as_tensor(t, dtype=torch.float64 if double else torch.float32, device=a.device)
    if t.dim() > 1 or (t.dim() == 1 and len(t) not in (1, len(a))):
        raise ValueError(f"expected t of shape () or ({len(a)},), got {tuple(t.shape)}")
    return t.reshape(-1)


def slerp(a, b, t):
    """Interpolate along the great circle from a to b: (N, D), (N, D), t a number, a scalar or (N,) → (N, D).

    t = 0 gives a / ‖a‖, t = 1 gives b / ‖b‖ (for nearly opposite vectors, the end of a half circle). The result has
    unit length, to rounding / (π − θ); where a vector is zero and has no direction, its term is zero. Differentiable in
    a, b and t. Raises ValueError where the shapes do not fit.
    Source: Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985).
    """
    t = check_slerp(a, b, t)[:, None]  # (1 or N, 1)
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = unit(at_least_float32(a)), unit(at_least_float32(b))

    difference, total = ((a - b) ** 2).sum(-1, keepdim=True), ((a + b) ** 2).sum(-1, keepdim=True)  # 4 sin², 4 cos² θ/2
    parallel = difference < PARALLEL**2
    opposite = total < OPPOSITE**2
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


# ---------------------------------------------------------------------------------------------------------------------


def top_k(queries, gallery, k):
    """The k gallery rows most similar to each query, best first: (Q, D), (N, D) → cosines (Q, k), indices (Q, k).

    k is cut to N. Queries are taken in chunks, so memory does not grow with Q·N.
    """
    queries, gallery = unit(at_least_float32(queries)), unit(at_least_float32(gallery))
    k = min(k, len(gallery))
    with torch.autocast(queries.device.type, enabled=False):
        strips = [(queries[rows] @ gallery.T).topk(k) for rows in _strips(len(queries), len(gallery))]
    if not strips:
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device)
    return torch.cat([values for values, _ in strips]), torch.cat([indices for _, indices in strips])


def main():
    torch.manual_seed(0)
    x, y = torch.randn(6, 512, requires_grad=True), torch.randn(3, 512)
    labels, classes = torch.tensor([0, 0, 1, 1, 1, 2]), torch.arange(3)
    loss = contrastive_loss(x, y, 100.0, labels, classes)
    loss.backward()
    print(f"6 images of 3 classes, 3 texts: loss {loss:.3f}, ‖∂loss/∂image‖ {x.grad.norm():.3f}")
    a, b = torch.eye(2)
    for t in (0.0, 0.25, 0.5, 1.0):
        print(f"slerp((1, 0), (0, 1), {t}) = {slerp(a[None], b[None], t)[0].tolist()}")
    values, indices = top_k(y, x.detach(), 2)
    print(f"the 2 images nearest to each text: {indices.tolist()}, cosines {values.tolist()}")


if __name__ == "__main__":
    main()
