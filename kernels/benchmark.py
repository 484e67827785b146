"""How fast the kernels are on a GPU, and what they compile to.

    python -m kernels.benchmark            # on a GPU: time, memory and error beside other ways to compute the same
    python -m kernels.benchmark --quick    # the whole picture, at fewer sizes, in under two minutes
    python -m kernels.benchmark --static   # anywhere: registers, shared memory, instructions (static.py)

A time is a median, taken with GPU events, of the loss forward and backward, of slerp likewise, of a search. The
variants take turns, and each call gets other inputs than the one before. Large ones come from the GPU's memory; small
ones may lie in its cache, as in training, where they have just been computed. *Graph*
is the time as a CUDA graph, which replays launches without Python. Extra memory is what a call takes beyond inputs and
gradients. The error is that of the image gradient, of slerp, of the cosines found, relative, against float64.
*Of the floor*: the loss takes four matrix products, S, S again, K y and Kᵀ x; this is the time that the library's
product would take for them, divided by the time measured.

The variants: *this*; *eager*, the usual lines, for pairs two cross entropies, with labels several positives; eager
after *torch.compile*; and *inf_cl*, where it is installed, which rounds float32 to TF32 and does ten products. The
table replaces the one in README.md.
"""

import argparse
import datetime
import functools
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

import kernels
from errors import UserError, run_script
from kernels import reference, search

try:
    import triton
except ImportError:  # --help works all the same
    triton = None

README = Path(__file__).parent / "README.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # tests run it on the CPU, at toy sizes
D = 512


class Case(NamedTuple):
    """What is computed, and how large. M None: pairs, as many texts as images; with labels else. Of top_k N is the
    number of gallery rows, M that of queries."""

    function: str
    dtype: torch.dtype
    N: int
    M: int | None = None


def cases(quick):
    single, half = torch.float32, torch.bfloat16
    if quick:
        found = [Case("loss", single, 32, 7), Case("loss", single, 256), Case("loss", half, 32, 7)]
        found += [Case("loss", half, 256, 71), *(Case("loss", half, N) for N in (256, 1024, 32768))]
        return [*found, Case("slerp", single, 32), Case("top_k", torch.float16, 1_000_000, 1)]
    found = []
    for dtype in (single, half):
        found += [Case("loss", dtype, N, M) for N, M in ((32, 7), (32, 20), (256, 71))]
        found += [Case("loss", dtype, N) for N in (256, 1024, 4096, 16384, 32768, 65536)]
    found += [Case("slerp", single, N) for N in (32, 4096)]
    return found + [Case("top_k", torch.float16, 1_000_000, Q) for Q in (1, 64)]


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and variants


def inputs(case, seed):
    """→ tensors; those that require a gradient get one."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def features(count):
        return torch.randn(count, D, device=DEVICE, generator=generator).to(case.dtype)

    if case.function == "top_k":
        return features(case.M), features(case.N)
    x, y = features(case.N).requires_grad_(), features(case.M or case.N).requires_grad_()
    if case.function == "slerp":
        return x, y, torch.rand(case.N, device=DEVICE, generator=generator).requires_grad_()
    scale = torch.tensor(100.0, device=DEVICE, requires_grad=True)
    if case.M is None:
        return x, y, scale
    return x, y, scale, torch.arange(case.N, device=DEVICE) % case.M, torch.arange(case.M, device=DEVICE)


def eager_pairs(x, y, scale):
    S = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(x.shape[0], device=x.device)
    return (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2


def eager_labels(x, y, scale, x_labels, y_labels):
    S = (scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T).float()
    P = (x_labels[:, None] == y_labels).float()
    total = 0
    for logits, positive in ((S, P), (S.T, P.T)):
        count = positive.sum(1)
        of_row = -(logits.log_softmax(1) * positive).sum(1) / count.clamp(min=1)
        total = total + of_row.sum() / (count > 0).sum().clamp(min=1)
    return total / 2


def inf_cl(x, y, scale):
    from inf_cl import cal_flash_loss

    x, y = F.normalize(x.float(), dim=1), F.normalize(y.float(), dim=1)
    return (cal_flash_loss(x, y, scale=scale).mean() + cal_flash_loss(y, x, scale=scale).mean()) / 2


def library_top_k(queries, gallery, k):
    return (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).topk(k)


def with_gradients(function):
    """A function of tensors → one that returns its value and gradients, those of a sum where it is no scalar."""

    def call(*arguments):
        value = function(*arguments)
        wanted = [v for v in arguments if v.requires_grad]
        gradients = torch.autograd.grad(value.sum() if value.dim() else value, wanted)
        return value.detach(), *gradients  # a value that holds its graph could not be captured in another stream

    return call


def variants(case):
    """→ {name: function of the inputs that gives a tuple}."""
    if case.function == "top_k":
        return {"this": functools.partial(kernels.top_k, k=10), "eager": functools.partial(library_top_k, k=10)}
    if case.function == "slerp":
        found = {"this": kernels.slerp, "eager": reference.slerp}
    elif case.M is None:
        found = {"this": kernels.contrastive_loss, "eager": eager_pairs, "inf_cl": inf_cl}
    else:
        found = {"this": kernels.contrastive_loss, "eager": eager_labels}
    found["torch.compile"] = torch.compile(found["eager"], dynamic=False)
    return {name: with_gradients(function) for name, function in found.items()}


def exact(case, arguments):
    """What the error is measured against: the image gradient, slerp, or the cosines."""
    double = [v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v for v in arguments]
    if case.function == "top_k":
        return search.top_k(*double, k=10)[0]
    function = reference.slerp if case.function == "slerp" else reference.contrastive_loss
    return with_gradients(function)(*double)[case.function == "loss"]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def milliseconds(functions, sets, seconds):
    """{name: median}; the functions take turns, the inputs too."""
    times, spent, turn = {name: [] for name in functions}, 0.0, 0
    for function in functions.values():
        for _ in range(3):
            function(*sets[0])
    while spent < 1000 * seconds * len(functions) or turn < 5:
        for k, (name, function) in enumerate(functions.items()):
            arguments = sets[(turn * len(functions) + k) % len(sets)]
            if DEVICE == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function(*arguments)
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                start = time.perf_counter()
                function(*arguments)
                times[name].append(1000 * (time.perf_counter() - start))
            spent += times[name][-1]
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def extra_memory(function, arguments):
    """Peak bytes beyond inputs and their gradients."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*arguments)
    gradients = sum(v.nbytes for v in arguments if v.requires_grad)
    return torch.cuda.max_memory_allocated() - before - gradients


def replayed(function, sets):
    """The function as a CUDA graph for each set of inputs."""
    graphs, stream, pool = {}, torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    for arguments in sets:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the first call may compile, which a graph can't hold
            function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            function(*arguments)
        graphs[arguments[0].data_ptr()] = graph
    return lambda x, *_: graphs[x.data_ptr()].replay()


def product_time(case, seconds):
    """Milliseconds that four products of the case's size take at the rate of the library's on large matrices."""
    size = 8192 if DEVICE == "cuda" else 64
    a, b = (torch.randn(size, size, device=DEVICE, dtype=case.dtype) for _ in range(2))
    rate = size**3 / milliseconds({"": torch.mm}, [(a, b)], seconds)[""]
    return 4 * case.N * (case.M or case.N) * D / rate


def reason(problem):
    """An exception → a line that fits into the table."""
    if isinstance(problem, ImportError):
        return "not installed"
    return (str(problem).strip() or repr(problem)).splitlines()[0][:80].replace("|", "/")


def compare(case, seconds):
    """→ {variant: its row's figures, or why there are none}."""
    torch._dynamo.reset()  # it stops compiling after eight sizes
    size = sum(v.nbytes for v in inputs(case, 0))
    sets = [inputs(case, seed) for seed in range(max(2, min(64, 2**28 // size)))]
    functions, figures, graphs = variants(case), {}, {}
    target = exact(case, sets[0])
    for name, function in list(functions.items()):
        try:
            error = (function(*sets[0])[case.function == "loss"].double() - target).norm() / target.norm()
            figures[name] = {"error": error.item()}
            if DEVICE == "cuda":
                figures[name]["memory"] = extra_memory(function, sets[0])
        except Exception as problem:  # a row says so, and the others go on
            del functions[name]
            figures[name] = reason(problem)
            continue
        try:
            if DEVICE == "cuda" and case.N <= 4096 and name != "inf_cl":
                graphs[name] = replayed(function, sets)
        except Exception as problem:
            print(f"no graph of {name}: {reason(problem)}", file=sys.stderr)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    del target
    for name, ms in milliseconds(functions, sets, seconds).items():
        figures[name]["ms"] = ms
    for name, ms in (milliseconds(graphs, sets, seconds) if graphs else {}).items():
        figures[name]["graph"] = ms
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# The table


def heading():
    def output(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=README.parent).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    limit = output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader").split("\n")[0]
    commit = output("git", "describe", "--always", "--dirty")
    versions = f"PyTorch {torch.__version__}, Triton {triton.__version__}"
    return f"{gpu}, power limit {limit}, {versions}, {datetime.date.today()}, commit {commit}"


COLUMNS = ("", "type", "size", "variant", "ms", "of this", "graph ms", "of this", "of the floor", "extra MB", "error")


def rows(case, figures, floor):
    """The lines of the table for a case."""
    size = f"{case.N:,}" + (f" × {case.M:,}" if case.M else "")
    this = figures["this"] if isinstance(figures["this"], dict) else {}
    for name, own in figures.items():
        cells = [case.function, str(case.dtype).removeprefix("torch."), size, name]
        if isinstance(own, str):
            cells += [own, *[""] * 6]
        else:
            for key in ("ms", "graph"):
                known = key in own
                ratio = f"{own[key] / this[key]:.2f}×" if known and key in this else ""
                cells += [f"{own[key]:.3f}" if known else "", ratio]
            cells.append(f"{floor / own['ms']:.0%}" if case.function == "loss" and case.M is None else "")
            cells.append(f"{own['memory'] / 1e6:,.1f}" if "memory" in own else "")
            cells.append(f"{own['error']:.1e}")
        yield f"| {' | '.join(cells)} |"


def measure(chosen, seconds):
    """Measure the cases, print the table as it grows, and return it."""
    lines = [heading(), "", f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    print("\n".join(lines), flush=True)
    for case in chosen:
        try:
            floor = product_time(case, seconds) if case.function == "loss" else 0
            new = list(rows(case, compare(case, seconds), floor))
        except Exception as problem:
            new = list(rows(case, {"this": f"failed: {reason(problem)}"}, 0))
        print("\n".join(new), flush=True)
        lines += new
    return "\n".join(lines)


def write_into_readme(table, file=README):
    """Replace what stands between the two marks."""
    text = file.read_text(encoding="utf-8")
    begin, end = "<!-- measured -->\n", "<!-- /measured -->"
    new = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table}\n\n{end}", text, flags=re.DOTALL)
    file.write_text(new, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter")
    args = parser.parse_args()
    if triton is None:
        raise UserError("Triton for NVIDIA GPUs is not installed: pip install triton (there is none for macOS)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    if args.static:
        from kernels import static

        static.main()
    elif DEVICE == "cuda":
        if torch.cuda.get_device_capability() < (8, 0):
            raise UserError("this GPU is older than Triton's tensor cores (compute capability 8.0); nothing to measure")
        write_into_readme(measure(cases(args.quick), seconds=0.05 if args.quick else 0.2))
    else:
        raise UserError("there is no GPU to measure on; --static compiles without one")


if __name__ == "__main__":
    run_script(main)
