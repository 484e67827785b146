"""The chunked contrastive loss beside the eager one on the CPU: time and extra memory of forward + backward.

    python tests/benchmarks/reference_loss.py [--size 8192] [--dim 512] [--repeats 5]

Times are medians over calls that take turns in one process. Extra memory is what the operating system saw: how much a
fresh process's peak resident memory grew over one forward + backward (after a call on few rows, which loads the
libraries), less the two gradients that every variant hands back. A fresh process, because a freed block stays with the
allocator and a later peak could hide in it; resident memory, because it holds the matrix products' own buffers too.
Targets: at most 1/20 of the eager loss's extra memory, at most 1.3 times its time.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from kernels.reference import contrastive_loss


def eager_loss(x, y, scale):
    """The usual lines: the whole matrix and two cross entropies."""
    S = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(len(x))
    return (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2


LOSSES = {"eager": eager_loss, "chunked": contrastive_loss}


def features(size, dim):
    torch.manual_seed(0)
    return [torch.randn(size, dim, requires_grad=True) for _ in range(2)]


def forward_backward(loss, x, y):
    torch.autograd.grad(loss(x, y, torch.tensor(100.0)), (x, y))


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def extra_memory(name, size, dim):
    """Run in a process of its own."""
    x, y = features(size, dim)
    forward_backward(LOSSES[name], x[:64], y[:64])
    before = peak_bytes()
    forward_backward(LOSSES[name], x, y)
    return peak_bytes() - before - 2 * x.nbytes


def seconds(size, dim, repeats):
    x, y = features(size, dim)
    times = {name: [] for name in LOSSES}
    for repeat in range(1 + repeats):
        for name, loss in LOSSES.items():
            start = time.perf_counter()
            forward_backward(loss, x, y)
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--size", 8192), ("--dim", 512), ("--repeats", 5)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a new process for each task
        memory = {name: pool.apply(extra_memory, (name, args.size, args.dim)) for name in LOSSES}
    times = seconds(args.size, args.dim, args.repeats)

    print(f"N = M = {args.size}, D = {args.dim}, float32, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'loss':8} {'seconds':>8} {'extra MiB':>10}")
    for name in LOSSES:
        print(f"{name:8} {times[name]:8.2f} {memory[name] / 2**20:10.0f}")
    print(f"{'ratio':8} {times['chunked'] / times['eager']:8.2f} {memory['chunked'] / memory['eager']:10.3f}")


if __name__ == "__main__":
    main()
