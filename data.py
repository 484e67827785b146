"""Data sets: which images there are, what is known of each, and the batches to train on.

A data set is one of
  - a folder with one sub-folder a class (images at any depth below it); a folder of images alone has no labels;
  - a manifest, .csv or .jsonl, with the columns image (relative to the manifest) and label, and optionally caption,
    group (a patient, say: images of one group stay on one side of a split that is drawn here) and split (train, val or
    test);
  - the ENTRep challenge's folder, recognized by its cls.json and data.json (entrep.py);
  - the word phantom: synthetic images in that layout, drawn at the first use (phantom.py).
"""

import csv
import functools
import json
import math
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from entrep import read_entrep
from errors import UserError
from images import augment, find_images, load_image, mirror_text, prefetch
from phantom import default_dataset

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Sample:
    """An image and what is known of it."""

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
        samples = [Sample(*row, split=split) for *row, split in read_entrep(path)] or _read_folder(path)
    elif path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
        samples = _read_manifest(path)
    elif path.exists():
        raise UserError(f"{path} is neither a folder nor a .csv or .jsonl manifest")
    else:
        raise UserError(f"there is no {path}; give a folder of images or a manifest with --data")
    if not samples:
        raise UserError(f"there are no images in {path}; it should have one sub-folder of images for each class")
    return samples


def _read_folder(folder):
    files = find_images(folder)
    labelled = [file for file in files if file.parent != folder]
    if not labelled:
        return [Sample(file) for file in files]
    if len(labelled) < len(files):
        stray = next(file for file in files if file.parent == folder)
        raise UserError(f"{stray} lies beside the class folders of {folder}; move it into one of them")
    return [Sample(file, label=file.relative_to(folder).parts[0].strip()) for file in files]


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


def class_names(samples):
    """The classes, in the order in which models number them."""
    return sorted({sample.label for sample in samples})


# ---------------------------------------------------------------------------------------------------------------------
# Batches to train on


def training_batches(samples, prompts, settings, steps, size, workers):
    """Yield the batch of each step, a list of (pixels (size, size, 3) uint8, class name, prompt, caption or None).

    An *epoch* shows every image once, in an order of its own, in `per_epoch` batches of nearly equal size; the epochs
    follow one another. All randomness comes from seed, epoch and index, so that a step has the same batch whether or
    not training was interrupted before it, and whatever the number of workers.
    """
    naive, per_epoch = settings.flip == "naive", math.ceil(len(samples) / settings.batch_size)

    @functools.lru_cache(maxsize=1)
    def order(epoch):
        return random.Random(f"{settings.seed} {epoch}").sample(range(len(samples)), len(samples))

    def item(epoch_and_index):
        epoch, index = epoch_and_index
        rng = random.Random(f"{settings.seed} {epoch} {index}")
        sample = samples[index]
        label, caption = sample.label, sample.caption
        # Left and right are classes: the mirror image of a left ear is a right one. Where it has no class, don't flip.
        flip = settings.flip != "none" and (naive or mirror_text(label) in prompts) and rng.random() < 0.5
        if flip and not naive:
            label, caption = mirror_text(label), caption and mirror_text(caption)
        pixels = augment(load_image(sample.image), size, rng, flip)
        return pixels, label, rng.choice(prompts[label]), caption

    def batch(step):
        epoch, part = divmod(step, per_epoch)
        return [(epoch, index) for index in order(epoch)[part::per_epoch]]

    yield from prefetch(item, map(batch, steps), workers)


def main():
    """Three images of a manifest, and two epochs of batches made of them."""
    from types import SimpleNamespace

    settings = SimpleNamespace(seed=0, batch_size=2, flip="swap")
    prompts = {"ear-left": ["a left ear"], "ear-right": ["a right ear"]}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a", "b", "c"):
            Image.new("RGB", (64, 48)).save(Path(folder, f"{name}.png"))
        manifest = Path(folder, "manifest.csv")
        rows = ["image,label,caption", "a.png,ear-left,cone at 7 o'clock", "b.png,ear-right,", "c.png,ear-left,"]
        manifest.write_text("\n".join(rows))
        samples = load_dataset(manifest)
        for sample in samples:
            print(f"{sample.image.name}: {sample.label}, caption {sample.caption!r}")
        for step, batch in enumerate(training_batches(samples, prompts, settings, range(4), size=32, workers=0)):
            print(f"step {step}:", "; ".join(f"{label}, {caption!r}" for _, label, _, caption in batch))


if __name__ == "__main__":
    main()
