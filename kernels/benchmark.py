"""How fast the kernels are, and what they compile to.

    python kernels/benchmark.py            # on a GPU: time, memory and error beside other ways to compute the same
    python kernels/benchmark.py --static   # anywhere: registers, shared memory, instructions, and the floor

A time is the median of forward + backward, taken with GPU events; the variants take turns, and each call gets other
inputs than the one before. Extra memory is what the call takes beyond its inputs and their gradients. The error is that
of the image gradient, relative, against the reference in float64. The floor is the least time that four matrix
products can take: forward computes S, backward S again, K y and Kᵀ x. `first_steps.py` explains registers and the rest.
"""

import argparse
import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from errors import UserError, run_script
from kernels import reference

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource

    from kernels import triton_contrastive
    from kernels.triton_contrastive import contrastive_loss
    from kernels.triton_slerp import backward_kernel, forward_kernel, launch_shape
except ImportError:  # --help works all the same
    triton = None

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # compute capability: limit of a program
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\b")
SIZES = (256, 1024, 4096, 16384, 32768, 65536)
D = 512

# ---------------------------------------------------------------------------------------------------------------------
# Without a GPU: compile, and read what came out


def argument_type(name, dtype):
    """The type of a kernel's argument, as Triton writes it, by the name that it has in all of them."""
    if name.startswith("BLOCK"):
        return "constexpr"
    if name in ("N", "M", "D", "first"):
        return "i32"
    if name in ("labels", "other_labels", "x_labels", "y_labels"):
        return "*i64"
    if name == "positives":
        return "*i32"
    if name == "K":
        return "*fp32" if dtype == torch.float32 else "*bf16"
    if name in ("x", "y", "a", "b", "out", "d_out", "da", "db"):
        return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    return "*fp32"


def kernels_to_compile(dtype):
    """(name, kernel, constants and options) of all kernels, as the operators launch them."""
    tile, row = triton_contrastive.tile_shape(dtype), launch_shape(D)
    return [
        ("measure", triton_contrastive.measure_kernel, {"BLOCK_N": 32, "BLOCK": 128}),
        ("statistics", triton_contrastive.statistics_kernel, tile),
        ("gradient", triton_contrastive.gradient_kernel, tile),
        ("slerp forward", forward_kernel, row),
        ("slerp backward", backward_kernel, row),
    ]


def build(kernel, shape, dtype, capability):
    """Compile for a GPU that need not be there → {registers, spilled bytes, shared bytes, tensor-core instructions}."""
    constants = {key: value for key, value in shape.items() if key.startswith("BLOCK")}
    options = {key: value for key, value in shape.items() if key not in constants}
    signature = {name: argument_type(name, dtype) for name in kernel.arg_names}
    # Triton looks at the arguments of a call: addresses, and a D, that are multiples of 16 allow wide loads.
    even = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name][0] == "*" or name == "D"
    }
    source = ASTSource(kernel, signature, constants, even)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    def run(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True)

    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        architecture = sm_arch_from_capability(capability)
        report = run(get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", ptx, "-o", os.devnull).stderr
        code = run(triton.knobs.nvidia.cuobjdump.path, "--dump-sass", cubin).stdout
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "shared": compiled.metadata.shared,
        "tensor-core": len(TENSOR_CORE.findall(code)),
    }


def static():
    print(
        "Registers of a thread, KiB of shared memory and matrix instructions of a program (limits in KiB), no spills:\n"
    )
    print("| kernel | type |", " | ".join(f"sm_{sm} ({limit})" for sm, limit in SHARED_KIB.items()), "|")
    print("| --- | --- |" + " --- |" * len(SHARED_KIB))
    too_much = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, kernel, shape in kernels_to_compile(dtype):
            cells = [name, str(dtype).removeprefix("torch.")]
            for capability, limit in SHARED_KIB.items():
                report = build(kernel, shape, dtype, capability)
                cells.append(f"{report['registers']}, {report['shared'] / 1024:.0f}, {report['tensor-core']}")
                if report["spilled"] or report["shared"] > limit * 1024:
                    too_much.append(f"{name} of {dtype} on sm_{capability}: {report}")
            print(f"| {' | '.join(cells)} |", flush=True)
    if too_much:
        raise UserError(f"spilled registers or too much shared memory: {'; '.join(too_much)}")
    print("\nThe floor at D = 512 in bfloat16: four products of 2·N·M·D, and each byte that has to move once\n")
    print("| N = M | TFLOP | ms at 790 TFLOP/s | MB of features and gradients | MB of K, written and read twice |")
    print("| --- | --- | --- | --- | --- |")
    for size in SIZES:
        flop, features, K = 4 * 2 * size * size * D, 4 * size * D * 2, 3 * size * size * 2
        print(f"| {size:,} | {flop / 1e12:.3f} | {flop / 790e12 * 1e3:.3f} | {features / 1e6:.1f} | {K / 1e6:,.0f} |")


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


def eager_loss(x, y, scale):
    """The usual lines: the whole matrix and two cross entropies."""
    S = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2


def variants():
    losses = {"this": contrastive_loss, "eager": eager_loss, "torch.compile": torch.compile(eager_loss, dynamic=False)}
    try:
        from inf_cl import cal_inf_loss
    except ImportError:
        return losses

    def inf_cl(x, y, scale):
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        return (cal_inf_loss(x, y, scale=scale) + cal_inf_loss(y, x, scale=scale)) / 2

    return losses | {"inf_cl": inf_cl}


def call(loss, x, y, scale):
    return torch.autograd.grad(loss(x, y, scale), (x, y, scale))


def inputs(size, dtype, copies):
    generator = torch.Generator("cuda").manual_seed(size)

    def feature():
        return torch.randn(size, D, device="cuda", generator=generator).to(dtype).requires_grad_()

    scale = torch.tensor(100.0, device="cuda", requires_grad=True)
    return [(feature(), feature(), scale) for _ in range(copies)]


def milliseconds(functions, sets, seconds=0.5):
    """{name: median}; the functions take turns, the inputs too."""
    times = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function(*sets[0])
    torch.cuda.synchronize()
    spent, turn = 0.0, 0
    while spent < 1000 * seconds * len(functions) or turn < 10:
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(*sets[turn % len(sets)])
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
            spent += times[name][-1]
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def extra_memory(function, arguments):
    """Peak bytes beyond inputs and their gradients."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*arguments)
    return torch.cuda.max_memory_allocated() - before - sum(v.nbytes for v in arguments)


def replayed(function, sets):
    """The function as a CUDA graph for each set of inputs, so that launching from Python is not measured."""
    graphs = {}
    for arguments in sets:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            function(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function(*arguments)
        graphs[arguments[0].data_ptr()] = graph
    return lambda x, *_: graphs[x.data_ptr()].replay()


def matmul_ceiling(dtype, size=8192):
    """TFLOP/s of the library's matrix product on random data."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / milliseconds({"": torch.mm}, [(a, b)])[""] / 1e9


def relative_error(gradient, exact):
    return ((gradient.double() - exact).norm() / exact.norm()).item()


def compare(dtype, size):
    """→ {variant: (ms, ms as a CUDA graph or None, extra bytes, error)}; None for a variant that ran out of memory."""
    sets = inputs(size, dtype, copies=max(2, min(64, 2**28 // (size * D * 4))))
    x, y, scale = (v.detach().double().requires_grad_() for v in sets[0])
    exact = call(reference.contrastive_loss, x, y, scale)[0]
    functions = {name: functools.partial(call, loss) for name, loss in variants().items()}
    memory, error, graphs, too_large = {}, {}, {}, {}
    for name, function in list(functions.items()):
        try:
            function(*sets[0])
            memory[name] = extra_memory(function, sets[0])
            error[name] = relative_error(function(*sets[0])[0], exact)
            if size <= 4096 and name != "inf_cl":
                graphs[name] = replayed(function, sets)
        except torch.cuda.OutOfMemoryError:
            del functions[name]
            too_large[name] = None
        torch.cuda.empty_cache()
    times = milliseconds(functions, sets)
    graph_times = milliseconds(graphs, sets) if graphs else {}
    return {name: (times[name], graph_times.get(name), memory[name], error[name]) for name in times} | too_large


def measure():
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}\n")
    print("| type | N = M | variant | ms | this is faster by | graph ms | extra MB | error | TFLOP/s | of matmul |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.bfloat16, torch.float32):
        ceiling = matmul_ceiling(dtype)
        for size in SIZES:
            results = compare(dtype, size)
            for name, result in results.items():
                cells = [str(dtype).removeprefix("torch."), f"{size:,}", name]
                if result is None:
                    cells += ["out of memory", *[""] * 6]
                else:
                    ms, graph_ms, memory, error = result
                    rate = 4 * 2 * size * size * D / ms / 1e9
                    cells += [f"{ms:.3f}", f"{ms / results['this'][0]:.2f}×", f"{graph_ms:.3f}" if graph_ms else ""]
                    cells += [f"{memory / 1e6:,.0f}", f"{error:.1e}", f"{rate:.0f}", f"{rate / ceiling:.0%}"]
                print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", action="store_true", help="compile only; needs no GPU")
    args = parser.parse_args()
    if triton is None:
        raise UserError("Triton for NVIDIA GPUs is not installed: pip install triton (there is none for macOS)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    if args.static:
        static()
    elif torch.cuda.is_available():
        measure()
    else:
        raise UserError("there is no GPU to measure on; --static compiles without one")


if __name__ == "__main__":
    run_script(main)
