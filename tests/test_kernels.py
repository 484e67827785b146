"""kernels: contrastive loss, slerp and top-k against the plain formulas in float64, mpmath and a full sort."""

import math
import re
import subprocess
import sys
from pathlib import Path

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import contrastive_loss, reference, search, slerp, top_k

examples = settings(deadline=None, max_examples=50, derandomize=True)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_labels(classes, *sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(classes, (size,), generator=generator) for size in sizes]


def value_and_gradients(function, *inputs):
    """The function's value and its gradient in each tensor, at copies of them."""
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.elements = max([self.elements, *(r.numel() for r in results if isinstance(r, torch.Tensor))])
        return result


# --- contrastive loss ------------------------------------------------------------------------------------------------


def plain_loss(x, y, scale, image_labels=None, text_labels=None):
    """The definition, with the whole matrix, for autograd to differentiate."""
    S = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    P = torch.eye(len(x), dtype=torch.bool) if image_labels is None else image_labels[:, None] == text_labels
    sides = []
    for logits, positive in ((S, P), (S.T, P.T)):
        losses = [logit.logsumexp(0) - logit[p].mean() for logit, p in zip(logits, positive, strict=True) if p.any()]
        sides.append(torch.stack(losses).mean())
    return sum(sides) / 2


def both_losses(x, y, scale, labels=(), dtype=torch.float64):
    """[loss, ∂x, ∂y, ∂scale] of the kernel on inputs of the type, and of the plain formula on the same in float64."""
    x, y, scale = x.to(dtype), y.to(dtype), torch.tensor(scale, dtype=torch.float64)
    actual = value_and_gradients(lambda x, y, s: contrastive_loss(x, y, s, *labels), x, y, scale)
    expected = value_and_gradients(lambda x, y, s: plain_loss(x, y, s, *labels), x.double(), y.double(), scale)
    return actual, expected


def assert_close(actual, expected, tolerance=1e-6):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


LABELS = {
    "pairs": lambda: (24, 24, ()),
    "many positives": lambda: (30, 17, random_labels(3, 30, 17)),
    "one text a class": lambda: (40, 7, (random_labels(7, 40)[0], torch.arange(7))),
    "one positive": lambda: (9, 9, (torch.arange(9), torch.randperm(9, generator=torch.Generator().manual_seed(0)))),
    "some without a positive": lambda: (6, 5, (torch.tensor([0, 1, 9, 1, -4, 0]), torch.tensor([1, 7, 0, 0, 8]))),
    "all of one class": lambda: (11, 6, (torch.zeros(11).long(), torch.zeros(6).long())),
    "one image": lambda: (1, 8, (torch.tensor([2]), torch.arange(8) % 4)),
    "one text": lambda: (8, 1, (torch.arange(8) % 4, torch.tensor([2]))),
    "one pair": lambda: (1, 1, ()),
}


@pytest.fixture(params=[1, 50, 64, 2**21], ids=lambda entries: f"chunk{entries}")
def chunk(request, monkeypatch):
    """Strips of one row, of few rows that do not divide N, and all rows at once."""
    monkeypatch.setattr(reference, "CHUNK", request.param)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("case", LABELS)
def test_loss_and_gradients_are_the_plain_formulas(case, scale, chunk):
    N, M, labels = LABELS[case]()
    assert_close(*both_losses(randn(N, 16), randn(M, 16, seed=1), scale, labels))


SIZE = st.integers(1, 20)


@given(SIZE, SIZE, SIZE, SIZE, st.floats(1, 100), st.integers(1, 70), st.integers(0, 999))
@examples
def test_loss_and_gradients_at_any_shape(N, M, D, classes, scale, entries, seed):
    image_labels, text_labels = random_labels(classes, N, M, seed=seed)
    text_labels[0] = image_labels[0]  # at least one positive
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK", entries)
        x, y = randn(N, D, seed=seed), randn(M, D, seed=seed + 1)
        assert_close(*both_losses(x, y, scale, (image_labels, text_labels)))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("case", ["pairs", "many positives", "one text a class", "some without a positive"])
def test_float32_is_right_to_a_few_roundings(case, scale):
    N, M, labels = LABELS[case]()
    actual, expected = both_losses(randn(N, 64), randn(M, 64, seed=1), scale, labels, torch.float32)
    assert [v.dtype for v in actual] == [torch.float32] * 3 + [torch.float64]
    assert abs(actual[0].double() - expected[0]) < 5e-7 * (1 + expected[0])
    assert relative_error(actual[1], expected[1]) < 3e-6 and relative_error(actual[2], expected[2]) < 3e-6
    assert abs(actual[3] - expected[3]) < 1e-6  # a difference of cosines: the error does not shrink with it


def test_float32_loses_no_more_than_the_plain_formula_where_the_loss_is_nearly_zero():
    """There softmax − 1 cancels: the gradient, itself 1e-3 of its usual size, is right to 1e-4 only, in any float32."""
    x = randn(256, 64)
    y = x + 0.3 * randn(256, 64, seed=1)
    (loss, dx, dy, _), expected = both_losses(x, y, 14.3, (), torch.float32)
    plain = value_and_gradients(plain_loss, x.float(), y.float(), torch.tensor(14.3))
    assert 0 < loss < 0.01
    assert relative_error(dx, expected[1]) < 2 * relative_error(plain[1], expected[1]) < 1e-3
    assert relative_error(dy, expected[2]) < 2 * relative_error(plain[2], expected[2]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["pairs", "many positives", "one text a class"])
def test_half_inputs_are_computed_in_float32_and_get_half_gradients(case, dtype):
    N, M, labels = LABELS[case]()
    actual, expected = both_losses(randn(N, 32), randn(M, 32, seed=1), 100.0, labels, dtype)
    assert [v.dtype for v in actual] == [torch.float32, dtype, dtype, torch.float64]
    assert relative_error(actual[0], expected[0]) < 1e-6
    assert relative_error(actual[1], expected[1]) < 4e-3 and relative_error(actual[2], expected[2]) < 4e-3
    assert abs(actual[3] - expected[3]) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_with_one_positive_each_it_is_clips_own_loss(scale):
    clip_loss = pytest.importorskip("transformers.models.clip.modeling_clip").image_text_contrastive_loss
    x, y = randn(20, 32), randn(20, 32, seed=1)
    expected = clip_loss(scale * F.normalize(y, dim=1) @ F.normalize(x, dim=1).T)
    torch.testing.assert_close(contrastive_loss(x, y, scale), expected)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(contrastive_loss(x[order], y, scale, 5 * order, 5 * torch.arange(20)), expected)


def test_without_any_positive_loss_and_gradients_are_zero(chunk):
    x, y, scale = randn(7, 5), randn(4, 5), torch.tensor(10.0)
    labels = torch.zeros(7).long(), torch.ones(4).long()
    for result in value_and_gradients(lambda *inputs: contrastive_loss(*inputs, *labels), x, y, scale):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("last", [0.0, 2.8])
def test_the_running_maximum_follows_the_logits(last, ascending, chunk):
    """Images turn from opposite to the first text until they equal it, or until no logit of it is above −94: there
    exp(S − s), with the fixed maximum s, would underflow to 0 in float32."""
    angles = torch.linspace(math.pi, last, 40, dtype=torch.float64)
    angles = angles if ascending else angles.flip(0)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    y = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.02]], dtype=torch.float64)
    labels = torch.arange(40) % 3, torch.arange(3)
    assert_close(*both_losses(x, y, 100.0, labels))
    actual, expected = both_losses(x, y, 100.0, labels, torch.float32)
    assert relative_error(actual[0], expected[0]) < 1e-6
    assert relative_error(actual[1], expected[1]) < 1e-5 and relative_error(actual[2], expected[2]) < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rows_of_any_length_count_alike(dtype, tolerance):
    x, y, length = randn(8, 16, dtype=dtype), randn(8, 16, seed=1, dtype=dtype), 10.0 ** torch.arange(-8, 8).to(dtype)
    scale = torch.tensor(30.0)
    loss, dx, dy, dscale = value_and_gradients(contrastive_loss, x * length[:8, None], y * length[8:, None], scale)
    expected = value_and_gradients(contrastive_loss, x, y, scale)
    rescaled = [loss, dx * length[:8, None], dy * length[8:, None], dscale]
    for a, e in zip(rescaled, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def test_a_zero_vector_has_similarity_and_gradient_zero(chunk):
    x, y, labels = randn(6, 8), randn(5, 8, seed=1), random_labels(2, 6, 5)
    x[2], y[4] = 0, 0
    (loss, dx, dy, dscale), (plain, plain_dx, plain_dy, plain_dscale) = both_losses(x, y, 20.0, labels)
    assert not dx[2].any() and not dy[4].any()
    plain_dx[2], plain_dy[4] = 0, 0  # PyTorch's own normalize divides by 1e-12 there
    assert_close([loss, dx, dy, dscale], [plain, plain_dx, plain_dy, plain_dscale])


def test_duplicated_rows(chunk):
    x, y = randn(4, 8).repeat(3, 1), randn(4, 8, seed=1).repeat(2, 1)
    assert_close(*both_losses(x, y, 100.0, (torch.arange(12) % 4, torch.arange(8) % 4)))
    same = randn(1, 8).expand(5, 8)  # every feature in one point: chance level
    assert contrastive_loss(same, same, 100.0).item() == pytest.approx(math.log(5))


LAYOUTS = {
    "transposed": lambda v: v.T.contiguous().T,
    "strided": lambda v: v.repeat_interleave(3, 1)[:, ::3],
    "sliced": lambda v: F.pad(v, (5, 2))[:, 5:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_contiguous_inputs(layout, chunk):
    x, y, labels = randn(9, 6), randn(7, 6, seed=1), random_labels(3, 18, 14)
    labels = labels[0][::2], labels[1][::2]
    inputs = [LAYOUTS[layout](v).requires_grad_() for v in (x, y)]
    assert not any(v.is_contiguous() for v in (*inputs, *labels))
    loss = contrastive_loss(*inputs, 20.0, *labels)
    expected = value_and_gradients(lambda x, y: plain_loss(x, y, 20.0, *labels), x, y)
    assert_close([loss.detach(), *torch.autograd.grad(loss, inputs)], expected)


def test_scale_may_be_a_number_or_a_tensor_of_any_float_type():
    x, y = randn(6, 8, dtype=torch.float32), randn(6, 8, seed=1, dtype=torch.float32)
    expected = contrastive_loss(x, y, 50.0)
    assert torch.equal(contrastive_loss(x, y, 50), expected)
    for dtype in (torch.float16, torch.float32, torch.float64):
        scale = torch.tensor(50.0, dtype=dtype, requires_grad=True)
        loss = contrastive_loss(x, y, scale)
        loss.backward()
        assert torch.equal(loss, expected) and scale.grad.dtype == dtype and scale.grad != 0


def test_gradients_follow_the_incoming_one_and_frozen_features():
    x, y = randn(6, 8), randn(6, 8, seed=1)
    _, dx, dy = value_and_gradients(lambda x, y: contrastive_loss(x, y, 10.0), x, y)
    _, scaled, _ = value_and_gradients(lambda x, y: -3 * contrastive_loss(x, y, 10.0), x, y)
    _, text_only = value_and_gradients(lambda y: contrastive_loss(x, y, 10.0), y)
    assert_close([scaled, text_only], [-3 * dx, dy], 1e-12)


def test_the_same_inputs_give_the_same_bits():
    x, y, scale = randn(300, 64, dtype=torch.float32), randn(300, 64, seed=1, dtype=torch.float32), torch.tensor(100.0)
    first, second = (value_and_gradients(contrastive_loss, x, y, scale) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("squared", [False, True])  # the gradient that comes in is a constant, or a function of x
def test_differentiating_twice_is_an_error_not_a_wrong_number(squared):
    x, y = randn(4, 8).requires_grad_(), randn(4, 8, seed=1)
    with pytest.raises(RuntimeError, match="twice"):
        loss = contrastive_loss(x, y, 10.0)
        (dx,) = torch.autograd.grad(loss.square() if squared else loss, x, create_graph=True)
        dx.square().sum().backward()


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_changes_no_bit(backward_inside):
    x = randn(40, 32, dtype=torch.float32)
    y, scale = x + randn(40, 32, seed=1, dtype=torch.float32), torch.tensor(100.0)
    expected = value_and_gradients(contrastive_loss, x, y, scale)
    inputs = [v.clone().requires_grad_() for v in (x, y, scale)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(*inputs)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(v.grad, e) for v, e in zip(inputs, expected[1:], strict=True))


REFUSED = [
    ((4, 8), (4, 7), (), r"expected \(N, D\)"),
    ((8,), (8,), (), r"expected \(N, D\)"),
    ((2, 4, 8), (2, 4, 8), (), r"expected \(N, D\)"),
    ((4, 8), (3, 8), (), "4 images and 3 texts"),
    ((4, 8), (4, 8), (torch.arange(4), None), "or neither"),
    ((4, 8), (4, 8), (None, torch.arange(4)), "or neither"),
    ((4, 8), (3, 8), (torch.arange(3), torch.arange(3)), "expected labels"),
    ((4, 8), (3, 8), (torch.arange(4), torch.arange(4)), "expected labels"),
    ((4, 8), (3, 8), (torch.arange(4)[:, None], torch.arange(3)), "expected labels"),
]


@pytest.mark.parametrize("x, y, labels, message", REFUSED)
def test_loss_refuses_shapes_and_labels_that_do_not_fit(x, y, labels, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(torch.ones(x), torch.ones(y), 1.0, *labels)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("case", [case for case in LABELS if case not in ("pairs", "one pair")])
@pytest.mark.parametrize("rung", [reference.naive_loss, reference.online_loss])
def test_each_rung_of_the_ladder_is_the_plain_formula(rung, case, scale, chunk):
    N, M, labels = LABELS[case]()
    inputs = randn(N, 16), randn(M, 16, seed=1), torch.tensor(scale, dtype=torch.float64)
    actual = value_and_gradients(lambda *v: rung(*v, *labels), *inputs)
    assert_close(actual, value_and_gradients(lambda *v: plain_loss(*v, *labels), *inputs))


def test_only_the_gradient_by_hand_keeps_no_matrix_for_backward(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2**12)
    x, y, labels = randn(512, 16), randn(300, 16, seed=1), random_labels(5, 512, 300)
    kept = {}
    for rung in (reference.naive_loss, reference.online_loss, contrastive_loss):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, t=tensors: t.append(v.numel()) or v, lambda v: v):
            rung(x.clone().requires_grad_(), y, 10.0, *labels)
        kept[rung] = sum(tensors)
    assert kept[contrastive_loss] < 30 * (512 + 300)
    assert kept[reference.naive_loss] > 512 * 300 and kept[reference.online_loss] > 512 * 300


def test_the_worked_example_is_right_where_it_is_written_and_where_it_is_printed():
    """3 images, 2 texts: P, exp S, both softmaxes and G = ∂loss/∂S, by autograd; the numbers have at most 4 digits."""
    x = torch.tensor([[2, 0, 0, 0], [3, 0, 0, 0], [1, 1, 1, 1]]).double()
    labels, scale = (torch.tensor([0, 0, 1]), torch.arange(2)), math.log(4)
    S = (scale * F.normalize(x, dim=1) @ torch.eye(4, 2).double()).requires_grad_()
    P = (labels[0][:, None] == labels[1]).double()
    rows = (S.logsumexp(1) - (S * P).sum(1)).mean()
    columns = (S.logsumexp(0) - (S * P).sum(0) / torch.tensor([2, 1])).mean()
    (G,) = torch.autograd.grad((rows + columns) / 2, S)
    assert G[0, 0].item() == pytest.approx((0.8 - 1) / 6 + (0.4 - 0.5) / 4)  # as step 2 of the derivation writes it
    expected = torch.cat([P, S.exp(), S.softmax(1), S.softmax(0), G], 1).detach()
    loss = plain_loss(x, torch.eye(2, 4).double(), scale, *labels)

    path = Path(reference.__file__)
    printed = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True).stdout
    for text in (path.read_text(), printed):
        lines = re.findall(r"image \d:?(?: \([^)]*\))?((?: +-?[\d.]+){10})", text)
        assert len(lines) == 3
        numbers = torch.tensor([[float(number) for number in line.split()] for line in lines])
        torch.testing.assert_close(numbers, expected.float(), rtol=0, atol=5.1e-5)
        assert f"{loss:.4f}" in text
    assert f"½ ({rows:.4f} + {columns:.4f}) = {loss:.4f}" in path.read_text()


def test_the_online_softmax_takes_the_steps_that_are_written():
    state = torch.tensor([-math.inf]), torch.zeros(1)
    for value, maximum, total in ((2, 2, 1), (8, 8, 1.25), (4, 8, 1.75)):
        state = reference.online(*state, torch.tensor([[math.log(value)]]))
        torch.testing.assert_close(state[0].exp(), torch.tensor([float(maximum)]))
        torch.testing.assert_close(state[1], torch.tensor([float(total)]))
    assert (state[0] + state[1].log()).exp().item() == pytest.approx(14)


@pytest.mark.parametrize("loss, holds_the_matrix", [(contrastive_loss, False), (plain_loss, True)])
def test_no_tensor_is_as_large_as_the_similarity_matrix(loss, holds_the_matrix, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2**12)
    x, y, scale = (v.requires_grad_() for v in (randn(512, 16), randn(512, 16, seed=1), torch.tensor(10.0)))
    with LargestTensor() as forward:
        value = loss(x, y, scale)
    with LargestTensor() as backward:
        value.backward()
    for largest in (forward.elements, backward.elements):
        assert largest >= 512 * 512 if holds_the_matrix else largest <= 512 * 16


# --- slerp -----------------------------------------------------------------------------------------------------------


def exact_slerp(a, b, t):
    """One pair of vectors at 50 digits, from the same bits."""
    with mpmath.workdps(50):
        a, b = mpmath.matrix(a.tolist()), mpmath.matrix(b.tolist())
        a, b, t = a / mpmath.norm(a), b / mpmath.norm(b), mpmath.mpf(float(t))
        theta = 2 * mpmath.atan2(mpmath.norm(a - b), mpmath.norm(a + b))
        result = (mpmath.sin((1 - t) * theta) * a + mpmath.sin(t * theta) * b) / mpmath.sin(theta)
        return torch.tensor([float(v) for v in result], dtype=torch.float64)


def plain_slerp(a, b, t):
    """The formula for autograd to differentiate; good in float64 away from 0 and π."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    theta = 2 * torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True))
    t = t[:, None]
    return (((1 - t) * theta).sin() * a + (t * theta).sin() * b) / theta.sin()


def pairs_at(angle, N=5, D=8, dtype=torch.float64):
    """N pairs of vectors of different lengths at the angle from each other."""
    a, other = F.normalize(randn(N, D), dim=1), randn(N, D, seed=1)
    side = F.normalize(other - (other * a).sum(1, keepdim=True) * a, dim=1)
    b = math.cos(angle) * a + math.sin(angle) * side
    return (3 * a).to(dtype), (0.5 * b).to(dtype)


PARALLEL, OPPOSITE = reference.PARALLEL, reference.OPPOSITE
NEARLY_PARALLEL = [1e-8, 1e-6, 1e-4, 1e-3, 0.999 * PARALLEL, 1.001 * PARALLEL, 2 * PARALLEL]
NEARLY_OPPOSITE = [math.pi - gap for gap in (2 * OPPOSITE, 1.001 * OPPOSITE, 0.999 * OPPOSITE, 1e-4, 1e-6, 1e-8, 0)]
REGULAR = [0.1, 1.0, math.pi / 2, 2.5, 3.1]


@pytest.mark.parametrize("angle", NEARLY_PARALLEL + REGULAR + [math.pi - 1.001 * OPPOSITE])
def test_slerp_equals_the_formula_at_50_digits(angle):
    a, b = pairs_at(angle)
    t = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0]).double()
    expected = torch.stack([exact_slerp(*row) for row in zip(a, b, t, strict=True)])
    torch.testing.assert_close(slerp(a, b, t), expected, rtol=0, atol=1e-9)


@given(st.integers(1, 6), st.integers(2, 16), st.floats(-1, 2), st.integers(0, 999))
@examples
def test_slerp_equals_the_formula_at_any_shape(N, D, t, seed):
    a, b = randn(N, D, seed=seed), randn(N, D, seed=seed + 1)
    expected = torch.stack([exact_slerp(*row, t) for row in zip(a, b, strict=True)])
    torch.testing.assert_close(slerp(a, b, t), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(slerp(a.float(), b.float(), t), expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 5e-7)])
@pytest.mark.parametrize("angle", NEARLY_PARALLEL + REGULAR + NEARLY_OPPOSITE)
def test_slerp_has_unit_length(angle, dtype, tolerance):
    """Near π, a + b cancels: of float32 there remains rounding / (π − θ), 2e-4 where the half circle takes over."""
    a, b = pairs_at(angle, N=50, dtype=dtype)
    if dtype == torch.float32:
        tolerance /= min(1, max(math.pi - angle, OPPOSITE))
    for t in torch.linspace(0, 1, 9):
        assert (slerp(a, b, t).norm(dim=1) - 1).abs().max() < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("angle", NEARLY_PARALLEL + REGULAR + NEARLY_OPPOSITE)
def test_slerp_starts_at_a_and_ends_at_b(angle, dtype, tolerance):
    a, b = pairs_at(angle, dtype=dtype)
    torch.testing.assert_close(slerp(a, b, 0), F.normalize(a, dim=1), rtol=0, atol=tolerance)
    if angle > math.pi - OPPOSITE:  # the half circle ends at −a, no further from b than this
        tolerance += math.pi - angle
    torch.testing.assert_close(slerp(a, b, 1), F.normalize(b, dim=1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("angle", NEARLY_PARALLEL)
def test_slerp_moves_by_the_right_part_of_a_tiny_angle(angle, dtype, tolerance):
    """Measured relative to the angle itself: θ from arccos(â·b̂) would be 0 or noise below 1e-4 in float32."""
    a = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)
    b = torch.tensor([[math.cos(angle), 0.0, math.sin(angle)]], dtype=dtype)
    full = math.atan2(b[0, 2], b[0, 0])
    for t in (0.0, 0.25, 0.5, 0.9, 1.0, 1.5):
        x, y, z = slerp(a, b, t)[0].tolist()
        assert y == 0 and math.atan2(z, x) == pytest.approx(t * full, rel=tolerance)


@pytest.mark.parametrize("angle", [1e-6, 0.999 * PARALLEL, 1.001 * PARALLEL, 1.0, 3.0, math.pi - 1e-4, math.pi])
def test_slerp_turns_at_constant_speed(angle):
    a, b = pairs_at(angle)
    steps = torch.stack([slerp(a, b, t) for t in torch.linspace(-0.5, 1.5, 13, dtype=torch.float64)])
    turned = 2 * torch.atan2((steps[1:] - steps[:-1]).norm(dim=2), (steps[1:] + steps[:-1]).norm(dim=2))
    angle = math.pi if angle > math.pi - OPPOSITE else angle  # the half circle
    torch.testing.assert_close(turned, torch.full_like(turned, angle / 6), rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("t", [-1.0, -0.3, 1.2, 2.0])
@pytest.mark.parametrize("angle", [1e-5, 0.999 * PARALLEL, 1.0, 3.0])
def test_slerp_goes_on_along_the_circle_outside_0_and_1(angle, t):
    a, b = pairs_at(angle)
    expected = torch.stack([exact_slerp(*row, t) for row in zip(a, b, strict=True)])
    torch.testing.assert_close(slerp(a, b, t), expected, rtol=0, atol=1e-8)


def test_why_not_arccos_and_why_not_the_average_is_as_written():
    """float32: below 2.4e-4 every cosine is 1. And the quarters of 120°."""
    assert torch.tensor(2.44e-4).cos() == 1 and torch.tensor(2.45e-4).double().cos().float() < 1
    a, b = torch.tensor([[1.0, 0]]).double(), torch.tensor([[-0.5, math.sqrt(0.75)]]).double()
    turned = {"average": [], "slerp": []}
    for t in (0.25, 0.5, 0.75):
        for name, point in (("average", (1 - t) * a + t * b), ("slerp", slerp(a, b, t))):
            turned[name].append(round(math.degrees(math.atan2(point[0, 1], point[0, 0]))))
    assert turned == {"average": [19, 60, 101], "slerp": [30, 60, 90]}


def test_slerp_of_opposite_vectors_is_a_half_circle():
    a = torch.cat([randn(6, 5), torch.eye(5)])  # along a coordinate axis not every axis is a way round
    start, middle, end = (slerp(a, -2 * a, t) for t in (0.0, 0.5, 1.0))
    torch.testing.assert_close(start, F.normalize(a, dim=1))
    torch.testing.assert_close(end, -F.normalize(a, dim=1))
    torch.testing.assert_close((middle * a).sum(1), torch.zeros(11, dtype=torch.float64))
    torch.testing.assert_close(middle.norm(dim=1), torch.ones(11, dtype=torch.float64))


def test_slerp_of_equal_vectors_stays():
    a = randn(6, 5)
    for t in (-1.0, 0.0, 0.3, 1.0, 2.0):
        torch.testing.assert_close(slerp(a, 7 * a, t), F.normalize(a, dim=1))


def test_slerp_leaves_out_a_zero_vector():
    a, zero = F.normalize(randn(3, 5), dim=1), torch.zeros(3, 5, dtype=torch.float64)
    for t in (0.0, 0.3, 1.0):
        torch.testing.assert_close(slerp(a, zero, t), math.cos(t * math.pi / 2) * a)  # as if at a right angle
        torch.testing.assert_close(slerp(zero, a, t), math.sin(t * math.pi / 2) * a)
        assert not slerp(zero, zero, t).any()


def test_slerp_takes_t_as_a_number_a_scalar_or_one_for_each_row():
    a, b = randn(4, 6), randn(4, 6, seed=1)
    expected = slerp(a, b, 0.25)
    quarter = torch.tensor(0.25)
    for t in (quarter, quarter.double(), quarter[None], quarter.expand(4)):
        assert torch.equal(slerp(a, b, t), expected)
    mixed = slerp(a, b, torch.tensor([0, 0.25, 0.25, 1]))
    assert torch.equal(mixed[1:3], expected[1:3])
    torch.testing.assert_close(mixed[[0, 3]], F.normalize(torch.stack([a[0], b[3]]), dim=1))
    assert torch.equal(slerp(a, b, 1), slerp(a, b, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_slerp_keeps_the_type_and_computes_at_least_in_float32(dtype):
    a, b = randn(4, 32, dtype=dtype), randn(4, 32, seed=1, dtype=dtype)
    result = slerp(a, b, 0.3)
    assert result.dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(result, slerp(a.float(), b.float(), 0.3).to(dtype))
    gradients = value_and_gradients(lambda a, b: slerp(a, b, 0.3).float().sum(), a, b)[1:]
    assert all(g.dtype == dtype and g.any() for g in gradients)


def test_slerp_of_no_rows_is_empty():
    assert slerp(torch.ones(0, 4), torch.ones(0, 4), 0.5).shape == (0, 4)


@pytest.mark.parametrize("a, b", [((4,), (4,)), ((3, 4), (2, 4)), ((3, 4), (3, 5)), ((1, 3, 4), (1, 3, 4))])
def test_slerp_refuses_vectors_that_do_not_fit(a, b):
    with pytest.raises(ValueError):
        slerp(torch.ones(a), torch.ones(b), 0.5)


@pytest.mark.parametrize("t", [(2,), (4,), (3, 1), (1, 1)])
def test_slerp_refuses_a_t_that_does_not_fit(t):
    with pytest.raises(ValueError):
        slerp(torch.ones(3, 4), torch.ones(3, 4), torch.ones(t))


@pytest.mark.parametrize("angle", [1e-3, 5e-3, 0.1, 1.0, 2.5, 3.1])
def test_slerp_gradients_pass_gradcheck(angle):
    a, b = pairs_at(angle, N=3, D=4)
    t = torch.tensor([0.1, 0.5, 0.9]).double()
    assert torch.autograd.gradcheck(slerp, [v.requires_grad_() for v in (a, b, t)])


@pytest.mark.parametrize("angle", [1e-3, 0.999 * PARALLEL, 1.001 * PARALLEL, 1.0, 3.0, math.pi - 1.001 * OPPOSITE])
def test_slerp_gradients_are_the_plain_formulas(angle):
    a, b = pairs_at(angle)
    t, weight = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0]).double(), randn(5, 8, seed=2)
    actual = value_and_gradients(lambda *inputs: (slerp(*inputs) * weight).sum(), a, b, t)
    expected = value_and_gradients(lambda *inputs: (plain_slerp(*inputs) * weight).sum(), a, b, t)
    for name, value, plain in zip(("value", "∂a", "∂b", "∂t"), actual, expected, strict=True):
        assert relative_error(value, plain) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp_gradients_of_equal_vectors_are_those_of_a_straight_line(dtype):
    a, weight = randn(3, 5, dtype=dtype), randn(3, 5, seed=2, dtype=dtype)
    for t in (0.0, 0.3, 1.0):
        _, da, db = value_and_gradients(lambda a, b, t=t: (slerp(a, b, t) * weight).sum(), a, a)
        _, straight = value_and_gradients(lambda a: (F.normalize(a, dim=1) * weight).sum(), a)
        torch.testing.assert_close(da, (1 - t) * straight)
        torch.testing.assert_close(db, t * straight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_slerp_gradients_are_finite_everywhere(t, dtype):
    a, zero, tiny = randn(1, 4), torch.zeros(1, 4), torch.tensor([[0, 1e-7, 0, 0]])
    others = torch.cat([a, 2 * a, -a, -3 * a, a + tiny, -a + tiny, zero, randn(1, 4, seed=1)])
    left, right = torch.cat([a.expand(8, 4), zero.expand(8, 4)]), torch.cat([others, others])
    for inputs in ((left, right), (right, left)):
        inputs = [v.to(dtype) for v in inputs]
        results = value_and_gradients(lambda a, b, t: slerp(a, b, t).sum(), *inputs, torch.tensor(t))
        assert all(r.isfinite().all() for r in results)


# --- top-k search ----------------------------------------------------------------------------------------------------


def sorted_cosines(queries, gallery):
    return (F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T).sort(1, descending=True)


@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 8), st.integers(1, 40), st.integers(1, 99))
@examples
def test_top_k_equals_a_full_sort(Q, N, D, k, entries):
    queries, gallery = randn(Q, D), randn(N, D, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "STRIP", entries)
        patch.setattr(search, "MERGE", 3)
        values, indices = top_k(queries, gallery, k)
    expected = sorted_cosines(queries, gallery)
    assert values.shape == indices.shape == (Q, min(k, N)) and indices.dtype == torch.int64
    torch.testing.assert_close(values, expected.values[:, :k])
    if D > 1:  # in one dimension every cosine is ±1, and their order is free
        assert torch.equal(indices, expected.indices[:, :k])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_top_k_ignores_lengths_and_computes_in_float32(dtype):
    queries, gallery = 100 * randn(5, 16), randn(40, 16, seed=1) * torch.arange(1, 41)[:, None]
    queries, gallery = queries.to(dtype), gallery.to(dtype)
    values, indices = top_k(queries, gallery, 7)
    expected = sorted_cosines(queries, gallery)
    torch.testing.assert_close(values, expected.values[:, :7].float(), rtol=0, atol=1e-6)
    assert torch.equal(indices, expected.indices[:, :7])


@pytest.mark.parametrize("spread", [1, 0.05, 0.002, 0])
def test_a_single_query_of_a_float16_gallery_finds_what_a_whole_comparison_does(spread, monkeypatch):
    """Rows from all around to all the same: candidates by rough cosines miss none."""
    torch.manual_seed(0)
    centre, compared = torch.randn(64), []
    gallery = F.normalize(centre + spread * 8 * torch.randn(3000, 64), dim=1).half()
    strips = search.cosines_of_strips
    monkeypatch.setattr(
        search, "cosines_of_strips", lambda q, some, unit: compared.append(len(some)) or strips(q, some, unit)
    )
    for query in (gallery[:1].float(), torch.randn(1, 64), -gallery[:1].float()):
        values, rows = search.top_k(query, gallery, 10, unit_rows=True)
        exact = (F.normalize(query, dim=1) @ gallery.float().T)[0]
        torch.testing.assert_close(values[0], exact.topk(10).values, rtol=0, atol=1e-6)
        torch.testing.assert_close(exact[rows[0]], values[0], rtol=0, atol=1e-6)
    assert max(compared) < 300 if spread == 1 else spread or set(compared) == {3000}
    gallery[7] = torch.nan
    assert search.top_k(query, gallery, 10, unit_rows=True)[0].isnan().any()
    assert search.top_k(query, gallery, 3000, unit_rows=True)[0].shape == (1, 3000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_unit_rows_need_not_be_measured(dtype):
    queries, gallery = randn(5, 48).float(), F.normalize(randn(400, 48, seed=1), dim=1).to(dtype)
    values, indices = top_k(queries, gallery, 9, unit_rows=True)
    plain = F.normalize(queries.double(), dim=1) @ gallery.double().T
    torch.testing.assert_close(values, plain.topk(9).values.float(), rtol=0, atol=1e-6)
    assert torch.equal(indices, plain.topk(9).indices)


def test_top_k_gives_tied_items_once_each(chunk):
    gallery = randn(4, 8).repeat(5, 1)
    values, indices = top_k(randn(6, 8, seed=1), gallery, 12)
    torch.testing.assert_close(values, sorted_cosines(randn(6, 8, seed=1), gallery).values[:, :12])
    for row in indices.tolist():
        assert len(set(row)) == 12
        assert len({i % 4 for i in row[:5]}) == len({i % 4 for i in row[5:10]}) == 1  # copies stay together


def test_top_k_of_nothing_is_empty():
    for Q, N in ((0, 5), (3, 0), (0, 0)):
        values, indices = top_k(torch.ones(Q, 4), torch.ones(N, 4), 3)
        assert values.shape == indices.shape == (Q, min(3, N)) and indices.dtype == torch.int64


def test_top_k_holds_no_matrix(monkeypatch):
    monkeypatch.setattr(search, "STRIP", 2**12)
    monkeypatch.setattr(search, "MERGE", 2)
    with LargestTensor() as largest:
        top_k(randn(512, 16), randn(512, 16, seed=1), 3)
    assert largest.elements <= 512 * 16
