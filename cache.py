"""Decoded images, kept in a file while a training runs, so that each image is decoded once and not in every epoch.

The file lies in the run's folder and has no name: it is gone with the process, however that ends. The system keeps as
much of it in memory as has room there. Several processes (parallel.py) have a file each.
"""

import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from errors import reason
from files import stamp_of
from parallel import world


class PixelCache:
    """Arrays of uint8 made of files, at most `limit` bytes of them. Threads may share it.

    What is found is what was made: the same pixels, unless the file has changed since then, which is looked up each
    time. Where the limit is reached, or the disk is full, the rest is made anew each time. A limit of 0: all is.
    """

    def __init__(self, folder=None, limit=0):
        self.limit, self.used, self.places, self.lock = limit, 0, {}, threading.Lock()
        self.file = tempfile.TemporaryFile(buffering=0, dir=folder) if limit else None  # noqa: SIM115, for good

    def get(self, file, kind, make):
        """→ make(), an array of uint8; kind: hashable, tells apart different things made of the same file."""
        if not self.limit:
            return make()
        try:
            stamp = stamp_of(file)
        except OSError:
            return make()  # which will say what is wrong with it
        known, place, shape = self.places.get((file, kind), (None, 0, ()))
        if known == stamp:
            pixels = np.empty(shape, np.uint8)
            with self.lock:  # there is one position in the file for all threads
                self.file.seek(place)
                if self.file.readinto(pixels.data) == pixels.nbytes:
                    return pixels
        pixels = make()
        with self.lock:
            if self.used + pixels.nbytes <= self.limit:
                try:
                    self.file.seek(self.used)
                    if self.file.write(np.ascontiguousarray(pixels).data) < pixels.nbytes:
                        raise OSError("the disk is full")
                    self.places[file, kind] = stamp, self.used, pixels.shape
                    self.used += pixels.nbytes
                except OSError as problem:
                    print(f"note: decoded images are no longer kept ({reason(problem)})", file=sys.stderr)
                    self.limit = self.used
        return pixels


NO_CACHE = PixelCache()


def open_cache(folder, gigabytes=None):
    """→ PixelCache in the folder; without a number, up to a quarter of the free space there. Several processes divide
    it."""
    most = int(1e9 * gigabytes) if gigabytes is not None else shutil.disk_usage(folder).free // 4
    return PixelCache(folder, most // world())


def main():
    """A large JPEG, read three times, with and without a cache."""
    from PIL import Image

    from images import load_image, to_square

    noise = np.random.default_rng(0).integers(0, 256, (63, 80, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "large.jpg")
        Image.fromarray(noise).resize((1280, 1008)).save(file)
        for name, cache in (("without", NO_CACHE), ("with", PixelCache(folder, 10**7))):
            for which in ("first", "second", "third"):
                start = time.perf_counter()
                pixels = cache.get(file, 280, lambda: to_square(load_image(file, 280), 280))
                took = 1000 * (time.perf_counter() - start)
                print(f"{name:7} a cache, {which:6} time: {pixels.shape} in {took:.1f} ms, sum {pixels.sum()}")


if __name__ == "__main__":
    main()
