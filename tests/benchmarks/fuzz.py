"""Damaged and hostile inputs by the thousand: which end in a traceback, hang, or take gigabytes?

    python tests/benchmarks/fuzz.py --cases 1200        # of each kind; --seed 1 for others

A case is *fine* (exit status 0, or 1 with skipped images) or *refused* (2, and one line on standard error). Everything
else is a defect, and is printed with its seed: a traceback, more than 10 s, more than 2 GB, a file written elsewhere.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from hostile import Hostile
from shapes import SHAPES, draw

import train
import trust
from checkpoint import save_clip
from errors import run_script
from model import CLIP, CLIPConfig
from tokenizer import Tokenizer, learn_merges, save_merges

SECONDS, BYTES = 10, 2 * 2**30


def prepare(folder):
    """→ a folder of pictures with a manifest, a small base model, and a run."""
    rng, rows = random.Random(0), ["image,label,caption,group"]
    for label, (place, colour) in SHAPES.items():
        (folder / "pictures/images" / label).mkdir(parents=True)
        for i in range(6):
            draw(place, colour, rng).save(folder / f"pictures/images/{label}/{i}.png")
            rows.append(f'images/{label}/{i}.png,{label},"a {colour} shape, {place}",{label} {i // 2}')
    (folder / "pictures/manifest.csv").write_text("\n".join(rows))
    base = folder / "base"
    base.mkdir()
    save_merges(learn_merges(["red and green shapes on the left and on the right"] * 2, 40), base / "merges.txt")
    sizes = {"image_size": 32, "patch_size": 16, "vision_width": 64, "text_width": 64, "embed_dim": 64}
    clip = CLIP(CLIPConfig(**sizes, vision_layers=2, text_layers=1, vocab_size=len(Tokenizer(base)))).initialize()
    save_clip(clip, base / "model.safetensors")
    trust.NAMED = folder / "named-paths.json"
    sys.argv = ["train.py", "--data", f"{folder}/pictures/manifest.csv", "--weights", str(base), "--steps", "2"]
    sys.argv += ["--run", f"{folder}/run", "--device", "cpu", "--workers", "0"]
    run_script(train.main)
    return folder / "pictures", base, folder / "run"


def peak(reset=False):
    """→ the most memory in bytes that this process had since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


class Hang(BaseException):
    pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=Hostile.KINDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        os.chdir(folder)
        hostile = Hostile(folder, *prepare(folder))
        outside = []

        def watch(event, arguments):
            if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
                path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2] or 0
                writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if writes and not path.startswith((str(folder), "/dev/", "/proc/")):
                    outside.append(path)

        def alarm(*_):
            raise Hang

        sys.addaudithook(watch)
        signal.signal(signal.SIGALRM, alarm)
        total = Counter()
        for kind in args.kinds:
            counts, start, most, slowest = Counter(), time.monotonic(), 0, 0.0
            for case in range(args.cases):
                seed, began = args.seed * 1_000_000 + case, time.monotonic()
                before = peak(reset=True)
                signal.alarm(SECONDS)
                try:
                    status, errors = hostile.case(kind, seed)
                    lines = errors.splitlines()
                    clean = status in (0, 1) or (status == 2 and lines[-1].startswith("error: "))
                    outcome = ("fine" if status in (0, 1) else "refused") if clean else f"status {status}"
                    detail = errors
                except Hang:
                    outcome, detail = "hang", ""
                except Exception:
                    outcome, detail = "traceback", traceback.format_exc()
                finally:
                    signal.alarm(0)
                used, slowest = peak() - before, max(slowest, time.monotonic() - began)
                most = max(most, used)
                outcome = "gigabytes" if used > BYTES else "outside" if outside else outcome
                if outcome not in ("fine", "refused"):
                    print(f"{kind} {seed}: {outcome} {outside} {detail[-1500:]}", flush=True)
                outside.clear()
                counts[outcome] += 1
            total += counts
            seconds = time.monotonic() - start
            print(f"{kind:9} {dict(counts)}", end=", ")
            print(f"most memory {most / 2**20:,.0f} MB, slowest {slowest:.1f} s; {seconds:.0f} s", flush=True)
        print(f"all       {dict(total)}")
        os.chdir("/")


if __name__ == "__main__":
    main()
