"""A split is kept as a manifest in the run's folder, split.csv, and read again when the run goes on."""

import csv
import hashlib
import io
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from checkpoint import read_safetensors
from data import COLUMNS, Sample, join_rows
from errors import UserError, counted, reason
from files import read_bytes, write_text


def write_split(file, splits):
    """Keep a split as a manifest, which `load_dataset` reads."""
    rows = [
        [s.image.resolve(), s.label, caption, s.group, name, s.match and s.match.resolve()]
        for name, part in splits.items()
        for s in part
        for caption in s.captions or [None]
    ]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([COLUMNS, *rows])
    write_text(file, table.getvalue())


def read_split(run, found=None):
    """→ the splits that a run keeps. found: the samples of its data set as they are now, if that may have moved: an
    image is then the one with the most of its old path's end and the same label. Raises UserError where one is missing.
    """
    splits, by_name = {name: [] for name in ("train", "val", "test")}, {}
    for sample in found or ():
        by_name.setdefault(sample.image.name, []).append(sample)
    found_at = {}  # old path → path
    for image, label, caption, group, split, match in _kept_rows(run):
        old = Path(image)
        same = [sample.image for sample in by_name.get(old.name, ()) if sample.label == label]
        image = max(same, key=lambda other, parts=old.parts: _common_end(other.parts, parts), default=old)
        found_at[old] = image
        if not os.path.isfile(image):
            raise UserError(
                f"{image} is missing, which {run / 'split.csv'} names; if the images have moved, say where they are by "
                "train.py --resume --data, or correct the paths there"
            )
        captions = (caption,) if caption else ()
        splits[split].append(Sample(image, label, captions, group or None, split, Path(match) if match else None))
    for name, part in splits.items():
        part = [replace(s, match=s.match and found_at.get(s.match, s.match)) for s in part]
        splits[name] = join_rows(part)
    return splits


def _common_end(parts, others):
    pairs = zip(reversed(parts), reversed(others), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(parts), len(others)))


def _kept_rows(run):
    """→ the rows of a run's split.csv: image, label, caption, group, split, match."""
    kept = run / "split.csv"
    try:
        text = read_bytes(kept).decode("utf-8", "surrogateescape")
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        if header != list(COLUMNS) or not all(len(row) == 6 and row[4] in ("train", "val", "test") for row in rows):
            raise ValueError("its columns or splits are others")
        return rows
    except (ValueError, csv.Error) as problem:
        raise UserError(f"{kept} is damaged ({reason(problem)}); restore a copy, or train a new run") from None


def hash_of(splits):
    """A short hash of which images, by name, size, label and texts, are on which side."""
    digest = hashlib.sha256()
    for name, part in splits.items():
        for s in part:
            row = (name, s.image.name, s.image.stat().st_size, s.label, s.captions, s.group)
            digest.update(repr(row).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def describe_seen(weights, splits):
    """→ a line about held-out images that the run which --weights names, or one that it started from, was trained on;
    or nothing."""
    trained, visited = set(), set()
    while weights not in visited and (Path(weights) / "adapter.safetensors").is_file():
        visited.add(weights)
        trained |= trained_images(Path(weights))
        weights = read_safetensors(Path(weights) / "adapter.safetensors")[1].get("base", {}).get("weights", "")
    seen = sum(sample.image.resolve() in trained for name in ("val", "test") for sample in splits[name])
    what = f"{counted(seen, 'held-out image')} of those that the run named by --weights was trained on"
    advice = "the figures, most of all those before training, are too good; use the same --split and --seed as then"
    return f"note: {what}: {advice}\n" if seen else ""


def trained_images(run):
    """→ the image files that a run was trained on; they need not be there any more."""
    rows = _kept_rows(run) if (run / "split.csv").is_file() else []
    return {Path(row[0]) for row in rows if row[4] == "train"}


def trained_captions(run):
    """→ all captions that a run was trained with; None where its split.csv is missing."""
    if not (run / "split.csv").is_file():
        return None
    return {row[2] for row in _kept_rows(run) if row[4] == "train" and row[2]}


def count_classes(run):
    """→ how many images of each class a run has on each side, {split: Counter of labels}, and how many groups, {split:
    number}."""
    images, groups = {}, {name: set() for name in ("train", "val", "test")}
    for image, label, _, group, split, _ in _kept_rows(run) if (run / "split.csv").is_file() else []:
        images[image] = split, label
        groups[split] |= {group} - {""}
    counts = {name: Counter(label for split, label in images.values() if split == name) for name in groups}
    return counts, {name: len(of_split) for name, of_split in groups.items()}
