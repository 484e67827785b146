"""What the benchmarks share: different ways to do the same take turns, and the median of each counts."""

import platform
import statistics
import time

import torch


def take_turns(ways, repeats):
    """{name: function without arguments} → {name: median seconds}, after a turn that does not count."""
    times = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine():
    """→ a line about this machine."""
    features = getattr(torch.cpu, "get_capabilities", dict)()
    name = features.get("cpu_name") or platform.processor() or platform.machine()
    native = [key for key in ("avx512_bf16", "amx_bf16") if features.get(key)]
    return (
        f"{name} ({', '.join(native) or 'no bfloat16'}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    )
