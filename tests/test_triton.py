"""The Triton kernels against the plain formulas in float64 autograd: on a GPU where there is one, else in Triton's
interpreter (conftest.py switches it on). The plain PyTorch versions are tested in test_kernels.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_kernels import exact_slerp, pairs_at, plain_loss, plain_slerp, randn, random_labels, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import benchmark, reference, search

pytest.importorskip("triton")
from kernels import triton_contrastive, triton_search, triton_tiles, triton_tiny
from kernels.triton_contrastive import contrastive_loss
from kernels.triton_slerp import slerp

pytestmark = pytest.mark.filterwarnings("error:.*encountered")  # NumPy's, of the interpreter: overflow, 0 · ∞
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[1]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
examples = settings(deadline=None, max_examples=40, derandomize=True)
# A GPU adds along D in another order than the interpreter.
TOLERANCE = {torch.float32: 1e-5 if DEVICE == "cpu" else 5e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
DTYPES = st.sampled_from(list(TOLERANCE))


def results(function, *inputs, weight=None):
    """Value and gradients of the function at copies of the tensors, or of its product with a weight; on the CPU."""
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    value = function(*inputs)
    total = value if weight is None else (value * weight.to(value)).sum()
    return [v.detach().cpu() for v in (value, *torch.autograd.grad(total, inputs))]


def assert_near(actual, expected, tolerance, floor=1e-2):
    """Of the relative errors; floor: what is smaller than this counts as if it were this large."""
    for name, a, e in zip(("value", "∂1", "∂2", "∂3"), actual, expected, strict=True):
        error = (a.double() - e.double()).norm() / e.double().norm().clamp(min=floor)
        assert error <= tolerance, (name, error.item())


# --- contrastive loss ------------------------------------------------------------------------------------------------


def both_losses(x, y, scale, labels, dtype):
    x, y, scale = x.to(dtype), y.to(dtype), torch.tensor(scale)
    there = [tensor.to(DEVICE) for tensor in (x, y, scale)]
    actual = results(lambda *v: contrastive_loss(*v, *(tensor.to(DEVICE) for tensor in labels)), *there)
    expected = results(lambda *v: plain_loss(*v, *labels), x.double(), y.double(), scale.double())
    return actual, expected


def drawn_features(N, M, D, kind, seed):
    x, y = randn(N, D, seed=seed), randn(M, D, seed=seed + 1)
    if kind == "related":
        y = x[torch.arange(M) % N] + 0.5 * y
    elif kind == "duplicated":
        x, y = x[torch.arange(N) % 3 % N], y[torch.arange(M) % 5 % M]
    elif kind == "zeros":
        x[::3], y[1::4] = 0, 0
    elif D == 1:  # of unit length, as ±1 are the only directions
        x, y = x.sign(), y.sign()
    elif kind == "outliers":  # opposite to nearly all others: 150 and more below the largest logit at a high scale
        direction = randn(1, D, seed=seed + 2)
        x, y = direction + 0.3 * x, direction + 0.3 * y
        x[::7] *= -1
    return x, y


KINDS = st.sampled_from(["random", "related", "duplicated", "zeros", "outliers"])
SIZE, WIDTH = st.integers(1, 64) | st.integers(1, 300), st.sampled_from([1, 7, 64, 192, 512, 768, 1024])


@given(
    SIZE,
    SIZE,
    WIDTH,
    st.sampled_from(["pairs", "one", "few", "many"]),
    st.floats(1, 100),
    KINDS,
    DTYPES,
    st.integers(0, 999),
)
@example(300, 300, 512, "pairs", 100.0, "outliers", torch.float32, 0)
@example(64, 64, 192, "pairs", 100.0, "outliers", torch.float16, 0)
@example(32, 7, 512, "few", 100.0, "related", torch.float32, 0)
@example(1, 20, 7, "many", 100.0, "zeros", torch.float32, 0)
@example(257, 129, 1024, "few", 100.0, "related", torch.bfloat16, 0)
@examples
def test_loss_and_gradients_are_the_plain_formulas(N, M, D, labelling, scale, kind, dtype, seed):
    if labelling == "pairs":
        M, labels = N, ()
    else:  # of one class only; of few, with many positives each; of many, most of them without a positive
        labels = random_labels({"one": 1, "few": 5, "many": 1000}[labelling], N, M, seed=seed)
        labels[1][0] = labels[0][0]
    x, y = drawn_features(N, M, D, kind, seed)
    actual, expected = both_losses(x, y, scale, labels, dtype)
    assert [v.dtype for v in actual] == [torch.float32, dtype, dtype, torch.float32]
    if kind == "zeros":  # there the plain formula's normalization has another gradient
        for feature, kernel, plain in ((x, actual[1], expected[1]), (y, actual[2], expected[2])):
            zero = (feature == 0).all(1)
            assert not kernel[zero].any()
            plain[zero] = 0
    # In one dimension there is nowhere to turn: every gradient is 0, and its rounding is that of what cancels.
    assert_near(actual, expected, TOLERANCE[dtype], floor=scale if D == 1 else 1e-2)


@pytest.mark.parametrize("angle", [0.0, 2.8])
def test_a_column_far_below_the_largest_logit_keeps_its_digits(angle):
    """At s = 100 the logits of the first text rise from −100; with 2.8 radians left they stay below −94, where
    exp(S − s) is 0 in float32."""
    angles = torch.linspace(3.14159, angle, 200).double()
    x = torch.stack([angles.cos(), angles.sin()], 1)
    y = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.02]]).double()
    assert_near(*both_losses(x, y, 100.0, (torch.arange(200) % 3, torch.arange(3)), torch.float32), 1e-5)


@pytest.mark.parametrize("N, M", [(1, 1), (32, 7), (32, 20), (64, 64), (17, 33)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_the_tiny_kernel_keeps_the_digits(N, M, dtype, tolerance):
    x, y, labels = randn(N, 512), randn(M, 512, seed=1), (torch.arange(N) % M, torch.arange(M))
    assert_near(*both_losses(x, y, 30.0, labels, dtype), tolerance)


@pytest.mark.parametrize("function", [contrastive_loss, reference.contrastive_loss])
@pytest.mark.parametrize("N, M", [(0, 4), (4, 0), (0, 0), (0, 200)])
def test_without_rows_loss_and_gradients_are_zero(function, N, M):
    x, y, scale = torch.ones(N, 5, device=DEVICE), torch.ones(M, 5, device=DEVICE), torch.tensor(9.0, device=DEVICE)
    labels = torch.zeros(N, device=DEVICE).long(), torch.zeros(M, device=DEVICE).long()
    loss, dx, dy, dscale = results(lambda *v: function(*v, *labels), x, y, scale)
    assert dx.shape == x.shape and dy.shape == y.shape
    assert not any(v.any() for v in (loss, dx, dy, dscale))


def test_the_default_type_changes_nothing(monkeypatch):
    x, y, labels = randn(70, 40).float(), randn(70, 40, seed=1).float(), random_labels(3, 70, 70)
    call = lambda x, y: contrastive_loss(x, y, 20.0, *(v.to(DEVICE) for v in labels))  # noqa: E731
    expected = results(call, x.to(DEVICE), y.to(DEVICE))
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = results(call, x.to(DEVICE), y.to(DEVICE))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_without_any_positive_loss_and_gradients_are_zero():
    x, y, scale = randn(70, 5).float().to(DEVICE), randn(40, 5).float().to(DEVICE), torch.tensor(10.0, device=DEVICE)
    labels = torch.zeros(70, device=DEVICE).long(), torch.ones(40, device=DEVICE).long()
    for result in results(lambda *v: contrastive_loss(*v, *labels), x, y, scale):
        assert not result.any()


def test_gradients_follow_the_incoming_one_and_frozen_features():
    x, y, scale = (v.float().to(DEVICE) for v in (randn(70, 40), randn(70, 40, seed=1), torch.tensor(30.0)))
    _, dx, dy, dscale = results(contrastive_loss, x, y, scale)
    scaled = results(lambda *v: -3 * contrastive_loss(*v), x, y, scale)[1:]
    for actual, expected in zip(scaled, (-3 * dx, -3 * dy, -3 * dscale), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(results(lambda y: contrastive_loss(x, y, 30), y)[1], dy)
    torch.testing.assert_close(results(lambda s: contrastive_loss(x, y, s), scale)[1], dscale)


LAYOUTS = {
    "transposed": lambda v: v.T.contiguous().T,
    "strided": lambda v: v.repeat_interleave(3, 1)[:, ::3],
    "sliced": lambda v: F.pad(v, (5, 2))[:, 5:-2],
    "offset": lambda v: F.pad(v, (0, 0, 3, 1))[3:-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout):
    x, y, labels = (
        randn(90, 40).float().to(DEVICE),
        randn(70, 40, seed=1).float().to(DEVICE),
        random_labels(3, 180, 140),
    )
    labels = [v.to(DEVICE) for v in labels]
    strided = [v[::2] for v in labels]
    expected = results(lambda x, y: contrastive_loss(x, y, 20.0, *(v.contiguous() for v in strided)), x, y)
    inputs = [LAYOUTS[layout](v).requires_grad_() for v in (x, y)]
    loss = contrastive_loss(*inputs, 20.0, *strided)
    actual = [loss, *torch.autograd.grad(loss, inputs)]
    assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))


def in_poison(tensor, poison):
    """The same values in the middle of a larger buffer."""
    buffer = tensor.new_full((len(tensor) + 300, *tensor.shape[1:]), poison)
    buffer[100 : 100 + len(tensor)] = tensor
    return buffer[100 : 100 + len(tensor)]


class GuardedEmpty:
    """torch.empty and its like, in the middle of a buffer of NaNs (of 77s for integers); `check` looks at the rest."""

    def __init__(self, monkeypatch):
        self.buffers = []
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))

    def guarded(self, original):
        def empty(*args, **kwargs):
            plain = original(*args, **kwargs)
            margin = 1000
            buffer = torch.full((plain.numel() + 2 * margin,), float("nan") if plain.is_floating_point() else 77)
            buffer = buffer.to(plain.device, plain.dtype)
            self.buffers.append((buffer, margin))
            return buffer[margin : margin + plain.numel()].view(plain.shape)

        return empty

    def check(self):
        assert self.buffers
        for buffer, margin in self.buffers:
            guard, inside = torch.cat([buffer[:margin], buffer[-margin:]]), buffer[margin:-margin]
            assert (guard.isnan() if buffer.is_floating_point() else guard == 77).all()
            assert not (inside.isnan() if buffer.is_floating_point() else inside == 77).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, M, D", [(1, 1, 1), (65, 130, 33), (200, 3, 100)])
def test_nothing_is_read_or_written_beyond_the_edges(N, M, D, dtype, monkeypatch):
    x, y = randn(N, D).to(DEVICE, dtype), randn(M, D, seed=1).to(DEVICE, dtype)
    labels = [v.to(DEVICE) for v in random_labels(2, N, M)]
    labels[1][0] = labels[0][0]
    scale = torch.tensor(50.0, device=DEVICE)
    expected = results(lambda *v: contrastive_loss(*v, *labels), x, y, scale)

    monkeypatch.setattr(triton_tiles, "STRIP", 1)  # strips of 128 rows
    stripwise = results(lambda *v: contrastive_loss(*v, *labels), x, y, scale)
    assert_near(stripwise, expected, 1e-6 if dtype == torch.float32 else 1e-2)

    poisoned = [in_poison(v, float("nan")).requires_grad_() for v in (x, y)] + [scale.clone().requires_grad_()]
    guard = GuardedEmpty(monkeypatch)
    loss = contrastive_loss(*poisoned, *(in_poison(v, 1) for v in labels))
    again = [loss, *torch.autograd.grad(loss, poisoned)]
    monkeypatch.undo()
    guard.check()
    monkeypatch.setattr(triton_tiles, "STRIP", 1)
    assert all(torch.equal(a.cpu(), e) for a, e in zip(again, stripwise, strict=True))


# --- slerp -----------------------------------------------------------------------------------------------------------


@given(SIZE, WIDTH.filter(lambda D: D > 1), st.floats(-1, 2), DTYPES, st.integers(0, 999))
@examples
def test_slerp_and_gradients_are_the_plain_formulas(N, D, t, dtype, seed):
    a, b = (randn(N, D, seed=seed + i).to(dtype) for i in (0, 1))
    t = torch.linspace(t, 1 - t, N, dtype=torch.float64)
    regular = torch.cosine_similarity(a.double(), b.double()).abs() < 0.9999
    a, b, t = a[regular], b[regular], t[regular]
    weight = randn(len(a), D, seed=seed + 2)
    actual = results(slerp, a.to(DEVICE), b.to(DEVICE), t.float().to(DEVICE), weight=weight)
    expected = results(plain_slerp, a.double(), b.double(), t.float().double(), weight=weight)
    assert actual[0].dtype == actual[1].dtype == actual[2].dtype == dtype
    assert_near(actual, expected, TOLERANCE[dtype] * (10 if D < 64 and dtype == torch.float32 else 1))


ANGLES = [0.0, 1e-6, 1e-4, 0.999e-2, 1.001e-2, 0.1, 0.7, 0.9, 1.5707, 2.5, 3.1, 3.1405, 3.1407, 3.1415926]


@pytest.mark.parametrize("angle", ANGLES)
def test_slerp_at_every_angle_is_the_reference(angle):
    """Value and gradients, nearly parallel and nearly opposite vectors included, of the reference in float64."""
    a, b = pairs_at(angle, N=9, D=40)
    t, weight = torch.linspace(-0.2, 1.3, 9).double(), randn(9, 40, seed=2)
    near_opposite = min(1.0, 3.14159265 - angle) if angle < 3.1406 else 1.0  # there float32 itself loses digits
    actual = results(slerp, *(v.float().to(DEVICE) for v in (a, b, t)), weight=weight)
    # Of the float32 inputs, since a rounding of the inputs is a turn of 1e-7 by itself.
    expected = results(reference.slerp, *(v.float().double() for v in (a, b, t)), weight=weight)
    assert_near(actual, expected, 1e-5 / near_opposite, floor=0.1)  # ∂t of parallel unit vectors is their difference


def test_slerp_equals_the_formula_at_50_digits():
    a, b, t = randn(20, 16).float(), randn(20, 16, seed=1).float(), torch.linspace(0, 1, 20)
    expected = torch.stack([exact_slerp(*row) for row in zip(a, b, t, strict=True)])
    torch.testing.assert_close(
        slerp(a.to(DEVICE), b.to(DEVICE), t.to(DEVICE)).cpu(), expected.float(), rtol=0, atol=1e-6
    )


def test_slerp_leaves_out_a_zero_vector_and_its_gradients_are_finite():
    a, zero, tiny = randn(1, 4), torch.zeros(1, 4), torch.tensor([[0, 1e-7, 0, 0]])
    others = torch.cat([a, 2 * a, -a, -3 * a, a + tiny, -a + tiny, zero, randn(1, 4, seed=1), torch.eye(4)]).float()
    left, right = others.repeat(12, 1), others.repeat_interleave(12, 0)
    for t in (0.0, 0.3, 1.0):
        actual = results(slerp, left.to(DEVICE), right.to(DEVICE), torch.tensor(t, device=DEVICE), weight=torch.ones(1))
        assert all(v.isfinite().all() for v in actual)
        expected = reference.slerp(left.double(), right.double(), t)
        near_pi = (torch.cosine_similarity(left.double(), right.double()) < -0.99)[:, None]
        assert ((actual[0] - expected).abs() <= torch.where(near_pi, 1e-3, 2e-6)).all()


def test_slerp_reads_and_writes_nothing_beyond_the_edges(monkeypatch):
    a, b, t = (v.float().to(DEVICE) for v in (randn(37, 11), randn(37, 11, seed=1), torch.linspace(0, 1, 37)))
    weight = randn(37, 11, seed=2).float()
    expected = results(slerp, a, b, t, weight=weight)
    poisoned = [in_poison(v, float("nan")).requires_grad_() for v in (a, b, t)]
    guard = GuardedEmpty(monkeypatch)
    value = slerp(*poisoned)
    again = [value, *torch.autograd.grad((value * weight.to(value)).sum(), poisoned)]
    monkeypatch.undo()
    guard.check()
    assert all(torch.equal(x.detach().cpu(), e) for x, e in zip(again, expected, strict=True))


def test_slerp_takes_t_as_the_reference_does():
    a, b = randn(4, 6).float().to(DEVICE), randn(4, 6, seed=1).float().to(DEVICE)
    expected = slerp(a, b, 0.25)
    quarter = torch.tensor(0.25, device=DEVICE)
    for t in (quarter, quarter.double(), quarter[None], quarter.expand(4)):
        assert torch.equal(slerp(a, b, t), expected)
    with pytest.raises(ValueError, match="t of shape"):
        slerp(a, b, torch.ones(3))
    assert slerp(a[:0], b[:0], 0.5).shape == (0, 6)


# --- as PyTorch operators --------------------------------------------------------------------------------------------


def arguments():
    x, y = (randn(20, 16, seed=i).float().to(DEVICE).requires_grad_() for i in (0, 1))
    labels = [v.to(DEVICE) for v in random_labels(3, 20, 20)]
    return x, y, torch.tensor(20.0, device=DEVICE, requires_grad=True), *labels


@pytest.mark.parametrize("operator", ["contrastive_loss", "slerp_forward", "slerp_backward"])
def test_operators_are_well_formed(operator):
    x, y, scale, *labels = arguments()
    t = torch.linspace(0, 1, 20, device=DEVICE, requires_grad=True)
    inputs = {
        "contrastive_loss": (x, y, scale, *labels, [True, True, True]),
        "slerp_forward": (x, y, t),
        "slerp_backward": tuple(v.detach() for v in (x, x, y, t)),
    }[operator]
    torch.library.opcheck(getattr(torch.ops.kernels, operator).default, inputs)


@pytest.mark.parametrize("function", ["contrastive_loss", "slerp"])
def test_compiling_autocast_and_differentiating_twice(function):
    x, y, scale, *labels = arguments()
    t = torch.tensor(0.3, device=DEVICE)
    if function == "slerp":
        call = lambda x, y: slerp(x, y, t).square().sum() + slerp(x, y, 0.2)[:, 0].sum()  # noqa: E731
    else:
        call = lambda x, y: contrastive_loss(x, y, scale, *labels)  # noqa: E731
    expected = results(call, x, y)
    compiled = results(torch.compile(call, backend="aot_eager", fullgraph=True), x, y)
    with torch.autocast(DEVICE, torch.bfloat16):
        mixed = results(call, x, y)
    for other in (compiled, mixed):
        for a, e in zip(other, expected, strict=True):
            torch.testing.assert_close(a, e)
    with pytest.raises(RuntimeError, match="twice"):
        (dx,) = torch.autograd.grad(call(x, y), x, create_graph=True)
        dx.square().sum().backward()


class Launches(TorchDispatchMode):
    """Counts what reaches a GPU: operators other than views and allocations, and our kernels, which do not run."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        for module in (triton_tiny, triton_tiles):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self.counted(name))
        # On a GPU the library multiplies bfloat16 into float32 in one launch; the CPU has to convert.
        monkeypatch.setattr(triton_tiles, "add_product", lambda total, K, features: self.names.append("product"))

    def counted(self, name):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *args, **kwargs: self.names.append(name)

        return Kernel()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        views = {"slice", "t", "transpose", "select", "view", "expand", "detach", "alias", "as_strided", "permute"}
        if function.namespace == "aten" and not name.startswith(("empty", "new_empty")) and name not in views:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "N, M, dtype, strip, most",
    [
        (32, 7, torch.float32, 2**27, 4),
        (64, 64, torch.float16, 2**27, 4),
        (300, 71, torch.float32, 2**27, 16),
        (300, 300, torch.float16, 2**27, 16),
        (300, 71, torch.float32, 1, 16 + 2 * 4),  # three strips of 128 rows
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_launches_are_few(N, M, dtype, strip, most, labelled, monkeypatch):
    monkeypatch.setattr(triton_tiles, "STRIP", strip)
    M = M if labelled else N
    x, y, scale = randn(N, 16).to(dtype), randn(M, 16).to(dtype), torch.tensor(9.0)
    labels = (torch.arange(N) % M, torch.arange(M)) if labelled else (None, None)
    launches = Launches(monkeypatch)
    inputs = [v.requires_grad_() for v in (x, y, scale)]
    loss = contrastive_loss(*inputs, *labels)
    launches.names.clear()
    with launches, torch.no_grad():  # the operator's own function, as a mode does not see into an operator
        triton_contrastive.loss_and_gradients._init_fn(*inputs, *labels, [True] * 3)
    with launches:
        torch.autograd.grad(loss, inputs, torch.ones(()))
    launches.names.remove("ones")  # the incoming gradient
    assert 0 < len(launches.names) <= most, " ".join(launches.names)
    assert ("tiny_kernel" in launches.names) == (max(N, M) <= 64)


def test_a_changing_number_of_texts_is_compiled_once():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(contrastive_loss, backend=backend, dynamic=True, fullgraph=True)
    x = randn(20, 16).float().to(DEVICE)
    for M in (5, 9, 13):
        labels = torch.arange(20, device=DEVICE) % M, torch.arange(M, device=DEVICE)
        y, scale = randn(M, 16, seed=1).float().to(DEVICE), torch.tensor(9.0, device=DEVICE)
        torch.testing.assert_close(compiled(x, y, scale, *labels), contrastive_loss(x, y, scale, *labels))
    assert len(graphs) <= 2


def test_features_of_two_types_and_of_any_strides_in_a_compiled_step():
    x, y = randn(16, 20).half().to(DEVICE).T, randn(20, 16, seed=1).float().to(DEVICE)
    expected = results(lambda x, y: contrastive_loss(x.float(), y, 20.0), x, y)
    compiled = torch.compile(lambda x, y: contrastive_loss(x, y, 20.0), backend="aot_eager", fullgraph=True)
    for a, e in zip(results(compiled, x, y), expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e)


def test_without_a_gpu_everything_works_and_triton_is_not_even_imported():
    code = """
import sys, torch, kernels
x, y = torch.randn(4, 8), torch.randn(4, 8)
kernels.contrastive_loss(x, y, 10.0), kernels.slerp(x, y, 0.5)
assert "triton" not in sys.modules and "kernels.triton_contrastive" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_packages_slerp_stays_a_function():
    import kernels.triton_slerp

    assert callable(kernels.slerp) and kernels.slerp(torch.eye(2), torch.eye(2), 0.5).shape == (2, 2)


@pytest.mark.parametrize(
    "kind, capability, dtype, expected",
    [
        ("cuda", (8, 0), torch.bfloat16, True),
        ("cuda", (9, 0), torch.float32, True),
        ("cuda", (7, 5), torch.float16, False),
        ("cuda", (9, 0), torch.float64, False),
        ("cpu", None, torch.float32, False),
    ],
)
def test_triton_is_for_gpus_that_it_has_tensor_cores_on(kind, capability, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def features(dtype):
        return SimpleNamespace(is_cuda=kind == "cuda", device=torch.device(kind), dtype=dtype)

    assert kernels.on_triton(features(dtype), features(dtype)) == expected
    assert not kernels.on_triton(features(dtype), features(torch.float64))  # float32's accuracy would not do
    monkeypatch.setattr(kernels, "HAS_TRITON", False)  # on Windows
    assert not kernels.on_triton(features(dtype))


def test_every_kernel_compiles_for_every_architecture_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "kernels/benchmark.py", "--static"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.count("|") == 9 and "float" in line]
    table = {(row[0].strip(), row[1].strip()): [cell.strip().split(", ") for cell in row[2:]] for row in rows}
    kernels_of = {"tiny", "measure", "statistics", "gradient", "combine", "loss", "project", "slerp", "cosines"}
    assert len(rows) == 69 and {name.split(",")[0].split()[0] for name, _ in table} == kernels_of
    for (name, dtype), architectures in table.items():
        assert len(architectures) == 6
        full = name.startswith("tiny, 64") and dtype == "float32"  # on the ordinary units
        multiplies = name.startswith(("tiny", "statistics", "gradient", "cosines")) and not full
        assert [int(cell[2]) > 0 for cell in architectures] == [multiplies] * 6
    h100 = {name: float(table[name, "bfloat16"][3][3]) for name in ("statistics", "gradient")}
    assert h100["statistics"] <= 48 and h100["gradient"] <= 27  # instructions for each entry of a tile


WITHOUT_TRITON = """
import runpy, sys
sys.modules["triton"] = None  # what is not installed
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("command", [["kernels/benchmark.py"], ["-m", "kernels.benchmark"], ["-c", WITHOUT_TRITON]])
def test_the_benchmark_explains_itself_and_refuses_in_one_line(command, interpreted):
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    without_triton = command[0] == "-c"
    command = [sys.executable, *command, *(["kernels/benchmark.py"] if without_triton else [])]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run([*command, "--help"], **options)
    assert result.returncode == 0 and "--static" in result.stdout and not result.stderr
    if not without_triton and not interpreted:
        if torch.cuda.is_available():
            return  # it would measure
        reason = "there is no GPU"
    else:
        reason = "not installed" if without_triton else "TRITON_INTERPRET=1 is set"
    result = subprocess.run(command, **options)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and reason in result.stderr


def test_the_benchmark_goes_on_where_a_variant_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "contrastive_loss", contrastive_loss)  # on the CPU, in the interpreter
    monkeypatch.setattr(kernels, "top_k", triton_search.top_k)

    def fails(*arguments):
        raise torch.OutOfMemoryError("there is too little memory\nand more lines")

    monkeypatch.setattr(benchmark, "eager_labels", fails)
    case = benchmark.Case
    table = benchmark.measure([case("loss", torch.float32, 8, 3), case("top_k", torch.float16, 40, 2)], seconds=0.001)
    assert table == capsys.readouterr().out.rstrip("\n")
    rows = {
        tuple(cells[1:5]): cells[5:-1]
        for cells in ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
        if len(cells) > 5
    }
    this, failed = (rows["loss", "float32", "8 × 3", name] for name in ("this", "eager"))
    assert float(this[0]) > 0 and float(this[-1]) < 1e-5
    assert failed[0] == "there is too little memory"
    assert float(rows["top_k", "float16", "40 × 2", "this"][-1]) < 1e-5

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n", encoding="utf-8")
    benchmark.write_into_readme(table, readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and table in text and "old" not in text
    assert "<!-- measured -->" in benchmark.README.read_text(encoding="utf-8")


# --- top-k search ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 20), st.integers(0, 200), st.sampled_from([1, 33, 64]), st.integers(1, 40), DTYPES, st.booleans())
@examples
def test_top_k_is_the_plain_one(Q, N, D, k, dtype, in_parts):
    queries, gallery = randn(Q, D).to(DEVICE, dtype), (randn(N, D, seed=1) * 7).to(DEVICE, dtype)
    gallery[::9] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_search, "SCORES", 50 * max(1, Q) if in_parts else 2**25)
        values, rows = triton_search.top_k(queries, gallery, k)
    expected, _ = search.top_k(queries.double(), gallery.double(), k)
    assert values.shape == rows.shape == (Q, min(k, N)) and rows.dtype == torch.int64
    torch.testing.assert_close(values.cpu(), expected.float().cpu(), rtol=0, atol=2e-6)
    found = F.cosine_similarity(queries.double()[:, None], gallery.double()[rows], dim=2)
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=2e-6)
    assert all(len(set(row)) == len(row) for row in rows.tolist())


@pytest.mark.parametrize("function", [search.top_k, triton_search.top_k])
@pytest.mark.parametrize("shapes", [((3, 8), (5, 4)), ((8,), (5, 8))])
def test_top_k_refuses_what_does_not_fit(function, shapes):
    with pytest.raises(ValueError, match="expected"):
        function(*(torch.ones(shape) for shape in shapes), 2)


# --- on a GPU only ---------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_runs_give_the_same_bits(dtype):
    x, y = randn(3000, 512).to(DEVICE, dtype), randn(2500, 512, seed=1).to(DEVICE, dtype)
    labels = [v.to(DEVICE) for v in random_labels(50, 3000, 2500)]
    scale = torch.tensor(60.0, device=DEVICE)
    first = results(lambda *v: contrastive_loss(*v, *labels), x, y, scale)
    for _ in range(19):
        again = results(lambda *v: contrastive_loss(*v, *labels), x, y, scale)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@on_gpu
def test_more_than_two_to_the_31_entries():
    N, M, D = 2**22 + 5, 40, 520
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of GPU memory")
    x = torch.randn(N, D, device=DEVICE, dtype=torch.bfloat16)
    y = torch.randn(M, D, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.arange(N, device=DEVICE) % M, torch.arange(M, device=DEVICE)
    x.requires_grad_()
    loss = contrastive_loss(x, y, 20.0, *labels)
    (dx,) = torch.autograd.grad(loss, x)
    last = slice(N - 1000, N)
    S = 20 * F.normalize(x[last].detach().double(), dim=1) @ F.normalize(y.double(), dim=1).T
    assert 0 < loss < 20 and dx[last].isfinite().all() and dx[last].any(1).all()
    expected = torch.zeros_like(S)
    expected[torch.arange(1000), labels[0][last]] = 1
    direction = (
        20 * ((S.softmax(1) - expected) / N / 2) @ F.normalize(y.double(), dim=1)
    )  # the columns' part is 1/M of it
    assert torch.cosine_similarity(dx[last].double(), direction).mean() > 0.5


@on_gpu
def test_fine_tuning_on_the_gpu_follows_the_cpu(tmp_path):
    losses = {}
    subprocess.run([sys.executable, ROOT / "phantom.py", tmp_path / "data", "--count", "70"], check=True)
    for device in ("cpu", "cuda"):
        command = [sys.executable, ROOT / "train.py", "--data", tmp_path / "data", "--weights", "phantom"]
        command += ["--steps", "40", "--device", device, "--run", tmp_path / device]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        losses[device] = torch.tensor([json.loads(line)["loss"] for line in lines])
    assert relative_error(losses["cuda"], losses["cpu"].double()) < 0.05


@on_gpu
def test_a_second_gpu_is_used_where_the_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, y, t = randn(90, 40).float(), randn(90, 40, seed=1).float(), torch.rand(90)
    first, second = ([v.to(device) for v in (x, y, t)] for device in ("cuda:0", "cuda:1"))
    for function in (
        lambda x, y, t: contrastive_loss(x, y, 9.0),
        slerp,
        lambda x, y, t: triton_search.top_k(x, y, 3)[0],
    ):
        torch.testing.assert_close(function(*second).cpu(), function(*first).cpu())


@on_gpu
@pytest.mark.parametrize("N, M", [(32, 7), (300, 71)])
def test_loss_and_gradients_in_a_cuda_graph(N, M):
    x, y = (randn(n, 64, seed=n).float().to(DEVICE).requires_grad_() for n in (N, M))
    labels = torch.arange(N, device=DEVICE) % M, torch.arange(M, device=DEVICE)
    call = lambda: torch.autograd.grad(contrastive_loss(x, y, 20.0, *labels), (x, y))  # noqa: E731
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(captured, expected, strict=True))


@on_gpu
def test_more_rows_than_a_grids_second_dimension_has():
    N = 4_300_000
    x, y = torch.randn(40, 16, device=DEVICE), torch.randn(N, 16, device=DEVICE)
    labels = torch.arange(40, device=DEVICE), torch.arange(N, device=DEVICE) % 40
    ours, exact = (f(x, y, 5.0, *labels) for f in (contrastive_loss, reference.contrastive_loss))
    torch.testing.assert_close(ours, exact)
