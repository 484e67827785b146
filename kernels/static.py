"""What the Triton kernels compile to, for GPUs that need not be there: python -m kernels.benchmark --static

A table of registers, shared memory and instructions, and an error where a kernel spills registers or takes more shared
memory than a GPU has. `first_steps.py` explains these words.
"""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from errors import UserError
from kernels import triton_search, triton_slerp, triton_tiles, triton_tiny

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # compute capability: limit of a program
TYPES = (torch.bfloat16, torch.float16, torch.float32)
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
OPTIONS = ("num_warps", "num_stages")
D = 512


class Variant(NamedTuple):
    """A kernel as the operators launch it."""

    name: str
    kernel: object
    shape: dict  # the constants and launch options
    absent: tuple = ()  # arguments that are None
    odd: bool = False  # an odd D: no wide loads


def argument_type(name, dtype):
    """The type of a kernel's argument, as Triton writes it, by the name that it has in all of them."""
    if name in ("N", "M", "D", "Q", "TILES", "first", "stride"):
        return "i32"
    if name in ("labels", "other_labels", "x_labels", "y_labels"):
        return "*i64"
    if name in ("K", "copy"):
        return "*fp32" if dtype == torch.float32 else "*bf16"
    return POINTER[dtype] if name in ("x", "y", "a", "b", "out", "d_out", "da", "db", "gallery") else "*fp32"


def variants(dtype, capability):
    tile, odd_tile = (triton_tiles.tile_shape(dtype, divmod(capability, 10), even) for even in (True, False))
    row = triton_slerp.launch_shape(D)
    found, labels = [], ("x_labels", "y_labels")
    for N, M in ((32, 7), (32, 20), (64, 64)):
        shape = triton_tiny.tiny_shape(N, M, dtype)
        name = f"tiny, {shape['BLOCK_N']} × {shape['BLOCK_M']}"
        found.append(Variant(name, triton_tiny.tiny_kernel, shape, labels if N == M else ()))
    measure = {"BLOCK_N": 16, "BLOCK": 128}
    copied = () if dtype == torch.float16 else ("copy",)
    found.append(Variant("measure", triton_tiles.measure_kernel, measure, copied))
    found.append(Variant("measure, pairs", triton_tiles.measure_kernel, measure, ("labels", "other_labels", *copied)))
    for name in ("statistics", "gradient"):
        kernel = getattr(triton_tiles, f"{name}_kernel")
        found.append(Variant(name, kernel, {**tile, "EVEN": True}))
        found.append(Variant(f"{name}, pairs", kernel, {**tile, "EVEN": True}, labels))
        found.append(Variant(f"{name}, odd D", kernel, {**odd_tile, "EVEN": False}, odd=True))
    found.append(Variant("combine", triton_tiles.combine_kernel, {"BLOCK_N": 64, "BLOCK_T": 16}))
    found.append(Variant("loss", triton_tiles.loss_kernel, {"BLOCK": 1024}))
    found.append(Variant("project", triton_tiles.project_kernel, row))
    found.append(Variant("slerp forward", triton_slerp.forward_kernel, row))
    found.append(Variant("slerp backward", triton_slerp.backward_kernel, row))
    found.append(Variant("cosines", triton_search.cosines_kernel, triton_search.search_shape(64)))
    walk = {"tiny, 64 × 64", "measure", "project", "slerp forward", "slerp backward", "cosines"}  # along D, too
    return found + [v._replace(name=f"{v.name}, odd D", odd=True) for v in found if v.name in walk]


def build(variant, dtype, capability):
    """Compile for a GPU that need not be there → {registers, spilled bytes, shared bytes, tensor-core instructions; and
    of statistics and gradient, instructions behind the walk along the features, for each of a thread's entries}."""
    options = {key: value for key, value in variant.shape.items() if key in OPTIONS}
    constants = {key: value for key, value in variant.shape.items() if key not in OPTIONS}
    constants |= dict.fromkeys(variant.absent)
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in constants else argument_type(name, dtype) for name in names}
    # Triton looks at the arguments of a call: addresses, and numbers, that are multiples of 16 allow wide loads.
    wide = {"stride"} if variant.odd else {"stride", "D"}
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n in wide}
    source = ASTSource(variant.kernel, signature, constants, even)
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
    shape, found = variant.shape, {}
    if "EVEN" in shape:
        entries = shape["BLOCK_N"] * shape["BLOCK_M"] / (32 * shape["num_warps"])
        found["behind the loop"] = behind_the_last_loop(code) / entries
    return found | {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "shared": compiled.metadata.shared,
        "tensor-core": len(re.findall(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA)\b", code)),
    }


def behind_the_last_loop(code):
    """Disassembled code → how many instructions stand between the last jump backwards and the end."""
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    end = next(i for i, (_, text) in enumerate(instructions) if text.strip() == "EXIT")
    jumps = [(i, int(at, 16), re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for i, (at, text) in enumerate(instructions)]
    back = [i for i, at, jump in jumps[:end] if jump and int(jump[1], 16) < at]
    return end - max(back, default=0)


def report(case):
    """(type, capability) → {name of a variant: what `build` says}."""
    return {variant.name: build(variant, *case) for variant in variants(*case)}


def main():
    print("Registers of a thread, KiB of shared memory and tensor-core instructions of a program (limits in KiB); and")
    print("how many instructions of a thread stand behind the walk along the features, for each entry of its tile:\n")
    print("| kernel | type |", " | ".join(f"sm_{sm} ({limit})" for sm, limit in SHARED_KIB.items()), "|")
    print("| --- | --- |" + " --- |" * len(SHARED_KIB))
    cases = [(dtype, capability) for dtype in TYPES for capability in SHARED_KIB]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        reports = dict(zip(cases, pool.map(report, cases), strict=True))
    too_much = []
    for dtype in TYPES:
        for name in reports[dtype, 90]:
            cells = [name, str(dtype).removeprefix("torch.")]
            for capability, limit in SHARED_KIB.items():
                found = reports[dtype, capability][name]
                cell = f"{found['registers']}, {found['shared'] / 1024:.0f}, {found['tensor-core']}"
                if "behind the loop" in found:
                    cell += f", {found['behind the loop']:.1f}"
                if found["spilled"]:
                    cell += f", spills {found['spilled']} B"
                cells.append(cell)
                # The tiles of sm_90 spill, and are faster all the same: `triton_tiles.tile_shape`.
                tile = name.startswith(("statistics", "gradient")) and capability == 90 and dtype != torch.float32
                allowed = 100 if "odd" in name else 1300 if tile else 0
                if found["spilled"] > allowed or found["shared"] > limit * 1024:
                    too_much.append(f"{name} of {dtype} on sm_{capability}: {found}")
            print(f"| {' | '.join(cells)} |")
    if too_much:
        raise UserError(f"spilled registers or too much shared memory: {'; '.join(too_much)}")
