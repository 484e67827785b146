"""From an image file to pixels.

file ─ load_image ─ Pillow image ─ to_square ─ uint8 pixels ─ normalize ─ float pixels for CLIP

For training, augment.py stands before the last step.
"""

import io
import math
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from errors import UserError, advice, reason

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
# By content, whatever a file's name says. Others that Pillow knows may start a program, as EPS does Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
# How a rectangular picture becomes the square that a model takes. crop: its middle; pad: all of it, with black bars;
# squash: all of it, out of proportion; field: the scope's bright field of view, padded.
FRAMES = ("crop", "pad", "squash", "field")
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its pixels; the defaults are OpenAI's. mean, std: of red, green and blue over the images
    that it was trained on, of values from 0 to 1. It takes pixels less the mean, divided by the standard deviation."""

    frame: str = "crop"
    resample: str = "bicubic"
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


OPENAI = Preprocessing()
FIELD = 24  # of 255 levels; what is darker counts as black
LARGE, LARGEST, LONGEST = 12_000_000, 50_000_000, 100_000  # pixels; an endoscope's 4K has 8,300,000
MOST_FOLDERS = 100_000
ONE_AT_A_TIME = threading.Lock()


def find_images(folder):
    """All image files below a folder, sorted. Hidden files and leftovers of macOS archives are skipped."""
    return find_files(folder, lambda name: Path(name).suffix.lower() in IMAGE_SUFFIXES)


def find_files(folder, wanted):
    """Files, at any depth below the folder, whose names are `wanted`, sorted. Links are followed. Raises UserError
    where a folder cannot be read: its files would be missing without a word."""

    def fail(problem):
        raise UserError(f"cannot read {problem.filename} ({reason(problem)}); {advice(problem)}") from None

    def in_view(names):
        return [name for name in names if not name.startswith((".", "__MACOSX"))]

    found, above = [], {}  # above: folder → the real paths of itself and of those above it
    for place, folders, names in os.walk(Path(folder), onerror=fail, followlinks=True):
        real, outer = os.path.realpath(place), above.get(os.path.dirname(place), frozenset())
        if real in outer:  # a link to a folder that it lies in, round and round
            folders.clear()
            continue
        above[place] = outer | {real}
        if len(above) > MOST_FOLDERS:
            raise UserError(f"{folder} has more than {MOST_FOLDERS:,} folders, by links perhaps; name a smaller one")
        folders[:] = in_view(folders)
        found += [Path(place, name) for name in in_view(names) if wanted(name)]
    return sorted(found)


def load_image(path, least=None):
    """Open an image file, upright by its EXIF orientation, with 8 bits a channel; of several frames the first. path: of
    the file, or what was read of one, a BytesIO. Raises UserError.

    least: a JPEG may be decoded at a half, a quarter or an eighth of its size, which is faster, as long as both sides
    keep so many pixels."""
    try:
        if not isinstance(path, io.BytesIO) and not os.path.isfile(path):  # a pipe may never end
            raise ValueError("there is no such file")
        with Image.open(path, formats=IMAGE_FORMATS) as file:
            if file.width * file.height > LARGEST or max(file.size) > LONGEST:  # before they are decoded
                raise ValueError(
                    f"{file.width} × {file.height} are more than {LARGEST:,} pixels, or {LONGEST:,} a side"
                )
            if least:
                file.draft("RGB", (least, least))  # only a JPEG knows how to
            if file.width * file.height <= LARGE:
                return _to_8_bits(ImageOps.exif_transpose(file))
            with ONE_AT_A_TIME:  # several at once could fill the memory
                image = to_rgb(_to_8_bits(ImageOps.exif_transpose(file)))
                return image.reduce(math.ceil(math.sqrt(file.width * file.height / LARGE)))
    except Exception as problem:  # a damaged file makes a decoder stumble over anything
        unknown = isinstance(problem, UnidentifiedImageError)
        why = f"it is none of {', '.join(IMAGE_FORMATS)}" if unknown else reason(problem)
        raise UserError(f"cannot read the image {path} ({why}); repair it or move it away") from None


def _to_8_bits(image):
    """Grey images of more bits, which Pillow would clip at 255: white ones. Many cameras use 10, 12 or 14 of 16 bits,
    and no file says so: it is told by the brightest pixel. Floating-point values of at most 1 are read as 0 (black) to
    1 (white)."""
    if image.mode[0] not in "IF":
        return image
    values = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
    most = float(values.max())
    if image.mode == "F" and most <= 1:
        values *= 255
    elif most > 255:
        bits = 2 * -(-int(most).bit_length() // 2)
        values /= 2.0 ** (bits - 8)
    return Image.fromarray(values.astype(np.uint8))


def to_rgb(image):
    """Any Pillow mode → RGB, transparency on white."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_square(image, size=224, how=OPENAI):
    """Pillow image → (size, size, 3) uint8, scaled (antialiased) and cut or padded as the Preprocessing says."""
    return cut_square(scaled(image, size, how)).copy()


def cut_square(pixels, place=0.5):
    """(H, W, 3) → a square of it, as large as possible. place: how far along the longer side, from 0 to 1."""
    height, width, _ = pixels.shape
    size = min(height, width)
    top, left = int(place * (height - size)), int(place * (width - size))
    return pixels[top : top + size, left : left + size]


def scaled(image, size, how):
    """Pillow image → uint8, scaled (antialiased): (size, size, 3), or where it is still to be cut, its shorter side
    `size` long."""
    resample = RESAMPLING[how.resample]
    if how.frame == "crop":
        return np.asarray(_scale_shorter(image, size, resample))
    image = to_rgb(image)
    if how.frame == "squash":
        return np.asarray(image.resize((size, size), resample))
    if how.frame == "field":
        image = crop_to_field(image)
    longest = max(image.size)
    width, height = (max(1, round(size * side / longest)) for side in image.size)
    square = Image.new("RGB", (size, size))
    square.paste(image.resize((width, height), resample), ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def _scale_shorter(image, size, resample):
    short = min(image.size)
    if max(image.size) > 32 * short:  # a thread, whose scaled copy would fill the memory: its middle
        left, top = (max(0, side - 32 * short) // 2 for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    image = to_rgb(image)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    return image.resize((width, height), resample)


def crop_to_field(image):
    """Cut away the black around an endoscope's bright field of view, a disk or an octagon: the rows and columns at the
    edges that have less than a fifth as many pixels brighter than FIELD as the one that has most. So a few letters
    beside the field don't count as it. Where hardly anything is left, as of a dark picture, nothing is cut away."""
    small = image.convert("L").reduce(max(1, max(image.size) // 256))
    bright = np.asarray(small) > FIELD
    ends = []
    for axis, side in ((0, image.width), (1, image.height)):
        counts = bright.sum(axis)
        inside = np.flatnonzero(counts > counts.max() / 5)
        if len(inside) < bright.shape[1 - axis] / 4:
            return image
        scale = side / bright.shape[1 - axis]
        ends.append((int(inside[0] * scale), math.ceil((inside[-1] + 1) * scale)))
    (left, right), (top, bottom) = ends
    return image.crop((left, top, right, bottom))


def normalize(pixels, how=OPENAI):
    """(…, H, W, 3) from 0 to 255 → (…, 3, H, W) float32: less the mean, divided by the deviation, on its device."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (how.mean, how.std))
    return (pixels.movedim(-1, -3).contiguous() / 255).sub_(mean).div_(std)


def preprocess(image, size=224, how=OPENAI):
    """Pillow image → (3, size, size) float32, as OpenAI's CLIP takes it, or another model.

    The behaviour matched is that of transformers' CLIPImageProcessor, which differs from OpenAI's transform by turning
    images to RGB first, transparency on white, and by rounding down where the crop's margin is odd; for pad, that of
    open_clip's resize mode "longest".
    """
    return normalize(torch.from_numpy(to_square(image, size, how)), how)


# ---------------------------------------------------------------------------------------------------------------------
# Duplicates

NEAR_BITS, NEAR_GREYS = 8, 2.0  # of 64 bits; of 255 levels


def look(image):
    """Pillow image → what its copies share, whatever their size and compression: a *difference hash*, 64 bits that say
    which pixels of an 8 × 8 thumbnail are brighter than their left neighbours, (8,) uint8; and a colour thumbnail,
    (768,) float32."""
    image = to_rgb(image)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    thumbnail = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)
    return np.packbits(grey[:, 1:] > grey[:, :-1]), thumbnail.ravel()


def look_at(files, workers):
    """Decode every image file once → {file: its `look`}, {file that cannot be read: why}."""

    def try_it(file):
        try:
            return look(load_image(file))
        except UserError as problem:
            return str(problem)

    files = list(dict.fromkeys(files))
    chunks = [files[i : i + 64] for i in range(0, len(files), 64)]
    answers = dict(zip(files, (a for chunk in prefetch(try_it, chunks, workers) for a in chunk), strict=True))
    bad = {file: answer for file, answer in answers.items() if isinstance(answer, str)}
    return {file: answer for file, answer in answers.items() if file not in bad}, bad


def find_duplicates(looks):
    """{file: its `look`} → lists of those that show the same picture, two or more each: copies, also resized or
    compressed again, but not cropped or mirrored ones. Memory grows with the number of files, time with its square.

    Two are copies if their hashes differ in at most NEAR_BITS, and their thumbnails by at most NEAR_GREYS on average.
    Saved again as JPEG of quality 50 at 0.7 of the size, an image differs by up to 5 bits and 1 level from itself. The
    hash alone would not do: some different phantoms have the same one, but their thumbnails differ by 3.3 levels or
    more. Of 139 frames of real videos no two with similar hashes are nearer than 4 levels.
    """
    # Black frames, of a covered lens say, are no copies: they would tie patients together.
    looks = {file: (bits, thumbnail) for file, (bits, thumbnail) in looks.items() if thumbnail.std() > NEAR_GREYS}
    if not looks:
        return []
    files, looks = list(looks), list(looks.values())
    bits = np.unpackbits(np.stack([bits for bits, _ in looks]), axis=1).astype(np.float32)  # (N, 64)
    thumbnails = np.stack([thumbnail for _, thumbnail in looks])  # (N, 768)
    parent = list(range(len(files)))  # a forest: each image points towards the first one that it equals

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    signs = 2 * bits - 1  # ±1: the product of two hashes is 64 less twice the bits that differ
    for i in range(len(files) - 1):
        near = i + 1 + np.flatnonzero(signs[i + 1 :] @ signs[i] >= 64 - 2 * NEAR_BITS)
        for j in near[np.abs(thumbnails[near] - thumbnails[i]).mean(1) <= NEAR_GREYS]:
            parent[root(j)] = root(i)
    same = {}
    for i, file in enumerate(files):
        same.setdefault(root(i), []).append(file)
    return [members for members in same.values() if len(members) > 1]


# ---------------------------------------------------------------------------------------------------------------------
# Threads


def prefetch(function, batches, workers):
    """Yield [function(item) for item in batch] for each batch, in order, while `workers` threads prepare the next ones.

    Threads, not processes: Pillow decodes and resizes without holding Python's lock, and there is nothing to pickle, no
    start-up to wait for, and an exception arrives as it was raised.
    """
    if workers == 0:
        yield from ([function(item) for item in batch] for batch in batches)
        return
    pool, pending = ThreadPoolExecutor(workers), deque()
    try:
        for batch in batches:
            pending.append([pool.submit(function, item) for item in batch])
            if len(pending) > 2:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def main():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (480, 640, 3), dtype=np.uint8))
    pixels = preprocess(image)
    print(f"image {image.size} → pixels {tuple(pixels.shape)}, mean {pixels.mean():.2f}, std {pixels.std():.2f}")


if __name__ == "__main__":
    main()
