"""Data sets: which images there are, what is known of each, which are held out, and the batches of an epoch.

A data set is one of
  - a folder with one sub-folder a class (images at any depth below it); a folder of images alone has no labels;
  - a manifest, .csv or .jsonl, with the columns image (relative to the manifest) and label, and optionally caption,
    group (a patient, say: images of one group stay on one side of a split) and split (train, val or test);
  - the ENTRep challenge's folder, recognized by its cls.json and data.json (entrep.py);
  - the word phantom: synthetic images in that layout, drawn at the first use (phantom.py).

Why groups matter: neighbouring frames of one video are nearly the same picture. A random split puts them on both sides,
and a model that has memorized the training images then seems to recognize patients whom it has never met.

Try changing this: in `main`, split "random" with other seeds and count the patients who are on both sides: about three
of five. By "group" there are none.
"""

import csv
import json
import math
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

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
        samples = [Sample(*row) for row in read_entrep(path)] or _read_folder(path)
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


# ---------------------------------------------------------------------------------------------------------------------
# Splitting


def split_dataset(samples, how="auto", seed=0, fraction=0.2):
    """Samples → {"train": […], "val": […], "test": […]}; test is empty unless the manifest has one.

    how: "manifest" takes its split column (without a val in it, val is taken from train, by groups if there are any);
    "group" holds out whole groups; "random" is stratified by class; "auto" is the first of these that the data has.
    About `fraction` of each class is held out, at least one image, or one group; a class with one group only stays in
    train. Raises UserError where the labels do not allow training.
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
    classes = class_names(splits["train"])
    if len(classes) < 2:
        found = f"one class only, {classes[0]!r}" if classes else "nothing"
        raise UserError(f"there is {found} to train on; give images of two classes or more")
    for name in ("val", "test"):
        unknown = sorted(set(class_names(splits[name])) - set(classes))
        if unknown:
            raise UserError(f"the {name} split has labels that train lacks: {', '.join(unknown)}; move some to train")
    if not splits["val"]:
        raise UserError("nothing to validate on; give more images, or mark some as val in the manifest's split column")
    return splits


def class_names(samples):
    """The classes, in the order in which models number them."""
    return sorted({sample.label for sample in samples})


def scored_split(splits):
    """The name of the split that a run's final figures are of: test, which nothing was chosen by, else val."""
    return "test" if splits["test"] else "val"


def describe(splits):
    """→ a text: how many images there are, and which classes cannot be validated or tested."""
    classes = class_names(splits["train"])
    counts = ", ".join(f"{len(part):,} {name}" for name, part in splits.items() if part)
    lines = [f"{sum(map(len, splits.values())):,} images of {len(classes)} classes: {counts}"]
    for name in ("val", "test"):
        lacking = set(classes) - set(class_names(splits[name]))
        if splits[name] and lacking:
            lines.append(f"note: {name} has no image of {', '.join(sorted(lacking))}")
    return "\n".join(lines)


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
        by_group = all(sample.group for sample in splits["train"])
        rest = (_split_by_group if by_group else _split_randomly)(splits["train"], seed, fraction)
        splits |= {"train": rest["train"], "val": rest["val"]}
    return splits


def _split_randomly(samples, seed, fraction):
    rng, chosen = random.Random(seed), set()
    for label, members in _by_label(samples).items():
        images = sorted({sample.image for sample in members})  # an image with two captions stays on one side
        if len(images) < 2:
            raise UserError(f"class {label!r} has one image; it needs two, one to train on and one to validate on")
        chosen.update(rng.sample(images, max(1, round(fraction * len(images)))))
    return _divide(samples, lambda sample: sample.image in chosen)


def _divide(samples, in_val):
    return {"train": [s for s in samples if not in_val(s)], "val": [s for s in samples if in_val(s)], "test": []}


def _split_by_group(samples, seed, fraction):
    if not all(sample.group for sample in samples):
        raise UserError("not every image has a group; fill the manifest's group column, or use --split random")
    rng, chosen = random.Random(seed), set()
    for members in _by_label(samples).values():
        sizes = Counter(sample.group for sample in members)
        groups = sorted(sizes)
        rng.shuffle(groups)
        groups.sort(key=lambda group: max(0, sizes[group] - fraction * len(members)))  # those that fit first, at random
        for group in groups:
            out = [sample for sample in members if sample.group in chosen]
            # A group may hold images of several classes: none of them may lose its last group to train on.
            touched = {sample.label for sample in samples if sample.group == group}
            left = {sample.label for sample in samples if sample.group not in chosen | {group}}
            if len(out) < fraction * len(members) and touched <= left:
                chosen.add(group)
    return _divide(samples, lambda sample: sample.group in chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Batches to train on


def training_batches(samples, prompts, settings, epoch, size, workers):
    """Yield the epoch's batches, lists of (pixels (size, size, 3) uint8, class name, prompt, caption or None).

    All randomness comes from seed, epoch and index, so an epoch is the same whether or not training was interrupted
    before it, and whatever the number of workers.
    """
    naive = settings.flip == "naive"

    def item(index):
        rng = random.Random(f"{settings.seed} {epoch} {index}")
        sample = samples[index]
        label, caption = sample.label, sample.caption
        # Left and right are classes: the mirror image of a left ear is a right one. Where it has no class, don't flip.
        flip = settings.flip != "none" and (naive or mirror_text(label) in prompts) and rng.random() < 0.5
        if flip and not naive:
            label, caption = mirror_text(label), caption and mirror_text(caption)
        pixels = augment(load_image(sample.image), size, rng, flip)
        return pixels, label, rng.choice(prompts[label]), caption

    order = random.Random(f"{settings.seed} {epoch}").sample(range(len(samples)), len(samples))
    steps = math.ceil(len(order) / settings.batch_size)
    yield from prefetch(item, [order[step::steps] for step in range(steps)], workers)  # batches of nearly equal size


def main():
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], group=f"patient {i // 4}") for i in range(20)]
    print("20 images of 5 patients and 2 classes:")
    for how in ("random", "group"):
        splits = split_dataset(samples, how)
        counts = {name: dict(Counter(sample.label for sample in part)) for name, part in splits.items() if part}
        patients = [{sample.group for sample in splits[name]} for name in ("train", "val")]
        print(f"split {how:6} {counts}, {len(patients[0] & patients[1])} patients on both sides")


if __name__ == "__main__":
    main()
