"""How fast images are found on a CPU, beside FAISS's exact search and the bare PyTorch lines.

    python tests/benchmarks/search.py            # a million images; --images 100000 for fewer

The gallery is random, of unit length, 512 wide: in float16, as the index keeps it, for us; in float32 for the others.
They take turns, and the median counts.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import faiss
import torch
import torch.nn.functional as F
from turns import machine, take_turns

from kernels import search

D, K = 512, 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    gallery = torch.empty(args.images, D)
    for part in gallery.split(50_000):
        part.copy_(F.normalize(torch.randn_like(part), dim=1))
    half, index = gallery.half(), faiss.IndexFlatIP(D)
    index.add(gallery.numpy())
    faiss.omp_set_num_threads(torch.get_num_threads())
    ways = {
        "ours": lambda queries: search.top_k(queries, half, K, unit_rows=True),
        "ours, rows of any length": lambda queries: search.top_k(queries, half, K),
        "FAISS IndexFlatIP": lambda queries: index.search(queries.numpy(), K),
        "matmul and topk": lambda queries: (queries @ gallery.T).topk(K),
    }
    print(f"{args.images:,} images; {machine()}, FAISS {faiss.__version__}")
    print("| queries | | ms | of FAISS |\n| --- | --- | --- | --- |")
    for count in (1, 64):
        queries = F.normalize(torch.randn(count, D), dim=1)
        exact = ways["matmul and topk"](queries).values
        assert (ways["ours"](queries)[0] - exact).abs().max() < 1e-3
        turns = {name: lambda way=way, queries=queries: way(queries) for name, way in ways.items()}
        median = {name: 1000 * seconds for name, seconds in take_turns(turns, args.repeats).items()}
        for name, ms in median.items():
            print(f"| {count} | {name} | {ms:,.0f} | {ms / median['FAISS IndexFlatIP']:.2f}× |")


if __name__ == "__main__":
    main()
