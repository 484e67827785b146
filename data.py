"""Images and labels: reading a data set, splitting it, and turning images into pixels.

A data set is one of
  - a folder with one sub-folder a class (images at any depth below it); a folder of images alone has no labels;
  - a manifest, .csv or .jsonl, with the columns image (relative to the manifest) and label, and optionally caption,
    group (a patient, say: images of one group stay on one side of a split) and split (train, val or test);
  - the ENTRep challenge's folder, told by its cls.json and data.json;
  - the word phantom: synthetic images in that layout, drawn at the first use (phantom.py).
"""

import csv
import json
import os
import random
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from errors import UserError
from phantom import default_dataset
from prompts import ENTREP

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Sample:
    image: Path
    label: str | None = None
    caption: str | None = None
    group: str | None = None
    split: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_dataset(path):
    """Folder, manifest or "phantom" → list of Sample, in a fixed order. Raises UserError where there is none."""
    path = default_dataset() if str(path) == "phantom" else Path(path)
    if path.is_dir():
        samples = _read_entrep(path) or _read_folder(path)
    elif path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
        samples = _read_manifest(path)
    elif path.exists():
        raise UserError(f"{path} is neither a folder nor a .csv or .jsonl manifest")
    else:
        raise UserError(f"there is no {path}; give a folder of images or a manifest with --data")
    if not samples:
        raise UserError(f"there are no images in {path}; it should have one sub-folder of images for each class")
    return samples


def find_images(folder):
    """All image files below a folder, sorted; hidden files and the debris of macOS archives are passed over."""
    return _find(folder, lambda file: file.suffix.lower() in IMAGE_SUFFIXES)


def _find(folder, wanted):
    return sorted(
        file
        for file in Path(folder).rglob("*")
        if wanted(file)
        and not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def _read_folder(folder):
    files = find_images(folder)
    labelled = [file for file in files if file.parent != folder]
    if not labelled:
        return [Sample(file) for file in files]
    if len(labelled) < len(files):
        stray = next(file for file in files if file.parent == folder)
        raise UserError(f"{stray} lies beside the class folders of {folder}; move it into one of them")
    return [Sample(file, label=file.relative_to(folder).parts[0]) for file in files]


def _read_manifest(file):
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if file.suffix.lower() == ".csv":
                rows = list(csv.DictReader(lines))
            else:
                rows = [json.loads(line) for line in lines if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is not a JSON object")
    except (OSError, ValueError, csv.Error) as problem:
        raise UserError(f"cannot read the manifest {file}: {problem}") from None
    samples = []
    for number, row in enumerate(rows, start=1):
        row = {str(key).strip().lower(): str(value).strip() for key, value in row.items() if value is not None}
        row = {key: value for key, value in row.items() if value}
        if "image" not in row:
            raise UserError(f"{file}: entry {number} has no image; the columns are image, label, caption, group, split")
        image = file.parent / row["image"]
        if not os.path.isfile(image):  # pathlib's is_file raises where a name is too long
            raise UserError(f"{file}: entry {number} names {image}, which does not exist")
        split = row.get("split")
        if split is not None and split.lower() not in SPLITS:
            raise UserError(f"{file}: entry {number} has the split {split!r}; use train, val or test")
        split = split and SPLITS[split.lower()]
        samples.append(Sample(image, row.get("label"), row.get("caption"), row.get("group"), split))
    return samples


def _read_entrep(root):
    """The ENTRep layout as the challenge's participants describe it → samples, [] if `root` is not one.

    train/cls.json {image: class name or number} with train/t2i.json {description: image} beside it, and
    public/data.json, a list of {"Path", "Classification", "DescriptionEN", "Description"}. Image names are matched
    without regard to case, at any depth below the JSON file's folder. The test images have no labels and are left out.
    """
    samples = []
    for index in _find(root, lambda file: file.name in ("cls.json", "data.json")):
        try:
            entries = json.loads(index.read_text(encoding="utf-8-sig"))
            if index.name == "data.json":
                rows = [
                    (row["Path"], row["Classification"], row.get("DescriptionEN") or row.get("Description") or None)
                    for row in entries
                ]
            else:
                t2i = index.with_name("t2i.json")
                described = json.loads(t2i.read_text(encoding="utf-8-sig")) if t2i.is_file() else {}
                captions = {image: text for text, image in described.items()}
                rows = [(image, label, captions.get(image)) for image, label in entries.items()]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
            raise UserError(f"{index} is not as ENTRep's is ({type(problem).__name__}: {problem})") from None
        files = {file.name.lower(): file for file in find_images(index.parent)}
        names = list(ENTREP)
        for image, label, caption in rows:
            name = Path(image).name
            if name.lower() not in files:
                raise UserError(f"{index} names {name}, which is not in {index.parent}")
            if str(label).isdigit() and int(label) < len(names):
                label = names[int(label)]
            if label not in names:
                raise UserError(f"{index} gives {name} the unknown label {label!r}; known are {', '.join(names)}")
            samples.append(Sample(files[name.lower()], label, caption))
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# Splitting


def split_dataset(samples, how="auto", seed=0, fraction=0.2):
    """Samples → {"train": […], "val": […], "test": […]}; test is empty unless the manifest has one.

    how: "manifest" takes its split column; "group" holds out whole groups; "random" is stratified by class; "auto" is
    the first of these that the data has. About `fraction` of each class is held out, at least one image, or one group;
    a class with one group only stays in train. Raises UserError where the labels do not allow to train.
    """
    unlabelled = next((sample for sample in samples if sample.label is None), None)
    if unlabelled:
        raise UserError(f"{unlabelled.image} has no label; give a sub-folder for each class, or a manifest with labels")
    if how == "auto":
        has_split, has_group = any(sample.split for sample in samples), any(sample.group for sample in samples)
        how = "manifest" if has_split else "group" if has_group else "random"
    if how == "manifest":
        splits = _split_by_manifest(samples, seed, fraction)
    elif how == "group":
        splits = _split_by_group(samples, seed, fraction)
    else:
        splits = _split_randomly(samples, seed, fraction)
    classes = {sample.label for sample in splits["train"]}
    if len(classes) < 2:
        found = f"one class only, {classes.pop()!r}" if classes else "nothing"
        raise UserError(f"there is {found} to train on; give images of two classes or more")
    for name in ("val", "test"):
        unknown = sorted({sample.label for sample in splits[name]} - classes)
        if unknown:
            raise UserError(f"the {name} split has labels that train lacks: {', '.join(unknown)}; move some to train")
    if not splits["val"]:
        raise UserError("nothing to validate on; give more images, or mark some as val in the manifest's split column")
    return splits


def _by_label(samples):
    classes = {}
    for sample in samples:
        classes.setdefault(sample.label, []).append(sample)
    return dict(sorted(classes.items()))


def _split_by_manifest(samples, seed, fraction):
    if not all(sample.split for sample in samples):
        raise UserError("not every entry of the manifest has a split; fill the column, or use --split random")
    splits = {name: [s for s in samples if s.split == name] for name in ("train", "val", "test")}
    if splits["test"] and splits["train"] and not splits["val"]:
        splits |= _split_randomly(splits["train"], seed, fraction) | {"test": splits["test"]}
    return splits


def _split_randomly(samples, seed, fraction):
    rng, held_out = random.Random(seed), set()
    for label, members in _by_label(samples).items():
        images = sorted({sample.image for sample in members})  # an image with two captions stays on one side
        if len(images) < 2:
            raise UserError(f"class {label!r} has one image; it needs two, one to train on and one to validate on")
        held_out.update(rng.sample(images, max(1, round(fraction * len(images)))))
    return _hold_out(samples, lambda sample: sample.image in held_out)


def _hold_out(samples, held_out):
    return {"train": [s for s in samples if not held_out(s)], "val": [s for s in samples if held_out(s)], "test": []}


def _split_by_group(samples, seed, fraction):
    if not all(sample.group for sample in samples):
        raise UserError("not every image has a group; fill the manifest's group column, or use --split random")
    rng, held_out = random.Random(seed), set()
    for members in _by_label(samples).values():
        sizes = Counter(sample.group for sample in members)
        groups = sorted(sizes)
        rng.shuffle(groups)
        groups.sort(key=lambda group: max(0, sizes[group] - fraction * len(members)))  # those that fit first, at random
        for group in groups:
            out = [sample for sample in members if sample.group in held_out]
            # A group may hold images of several classes: none of them may lose its last group to train on.
            touched = {sample.label for sample in samples if sample.group == group}
            left = {sample.label for sample in samples if sample.group not in held_out | {group}}
            if len(out) < fraction * len(members) and touched <= left:
                held_out.add(group)
    return _hold_out(samples, lambda sample: sample.group in held_out)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def load_image(path):
    """Open an image file, upright by its EXIF orientation; 16-bit grey is brought to 8 bits. Raises UserError."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise UserError(f"cannot read the image {path} ({reason}); mend or remove it") from None
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
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], group=f"patient {i // 4}") for i in range(20)]
    for how in ("random", "group"):
        splits = split_dataset(samples, how)
        print(f"split {how}:", {name: dict(Counter(s.label for s in part)) for name, part in splits.items() if part})


if __name__ == "__main__":
    main()
