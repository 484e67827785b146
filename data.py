"""Data sets: which images there are, what is known of each, and the batches to train on.

A data set is one of
  - a folder with one sub-folder a class (images at any depth below it), or with sub-folders train, val and test, each
    with one sub-folder a class; a folder of images alone has no labels;
  - a manifest, .csv or .jsonl, with the columns image (relative to the manifest) and label, and optionally caption,
    group (a patient, say: images of one group stay on one side of a split that is drawn here), split (train, val or
    test) and match (the image that a search by this one should find), separated by commas, semicolons or tabs; an image
    with several captions has a row for each;
  - the ENTRep challenge's folder, recognized by its cls.json or data.json (entrep.py);
  - the word phantom: synthetic images in that layout, drawn at the first use (phantom.py).
"""

import csv
import io
import math
import os
import random
import sys
import tempfile
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from augment import ROOM, draw_view
from cache import NO_CACHE
from entrep import read_entrep
from errors import UserError, reason, shown
from files import parse_json, read_text
from images import OPENAI, cut_square, find_images, load_image, prefetch, scaled
from parallel import share
from phantom import default_dataset
from sides import mirror_classes, mirror_text

# What pandas and Excel write for an empty cell; in the column group other programs' words, too, which may be classes.
MISSING = {"nan", "#n/a", "<na>", "nat"}
MOST_ROWS, LONGEST_CAPTION = 1_000_000, 10_000  # characters
COLUMNS = ("image", "label", "caption", "group", "split", "match")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Sample:
    """An image and what is known of it."""

    image: Path
    label: str | None = None
    captions: tuple[str, ...] = ()
    group: str | None = None
    split: str | None = None
    match: Path | None = None  # the image that a search by this one should find


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_dataset(path):
    """Folder, manifest or "phantom" → list of Sample, in a fixed order. Raises UserError where there is no such data
    set, or it contradicts itself."""
    path = default_dataset() if str(path) == "phantom" else Path(path)
    if path.is_dir():
        samples = [Sample(**row) for row in read_entrep(path)] or _read_folder(path)
    elif path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
        samples = _read_manifest(path)
    elif os.path.exists(path):
        raise UserError(f"{path} is neither a folder nor a .csv or .jsonl manifest; give one of these by --data")
    else:
        raise UserError(f"there is no {path}; give a folder of images or a manifest with --data")
    if not samples:
        raise UserError(f"there are no images in {path}; give a folder with one sub-folder of images for each class")
    return join_rows([_in_utf_8(sample) for sample in samples])


def _in_utf_8(sample):
    """Bytes that are not UTF-8, as names of folders and JSON may hold them, are written as escapes: \\udcff."""

    def escaped(text):
        return text and text.encode("utf-8", "backslashreplace").decode()

    captions = tuple(map(escaped, sample.captions))
    return replace(sample, label=escaped(sample.label), captions=captions, group=escaped(sample.group))


def join_rows(samples):
    """An image that is there more than once, also by a link or another spelling of its path, becomes one Sample with
    all its captions. Raises UserError where it has two labels, groups, splits or matches."""
    first, joined, path = {}, {}, {}  # (device, inode) → image; image → Sample; every path → image
    for sample in samples:
        for caption in sample.captions:
            if len(caption) > LONGEST_CAPTION:
                raise UserError(
                    f"the caption of {sample.image} has more than {LONGEST_CAPTION:,} characters; shorten it"
                )
        try:
            status = os.stat(sample.image)
            image = first.setdefault((status.st_dev, status.st_ino), sample.image)
        except OSError:  # no such file; whoever opens it will say so
            image = sample.image
        path[sample.image] = image
        known = joined.setdefault(image, replace(sample, image=image))
        for name in ("label", "group", "split", "match"):
            values = [getattr(s, name) for s in (known, sample)]
            if values[0] != values[1] and not (name == "match" and None in values):
                where = "" if image == sample.image else f" (as {sample.image})"
                names = "matches" if name == "match" else f"{name}s"
                values = " and ".join(repr(value and str(value)) for value in values)
                raise UserError(f"{image} has the {names} {values}{where}; keep one of them")
        captions = tuple(dict.fromkeys(known.captions + sample.captions))
        joined[image] = replace(known, captions=captions, match=known.match or sample.match)
    return [replace(s, match=s.match and path.get(s.match, s.match)) for s in joined.values()]


def _read_folder(folder):
    """Sub-folders are classes, or train, val and test with classes below them; without any, there are no labels."""
    files = find_images(folder)
    parts = {file: file.relative_to(folder).parts for file in files}
    stray = next((file for file in files if len(parts[file]) == 1), None)
    if stray is None:
        if files and all(first.lower() in SPLITS for first, *_ in parts.values()):
            return _read_split_folders(folder, parts)
        _refuse_empty(folder, {first for first, *_ in parts.values()})
        return [Sample(file, label=_name(parts[file][0])) for file in files]
    if all(len(of_file) == 1 for of_file in parts.values()):
        return [Sample(file) for file in files]
    raise UserError(f"{stray} lies beside the class folders of {folder}; move it into one of them, or out of {folder}")


def _read_split_folders(folder, parts):
    for file, of_file in parts.items():
        if len(of_file) == 2:
            raise UserError(f"{file} lies in no class; {folder / of_file[0]} should have a sub-folder for each class")
    for first in {first for first, *_ in parts.values()}:
        _refuse_empty(folder / first, {of_file[1] for of_file in parts.values() if of_file[0] == first})
    return [Sample(file, _name(second), split=SPLITS[first.lower()]) for file, (first, second, *_) in parts.items()]


def _refuse_empty(folder, names):
    """A class folder whose images have unknown endings, say, would be missing without a word."""
    for other in sorted(folder.iterdir()):
        if other.is_dir() and other.name not in names and not other.name.startswith((".", "__MACOSX")):
            raise UserError(f"the class folder {other} has no images; put some there, or move it away")


def _name(text):
    """é may be one character or two (macOS writes so): one name for a class, whoever wrote it."""
    return unicodedata.normalize("NFC", text.strip())


def _read_manifest(file):
    samples, missing = [], []
    for place, row in (_csv_rows if file.suffix.lower() == ".csv" else _jsonl_rows)(file, read_text(file)):
        if len(samples) == MOST_ROWS:
            raise UserError(f"{file} has more than {MOST_ROWS:,} rows; split it")
        if "image" not in row:
            raise UserError(f"{file}, {place}: the image is missing; give its path in the column image")
        for column, text in row.items():
            if column in COLUMNS[1:] and any("\ud800" <= c <= "\udfff" for c in text):
                raise UserError(f"{file}, {place}: the {column} is not UTF-8; save the file as UTF-8")
            missing_value = MISSING | {"none", "null", "n/a"} if column == "group" else MISSING
            if column in COLUMNS[1:] and (text.lower() in missing_value or set(text) == {"#"}):
                raise UserError(
                    f"{file}, {place}: the {column} is {text!r}, as programs write a missing value; fill it in"
                )
        image, match = (_place(file, row.get(column)) for column in ("image", "match"))
        for path, column in ((image, "image"), (match, "match")):
            if path and not os.path.isfile(path):
                missing.append(f"{row[column]} ({place})")
        split = row.get("split")
        if split is not None and split.lower() not in SPLITS:
            raise UserError(f"{file}, {place}: the split {split!r} is unknown; use train, val or test")
        label = _name(row["label"]) if "label" in row else None
        group = " ".join(_name(row["group"]).split()) if "group" in row else None  # of one patient, however typed
        captions = (row["caption"],) if "caption" in row else ()
        samples.append(Sample(image, label, captions, group, split and SPLITS[split.lower()], match))
    if missing:
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        raise UserError(
            f"{file} names images that do not exist: {', '.join(missing[:5])}{more}; correct the paths, which start "
            "from the manifest's folder"
        )
    return samples


def _place(file, path):
    """A path in a manifest, or None → where it is."""
    if path is None:
        return None
    found = file.parent / path
    return found if os.path.isfile(found) else file.parent / path.replace("\\", "/")  # written on Windows


def _csv_rows(file, text):
    """Yield (place, {column: text}) of each row, without empty cells."""
    start = 1
    try:
        for delimiter in ",;\t":  # Excel's, as a country writes its numbers
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            if "image" in header:
                break
        else:
            found = text.split("\n", 1)[0].strip()[:200]
            raise UserError(
                f"{file} has no column named image; its first line is {found!r}, it should be image,label,…"
            )
        if len(set(header)) < len(header):
            raise UserError(f"{file} has two columns of the same name; rename one")
        unused = [name for name in header if name and name not in COLUMNS]
        if unused:
            print(f"note: {shown(file)}: these columns are not used: {shown(', '.join(unused))}", file=sys.stderr)
        start = reader.line_num + 1
        for cells in reader:
            place, start = f"line {start}", reader.line_num + 1
            if any(cells[len(header) :]):
                mark = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
                raise UserError(f"{file}, {place}: there are more cells than columns; put texts with {mark} in quotes")
            row = {name: cell.strip() for name, cell in zip(header, cells, strict=False) if cell.strip()}
            if row:
                yield place, row
    except csv.Error as problem:
        raise UserError(
            f"{file}, the row that begins in line {start}: a quotation mark is missing, or is one too many "
            f"({reason(problem)}); correct it"
        ) from None


def _jsonl_rows(file, text):
    """Yield (place, {column: text}) of each line, without empty values."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
            if not isinstance(entry, dict):
                raise ValueError("it is not a JSON object")
            wrong = [key for key, value in entry.items() if isinstance(value, (bool, list, dict))]
            if wrong:
                raise ValueError(f"{wrong[0]!r} is neither a text nor a number")
        except ValueError as problem:
            raise UserError(f"{file}, line {number}: cannot read it ({reason(problem)}); correct it") from None
        row = {key.strip().lower(): str(value).strip() for key, value in entry.items() if value is not None}
        yield f"line {number}", {key: value for key, value in row.items() if value}


def captions_of(samples):
    return [caption for sample in samples for caption in sample.captions]


def class_names(samples):
    """The classes, in the order in which models number them."""
    return sorted({sample.label for sample in samples})


# ---------------------------------------------------------------------------------------------------------------------
# Batches to train on


def batch_of(step, count, settings):
    """→ the epoch that a step is in, and the indices (0 to count − 1) of its images.

    An *epoch* shows every image once, in an order of its own, in batches of nearly equal size; the epochs follow one
    another.
    """
    per_epoch = math.ceil(count / settings.batch_size)
    epoch, part = divmod(step, per_epoch)
    return epoch, _order(settings.seed, epoch, count)[part::per_epoch]


@lru_cache(maxsize=1)
def _order(seed, epoch, count):
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def training_batches(samples, prompts, settings, steps, size, workers, how=OPENAI, cache=NO_CACHE):
    """Yield the batch of each step, a list of (pixels, View, class name, prompt, caption or None). The pixels, (S, S,
    3) uint8 with S = ROOM · size, are framed as the Preprocessing says, but cut out at random, not in the middle;
    augment.py makes the view of them. They are None where they are another process's share (parallel.py).

    All randomness comes from seed, epoch and index, so that a step has the same batch whether or not training was
    interrupted before it, and whatever the number of workers.
    """
    mirrored_label = mirror_classes(prompts)
    mirrored_text = lru_cache(maxsize=None)(mirror_text)
    side = round(ROOM * size)

    def pixels_of(file):
        return cache.get(file, (side, how), lambda: scaled(load_image(file, side), side, how))

    def item(epoch_index_mine):
        epoch, index, mine = epoch_index_mine
        rng = random.Random(f"{settings.seed} {epoch} {index}")
        sample = samples[index]
        label, captions = sample.label, sample.captions
        caption = rng.choice(captions) if len(captions) > 1 else captions[0] if captions else None
        # Left and right are classes: the mirror image of a left ear is a right one. Where it has no class, don't flip.
        mirrored = (label, caption)
        if settings.flip == "swap":
            mirrored = mirrored_label[label], caption and mirrored_text(caption)
        understood = mirrored[0] is not None and (mirrored[1] is not None or caption is None)
        flip = settings.flip != "none" and understood and rng.random() < 0.5
        if flip:
            label, caption = mirrored
        prompt, view, place = rng.choice(prompts[label]), draw_view(rng, flip), rng.random()
        pixels = cut_square(pixels_of(sample.image), place) if mine else None
        return pixels, view, label, prompt, caption

    def batch(step):
        epoch, indices = batch_of(step, len(samples), settings)
        mine = share(range(len(indices)))
        return [(epoch, index, place in mine) for place, index in enumerate(indices)]

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
        manifest.write_text("\n".join(rows), encoding="utf-8")
        samples = load_dataset(manifest)
        for sample in samples:
            print(f"{sample.image.name}: {sample.label}, captions {sample.captions}")
        for step, batch in enumerate(training_batches(samples, prompts, settings, range(4), size=32, workers=0)):
            print(f"step {step}:", "; ".join(f"{label}, {caption!r}" for _, _, label, _, caption in batch))


if __name__ == "__main__":
    main()
