"""Image files and texts become embeddings, batch by batch."""

import sys

import numpy as np
import torch

from build import prepare
from cache import NO_CACHE
from cli import Progress
from errors import UserError, counted, shown
from images import load_image, normalize, prefetch, to_square
from parallel import gather_objects, share, world


@torch.inference_mode()
def encode_batches(model, files, device, batch_size, workers, what, bad=None, cache=NO_CACHE):
    """Yield (files, their (B, embed_dim) float32 fused embeddings on the CPU, not of unit length) of each batch.

    Files that cannot be read are left out and put into `bad`, {file: why}. Without it they are a UserError. what: the
    work's name in the progress lines, None for none."""
    if files:
        prepare(model, "visual")
    size, how = model.clip.config.image_size, model.clip.config.preprocessing

    def pixels_of(file):
        try:
            return cache.get(file, (size, how), lambda: to_square(load_image(file), size, how))
        except UserError as problem:
            if bad is None:
                raise
            bad[file] = str(problem)

    batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    progress, done = Progress(len(files), sys.stderr), 0
    for batch, arrays in zip(batches, prefetch(pixels_of, batches, workers), strict=True):
        good = [(file, array) for file, array in zip(batch, arrays, strict=True) if array is not None]
        if good:
            read, arrays = zip(*good, strict=True)
            pixels = normalize(torch.from_numpy(np.stack(arrays)).to(device), how)
            yield read, model.encode_image(pixels).cpu()
        done += len(batch)
        if what:
            progress(done, what)


def encode_together(model, files, device, batch_size, workers, what, bad=None, cache=NO_CACHE):
    """As `encode_batches`, on every process (parallel.py), each of which encodes its share."""
    if world() == 1:
        yield from encode_batches(model, files, device, batch_size, workers, what, bad, cache)
        return
    progress, chunk = Progress(len(files), sys.stderr), 32 * batch_size * world()
    for first in range(0, len(files), chunk):
        mine, failed = share(files[first : first + chunk]), None if bad is None else {}
        encoded = list(encode_batches(model, mine, device, batch_size, workers, None, failed, cache))
        for batches, its_failed in gather_objects((encoded, failed)):
            yield from batches
            if bad is not None:
                bad |= its_failed
        progress(min(first + chunk, len(files)), what)


def encode_images(model, files, device, batch_size, workers, what="encoding", bad=None, cache=NO_CACHE):
    """Image files → (N, embed_dim) float32; see `encode_batches`."""
    row = {}
    for some, features in encode_together(model, files, device, batch_size, workers, what, bad, cache):
        row |= zip(some, features, strict=True)
    rows = [row[file] for file in files if file in row]
    return torch.stack(rows) if rows else torch.empty(0, model.clip.config.embed_dim)


@torch.inference_mode()
def encode_texts(model, tokenizer, texts, device):
    """Texts → (N, embed_dim) float32 embeddings on the CPU, not of unit length."""
    prepare(model, "text")
    tokens = tokenizer(texts, model.clip.config.context_length)
    tokens = tokens[:, : tokens.argmax(1).max() + 1]  # no padding behind the longest
    return torch.cat([model.encode_text(part.to(device)).cpu() for part in tokens.split(256)])


def describe_cut(tokenizer, texts, context_length):
    """→ a line about the texts that are too long, or nothing where there are none."""
    cut = too_long(tokenizer, dict.fromkeys(texts), context_length)
    what = f" and {counted(len(cut) - 1, 'other')}" if len(cut) > 1 else ""
    return f"note: too long for the model, so that its end is cut: {shown(cut[0][:300])}{what}\n" if cut else ""


def too_long(tokenizer, texts, context_length):
    """→ those of the texts that the text tower cannot see whole. The start and end tokens take two places."""
    return [text for text in texts if len(tokenizer.encode(text)) > context_length - 2]
