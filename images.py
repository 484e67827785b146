"""From an image file to pixels, and what mirroring an image does to the words about it.

file ─ load_image ─ Pillow image ─ resize_and_crop, or augment ─ uint8 pixels ─ normalize ─ float pixels for CLIP
"""

import random
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
# By content, whatever a file's name says. Others that Pillow knows may start a program, as EPS does Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
# Mean and standard deviation of red, green and blue over CLIP's training images, of values from 0 to 1. CLIP expects
# pixels with the mean subtracted and divided by the deviation.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def find_images(folder):
    """All image files below a folder, sorted; hidden files and the debris of macOS archives are passed over."""
    return find_files(folder, lambda file: file.suffix.lower() in IMAGE_SUFFIXES)


def find_files(folder, wanted):
    return sorted(
        file
        for file in Path(folder).rglob("*")
        if wanted(file)
        and not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def load_image(path):
    """Open an image file, upright by its EXIF orientation; 16-bit grey is brought to 8 bits. Raises UserError."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as file:
            image = ImageOps.exif_transpose(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise UserError(f"cannot read the image {path} ({reason}); repair it or move it away") from None
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold them; Pillow would clip at 255: a white image
        values = np.asarray(image)
        image = Image.fromarray((values >> 8 if values.max() > 255 else values).clip(0, 255).astype(np.uint8))
    return image


def to_rgb(image):
    """Any Pillow mode → RGB, transparency on white."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_and_crop(image, size=224):
    """Pillow image → (size, size, 3) uint8: the shorter side to `size` (bicubic, antialiased), then the centre."""
    image = to_rgb(image)
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.array(image)


def normalize(pixels):
    """(…, H, W, 3) uint8 → (…, 3, H, W) float32, CLIP-normalized, on the same device."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels.float() / 255 - mean) / std).movedim(-1, -3).contiguous()


def preprocess(image, size=224):
    """Pillow image → (3, size, size) float32, as OpenAI's CLIP takes it.

    The behaviour matched is that of transformers' CLIPImageProcessor, which differs from OpenAI's transform by turning
    images to RGB first, transparency on white, and by rounding down where the crop's margin is odd.
    """
    return normalize(torch.from_numpy(resize_and_crop(image, size)))


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation

MIRRORED = {"left": "right", "right": "left", "trái": "phải", "phải": "trái"}  # English and Vietnamese
SIDE = re.compile(rf"(?<![^\W_])({'|'.join(MIRRORED)})(?![^\W_])", re.IGNORECASE)
CLOCK = re.compile(r"\b\d+(?:\s*(?:[-–,/&]|and|or|to)\s*\d+)*(?=\s*o['’]clock)", re.IGNORECASE)  # "5 to 7 o'clock"


def mirror_text(text):
    """Swap left and right in a label or caption, hours of the clock included: what it says of the mirrored image."""

    def swap_side(match):
        word = match[0]
        other = MIRRORED.get(word.lower(), word)
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    def swap_hour(match):
        return str(12 - int(match[0]) % 12) if 1 <= int(match[0]) <= 12 else match[0]

    text = SIDE.sub(swap_side, text)
    return CLOCK.sub(lambda hours: re.sub(r"\d+", swap_hour, hours[0]), text)


def augment(image, size, rng, flip):
    """Pillow image → (size, size, 3) uint8: a random crop (half the area or more), a rotation of up to 15°, brightness,
    contrast and saturation within 20 %, and, if `flip`, mirrored. rng: a random.Random."""
    image = to_rgb(image)
    scale, aspect = rng.uniform(0.5, 1) ** 0.5, rng.uniform(3 / 4, 4 / 3) ** 0.5
    side = min(image.size)
    width, height = min(side * scale * aspect, image.width), min(side * scale / aspect, image.height)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)  # black corners, as around a scope's field
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(0.8, 1.2))
    return np.array(ImageOps.mirror(image) if flip else image)


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


def find_duplicates(files, workers):
    """Image files → lists of those that show the same picture, two or more each: copies, also resized or compressed
    again, but not cropped or mirrored ones. Memory grows with the number of files, time with its square.

    Two are copies if their hashes differ in at most NEAR_BITS, and their thumbnails by at most NEAR_GREYS on average.
    Saved again as JPEG of quality 50 at 0.7 of the size, an image differs by up to 5 bits and 1 level from itself. The
    hash alone would not do: some different phantoms have the same one, but their thumbnails differ by 3.3 levels or
    more. Of 139 frames of real videos no two with similar hashes are nearer than 4 levels.
    """
    files = list(dict.fromkeys(files))
    if not files:
        return []
    chunks = [files[i : i + 64] for i in range(0, len(files), 64)]
    looks = [pair for chunk in prefetch(lambda file: look(load_image(file)), chunks, workers) for pair in chunk]
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
    print(f"augmented {augment(image, 224, random.Random(0), flip=True).shape}")
    caption = "the left eardrum, cone of light at 7 o'clock"
    print(f"mirrored, {caption!r} becomes {mirror_text(caption)!r}")


if __name__ == "__main__":
    main()
