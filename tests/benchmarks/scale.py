"""How the index grows: time and memory to open it, to append an image, and to search it, by the number of images.

    python tests/benchmarks/scale.py             # --images 10000 100000 1000000

Embeddings are random, of unit length, 512 wide. Each line is measured in a process of its own, which has the index in
its cache of files, but has read none of it.
"""

import argparse
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

D, KEY = 512, "model"


def build(folder, images):
    import torch
    import torch.nn.functional as F

    from index import Index

    torch.manual_seed(0)
    index, hashes = Index(folder, KEY, D), {}
    for first in range(0, images, 10_000):
        numbers = range(first, min(first + 10_000, images))
        contents = [f"{i:064x}" for i in numbers]
        index.add(contents, F.normalize(torch.randn(len(numbers), D), dim=1).half())
        hashes |= {(f"/archive/patient/{i:08}.png", i, i, i): f"{i:064x}" for i in numbers}
    index.save(hashes)


def measure(folder, images, answers):
    import torch
    import torch.nn.functional as F

    from index import Index
    from kernels import top_k

    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}

    def timed(name, work, repeats=1):
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            result = work()
            found.append(time.perf_counter() - start)
        times[name] = statistics.median(found)
        return result

    index = timed("open", lambda: Index(folder, KEY, D))
    assert len(index.row) == images
    query = F.normalize(torch.randn(1, D), dim=1)
    timed("map the rows", lambda: index._map(index.rows_file, images), 5)
    timed("search", lambda: top_k(query, index.rows(), 10, unit_rows=True), 5)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    number, hashes = images, dict(index.hashes)

    def append():
        nonlocal number
        index.add([f"{number:064x}"], F.normalize(torch.randn(1, D), dim=1).half())
        hashes[f"/archive/patient/{number:08}.png", number, number, number] = f"{number:064x}"
        index.save(hashes)
        number += 1

    timed("append", append, 5)
    answers.put((times, (peak - before) / 1e6))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", help="where to put the index meanwhile")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| images | rows, MB | lines, MB | open, s | map the rows, s | search, s | append, s | memory, GB |")
    print("|" + " --- |" * 8)
    for images in args.images:
        folder, answers = Path(tempfile.mkdtemp(dir=args.folder)), context.Queue()
        for target, arguments in ((build, ()), (measure, (answers,))):
            process = context.Process(target=target, args=(folder, images, *arguments))
            process.start()
            if arguments:
                times, memory = answers.get()
            process.join()
        sizes = [sum(f.stat().st_size for f in folder.glob(f"*.{end}")) / 1e6 for end in ("f16", "jsonl")]
        cells = *sizes, *(times[name] for name in ("open", "map the rows", "search", "append")), memory
        print(f"| {images:,} | " + " | ".join(f"{cell:,.3g}" for cell in cells) + " |", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
