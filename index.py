"""The index: the embeddings of images, kept on disk so that each image is encoded once.

    runs/<name>/index.safetensors

It holds a row for each content, of unit length, in float16. That is half of float32's bytes to keep and to read, and
its rounding moves a cosine by less than 0.001. The metadata are the model's fingerprint, the contents' hashes, and the
files: path, size, times, content.

The rows are *mapped*: the file counts as memory, and what is not looked at is never read.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from checkpoint import write_safetensors
from encoding import encode_together
from errors import UserError, reason
from files import parse_json, sha256, stamp_of
from parallel import from_first, rank

NAME = "index.safetensors"


def index_images(run, model, files, device, batch_size, workers):
    """Image files → those that can be read, their (N, embed_dim) embeddings, of unit length, in float16, and {file that
    cannot: why}.

    Embeddings are kept in the run's index by the hash of a file's content, so that a moved or copied image need not be
    encoded again. A file is read for its hash only if its stamp (files.py) differs from the index. The index also holds
    the model's fingerprint: another model makes it anew. Several processes (parallel.py) share the work.
    """
    index, key = run / NAME, f"{model.fingerprint} {model.precision}"
    hashes, row, kept = _read(index, key, model.clip.config.embed_dim)
    before, fresh = len(hashes), []
    hashes, stamps, bad = from_first(lambda: _look(files, hashes))
    new = from_first(lambda: [file for file, stamp in stamps.items() if hashes[stamp] not in row])
    saved = time.monotonic()
    try:
        for batch, features in encode_together(model, new, device, batch_size, workers, "indexing", bad):
            first = len(kept) + sum(map(len, fresh))
            row |= {hashes[stamps[file]]: first + i for i, file in enumerate(batch)}
            fresh.append(F.normalize(features, dim=1).half())
            if time.monotonic() - saved > 60:
                _write(index, key, hashes, row, torch.cat([kept, *fresh]), stamps)
                saved = time.monotonic()
    finally:  # an interrupted index keeps what it has
        rows = torch.cat([kept, *fresh]) if fresh else kept
        if new or len(hashes) > before:
            _write(index, key, hashes, row, rows, stamps)
    good = [file for file, stamp in stamps.items() if hashes[stamp] in row]
    if not good:
        raise UserError(f"none of the {len(files):,} images can be read, {next(iter(bad.values()))}")
    chosen = [row[hashes[stamps[file]]] for file in good]
    return good, rows if chosen == list(range(len(rows))) else rows[torch.tensor(chosen)], bad


def _look(files, hashes):
    """→ {stamp: hash} with those of the files, {file: its stamp}, {file that cannot be read: why}."""
    stamps, bad = {}, {}
    for file in files:
        try:
            stamp = stamp_of(file)
            hashes[stamp] = hashes.get(stamp) or _hash(file)
            stamps[file] = stamp
        except OSError as problem:
            bad[file] = f"cannot read the image {file} ({reason(problem)}); repair it or move it away"
    return hashes, stamps, bad


def _hash(file):
    if not file.is_file():  # a pipe may never end
        raise OSError("it is no file")
    return sha256(file)


def _read(file, key, width):
    """→ {stamp: hash}, {hash: row} and the rows, (n, width) float16; empty where the index is missing, damaged or of
    another model."""
    try:
        with open(file, "rb"), safe_open(file, "pt") as f:
            info, features = parse_json(f.metadata()["info"]), f.get_tensor("features")
        row = {content: i for i, content in enumerate(info["hashes"])}
        hashes = {(str(path), *map(int, numbers)): content for path, *numbers, content in info["images"]}
        fits = features.shape == (len(info["hashes"]), width) and features.dtype == torch.float16
        fits = fits and len(row) == len(features)  # no content is there twice
        if (
            info["model"] == key
            and fits
            and row.keys() >= set(hashes.values())
            and features.sum(dtype=torch.float32).isfinite()
        ):
            return hashes, row, features
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        pass
    return {}, {}, torch.empty(0, width, dtype=torch.float16)


def _write(file, key, hashes, row, rows, stamps):
    """Images of other galleries stay in the index; those that are gone or have changed are dropped."""
    if rank():
        return
    now = {stamp[0]: stamp for stamp in stamps.values()}
    kept = {}
    for stamp, content in hashes.items():
        current = now[stamp[0]] == stamp if stamp[0] in now else os.path.exists(stamp[0])
        if current and content in row:
            kept[stamp] = content
    contents = list(dict.fromkeys(kept.values()))
    if contents:
        features = rows[torch.tensor([row[content] for content in contents])]
        images = [[*stamp, content] for stamp, content in kept.items()]
        try:
            write_safetensors(file, {"features": features}, {"model": key, "hashes": contents, "images": images})
        except UserError as problem:  # the search needs no index
            print(f"note: {problem}", file=sys.stderr)


def main():
    """Two images and a copy of one, indexed twice by the small CLIP."""
    from PIL import Image

    from build import load_base
    from fusion import FusedCLIP

    model = FusedCLIP(load_base("phantom")[0], 2, "none").eval()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{name}.png") for name in ("red", "blue", "copy")]
        for file, colour in zip(files, ("red", "blue", "red"), strict=True):
            Image.new("RGB", (64, 48), colour).save(file)
        for which in ("first", "second"):
            start = time.perf_counter()
            _, rows, _ = index_images(Path(folder), model, files, torch.device("cpu"), 2, 0)
            took = f"in {time.perf_counter() - start:.3f} s"
            print(f"{which} time: {tuple(rows.shape)} {rows.dtype} {took}; cosines {(rows @ rows[0]).tolist()}")


if __name__ == "__main__":
    main()
