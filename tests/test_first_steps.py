"""The four introductory kernels against PyTorch: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from kernels.first_steps import add, matmul, row_logsumexp, row_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[1]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("N, block", [(1, 4), (4, 4), (5, 4), (37, 16), (3, 64)])
def test_addition_and_who_did_it(N, block):
    a, b = randn(N), randn(N, seed=1)
    out, owner = add(a, b, block)
    assert torch.equal(out, a + b)
    assert owner.tolist() == [i // block for i in range(N)]


@pytest.mark.parametrize("N, D", [(1, 1), (3, 5), (7, 33), (2, 128)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_lengths_of_rows_of_any_layout(N, D, layout):
    x = randn(N, D)
    if layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "sliced":
        x = torch.nn.functional.pad(x, (2, 3), value=float("nan"))[:, 2:-3]
    torch.testing.assert_close(row_norm(x), x.norm(dim=1))


@pytest.mark.parametrize("N, M, block", [(1, 1, 16), (3, 50, 16), (5, 16, 16), (2, 17, 16), (4, 9, 4)])
@pytest.mark.parametrize("shift", [0.0, 500.0, -500.0])
def test_logsumexp_of_rows(N, M, block, shift):
    S = 100 * randn(N, M) + shift
    torch.testing.assert_close(row_logsumexp(S, block), S.logsumexp(1))
    wide = torch.nn.functional.pad(S, (0, 3), value=float("nan"))[:, :M]
    torch.testing.assert_close(row_logsumexp(wide, block), S.logsumexp(1))


@pytest.mark.parametrize("N, M, D", [(1, 1, 1), (32, 16, 32), (33, 17, 31), (70, 40, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matrix_product(N, M, D, dtype):
    x, y = randn(N, D).to(dtype), randn(M, D, seed=1).to(dtype)
    expected = (x.double() @ y.double().T).float()
    torch.testing.assert_close(matmul(x, y), expected, rtol=1e-5, atol=1e-4)


def test_the_kernels_compile_for_gpus_that_are_not_there():
    """The interpreter takes Python that the compiler would refuse."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import first_steps

TYPES = {"owner": "*i32"} | dict.fromkeys(["a", "b", "out", "x", "y", "S"], "*fp32")
SIZES = {"add": {"BLOCK": 4}, "row_norm": {"BLOCK": 8}, "row_logsumexp": {"BLOCK": 16}}
SIZES["matmul"] = {"BLOCK_N": 32, "BLOCK_M": 16, "BLOCK_D": 32}
for capability in (80, 90, 120):
    for name, constants in SIZES.items():
        kernel = getattr(first_steps, name + "_kernel")
        signature = {v: "constexpr" if v in constants else TYPES.get(v, "i32") for v in kernel.arg_names}
        triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_it_demonstrates_itself(tmp_path):
    command = [sys.executable, ROOT / "kernels/first_steps.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "program" in result.stdout and "equal True" in result.stdout
