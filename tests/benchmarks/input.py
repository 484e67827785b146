"""How fast images come from disk to a training step, from large JPEGs, in two threads.

    python tests/benchmarks/input.py             # --images 100

Images are 1280 × 1008, smooth with some noise, as an endoscope's; the model takes 224 × 224. Ours includes the random
views (augment.py). Beside it: what Pillow takes to decode and resize them, without any augmentation.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import PIL
import torch
from PIL import Image
from turns import machine

from augment import augment
from cache import NO_CACHE, PixelCache
from data import Sample, training_batches
from images import normalize, prefetch

SIZE, THREADS = 224, 2


def pictures(folder, count):
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((1280, 1008), Image.Resampling.BICUBIC), np.float32)
        pixels = (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
        files.append(folder / f"{i}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=90)
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        files = pictures(Path(folder), args.images)
        samples, prompts = [Sample(file, "x") for file in files], {"x": ["x"]}
        settings = SimpleNamespace(seed=0, batch_size=10, flip="swap")
        steps = -(-args.images // 10)

        def epoch(number, cache):
            batches = training_batches(
                samples, prompts, settings, range(steps * number, steps * (number + 1)), SIZE, THREADS, cache=cache
            )
            for batch in batches:
                images, views, *_ = zip(*batch, strict=True)
                normalize(augment(images, views, SIZE))

        def pillow():
            def load(file):
                return np.asarray(Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))

            for _ in prefetch(load, [files[i : i + 10] for i in range(0, len(files), 10)], THREADS):
                pass

        def images_a_second(work):
            start = time.perf_counter()
            work()
            return args.images / (time.perf_counter() - start)

        cache = PixelCache(folder, 10**10)
        epoch(0, NO_CACHE)
        rates = {"Pillow, decoded and resized": images_a_second(pillow)}
        rates["ours, without a cache"] = images_a_second(lambda: epoch(1, NO_CACHE))
        rates["ours, first epoch"] = images_a_second(lambda: epoch(0, cache))
        later = sorted(images_a_second(lambda k=k: epoch(k, cache)) for k in random.Random(0).sample(range(1, 9), 5))
        rates["ours, later epochs"] = later[2]
    print(f"{args.images} JPEGs of 1280 × 1008, {THREADS} threads; Pillow {PIL.__version__}; {machine()}")
    print("| | images/s | of Pillow |\n| --- | --- | --- |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / next(iter(rates.values())):.1f}× |")


if __name__ == "__main__":
    main()
