"""A split is kept as a manifest in the run's folder, split.csv, and read again when the run goes on."""

import csv
import hashlib
import io
import os
from pathlib import Path

from data import COLUMNS, Sample
from errors import UserError, reason
from files import read_bytes, write_text


def write_split(file, splits):
    """Keep a split as a manifest, which `load_dataset` reads."""
    rows = [[s.image.resolve(), s.label, s.caption, s.group, name] for name, part in splits.items() for s in part]
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
    for image, label, *texts, split in _kept_rows(run):
        image = Path(image)
        same = [sample.image for sample in by_name.get(image.name, ()) if sample.label == label]
        image = max(same, key=lambda other, parts=image.parts: _common_end(other.parts, parts), default=image)
        if not os.path.isfile(image):
            raise UserError(
                f"{image} is missing, which {run / 'split.csv'} names; if the images have moved, say where they are by "
                "train.py --resume --data, or correct the paths there"
            )
        splits[split].append(Sample(image, label, *(text or None for text in texts), split))
    return splits


def _common_end(parts, others):
    pairs = zip(reversed(parts), reversed(others), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(parts), len(others)))


def _kept_rows(run):
    """→ the rows of a run's split.csv: image, label, caption, group, split."""
    kept = run / "split.csv"
    try:
        text = read_bytes(kept).decode("utf-8", "surrogateescape")
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        if header != list(COLUMNS) or not all(len(row) == 5 and row[4] in ("train", "val", "test") for row in rows):
            raise ValueError("its columns or splits are others")
        return rows
    except (ValueError, csv.Error) as problem:
        raise UserError(f"{kept} is damaged ({reason(problem)}); restore a copy, or train a new run") from None


def hash_of(splits):
    """A short hash of which images, by name, size, label and texts, are on which side."""
    digest = hashlib.sha256()
    for name, part in splits.items():
        for s in part:
            row = (name, s.image.name, s.image.stat().st_size, s.label, s.caption, s.group)
            digest.update(repr(row).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def trained_images(run):
    """→ the image files that a run was trained on; they need not be there any more."""
    rows = _kept_rows(run) if (run / "split.csv").is_file() else []
    return {Path(row[0]) for row in rows if row[4] == "train"}
