"""The index: the embeddings of images, kept on disk so that each image is encoded once.

    runs/<name>/index.jsonl     a line about the model, then one for each image: path, size, times, content, row
    runs/<name>/index-….f16     a row for each content: D numbers in float16, of unit length

float16 is half of float32's bytes to keep and to read, and its rounding moves a cosine by less than 0.001. The rows are
*mapped*: the file counts as memory, and what is not looked at is never read.

Both files only grow. A new image appends a row, then a line: rows without a line, and half a line at the end, are what
a killed program leaves, and do not count. Where more than half of the lines are of no use any more, both files are
written anew.
"""

import contextlib
import json
import os
import re
import secrets
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from encoding import encode_together
from errors import UserError, reason
from files import locked, parse_json, sha256, stamp_of, whole
from parallel import from_first, rank

NAME = "index.jsonl"


def index_images(run, model, files, device, batch_size, workers):
    """Image files → those that can be read, their (N, embed_dim) embeddings, of unit length, in float16, and {file that
    cannot: why}. The files come in the order of the index's rows.

    Embeddings are kept in the run's index by the hash of a file's content, so that a moved or copied image need not be
    encoded again. A file is read for its hash only if its stamp (files.py) differs from the index. The index also holds
    the model's fingerprint: another model makes it anew. Several processes (parallel.py) share the work.
    """
    index = Index(run, f"{model.fingerprint} {model.precision}", model.clip.config.embed_dim)
    hashes, stamps, bad = from_first(lambda: _look(files, index.hashes))
    new = from_first(lambda: [file for file, stamp in stamps.items() if hashes[stamp] not in index.row])
    saved = time.monotonic()
    try:
        for batch, features in encode_together(model, new, device, batch_size, workers, "indexing", bad):
            index.add([hashes[stamps[file]] for file in batch], F.normalize(features, dim=1).half())
            if time.monotonic() - saved > 60:
                index.save(hashes)
                saved = time.monotonic()
    finally:  # an interrupted index keeps what it has
        index.save(hashes)
    if rank():  # the first process alone keeps them, and searches
        return list(stamps), index.mapped, bad
    place = {file: index.row[hashes[stamp]] for file, stamp in stamps.items() if hashes[stamp] in index.row}
    if not place:
        raise UserError(f"none of the {len(files):,} images can be read, {next(iter(bad.values()))}")
    good, rows = sorted(place, key=place.get), index.rows()
    chosen = [place[file] for file in good]
    return good, rows if chosen == list(range(len(rows))) else rows[torch.tensor(chosen)], bad


def _look(files, known):
    """→ {stamp: hash} of the files, {file: its stamp}, {file that cannot be read: why}. known: {stamp: hash}."""
    hashes, stamps, bad = {}, {}, {}
    for file in files:
        try:
            stamp = stamp_of(file)
            hashes[stamp] = known.get(stamp) or hashes.get(stamp) or _hash(file)
            stamps[file] = stamp
        except OSError as problem:
            bad[file] = f"cannot read the image {file} ({reason(problem)}); repair it or move it away"
    return hashes, stamps, bad


def _hash(file):
    if not file.is_file():  # a pipe may never end
        raise OSError("it is no file")
    return sha256(file)


class Index:
    """hashes: {stamp: content}, row: {content: its row}, rows: (n, width) float16, those that are kept and new ones.
    Empty where the files are missing, damaged or of another model."""

    def __init__(self, run, key, width):
        self.run, self.file, self.key, self.width = run, run / NAME, key, width
        self.hashes, self.row, self.fresh = {}, {}, []
        self.mapped = torch.empty(0, width, dtype=torch.float16)
        self.rows_file, self.length, self.stamp = None, 0, None  # length: of the lines, in bytes
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
            self._read()

    def _read(self):
        stamp, content = stamp_of(self.file), self.file.read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        head, *lines, _ = content.decode("utf-8").split("\n")
        head, entries = parse_json(head), parse_json(f"[{','.join(lines)}]")
        if head["model"] != self.key or not re.fullmatch(r"index-[0-9a-f]{16}\.f16", head["rows"]):
            return
        hashes = {(str(path), int(size), int(m), int(c)): str(content) for path, size, m, c, content, _ in entries}
        row = {content: number for *_, content, number in entries}
        numbers = list(row.values())
        if set(numbers) != set(range(len(row))) or set(map(type, numbers)) != {int}:  # each content has its own row
            return
        self._map(self.run / head["rows"], len(row))
        self.hashes, self.row, self.length, self.stamp = hashes, row, len(content), stamp

    def _map(self, file, count):
        """Raises ValueError where the file is too short."""
        self.mapped = torch.from_numpy(np.memmap(file, np.float16, "c", shape=(count, self.width)))
        self.rows_file, self.fresh = file, []

    def add(self, contents, rows):
        """n contents and their rows, (n, width) float16. Copies have one row."""
        first = {content: i for i, content in reversed(list(enumerate(contents))) if content not in self.row}
        self.row |= {content: len(self.row) + number for number, content in enumerate(first)}
        self.fresh.append(rows[list(first.values())])

    def rows(self):
        """→ (N, width) float16, a row for each content."""
        return torch.cat([self.mapped, *self.fresh]) if self.fresh else self.mapped

    def save(self, hashes):
        """Keep what is new of a gallery, {stamp: content}. A search needs no index, so a failure is no error."""
        if rank() or not (self.fresh or self._new(hashes)):
            return
        try:
            with locked(self.run / ".index.lock", "another search writes the index; what is new is not kept") as safe:
                if self._current_stamp() != self.stamp:
                    self._catch_up(hashes)
                new = self._new(hashes)
                if safe and self.rows_file and self._mostly_useful(hashes):
                    self._append(new)
                else:
                    self._write_anew(self._useful(hashes) | new)
        except (UserError, OSError) as problem:
            print(f"note: {problem}", file=sys.stderr)

    def _new(self, hashes):
        return {s: content for s, content in hashes.items() if s not in self.hashes and content in self.row}

    def _current_stamp(self):
        return stamp_of(self.file) if self.file.exists() else None

    def _catch_up(self, hashes):
        """Another search has written since we read: go on from there, with those of the gallery's rows it lacks."""
        row, rows = self.row, self.rows()
        self.__init__(self.run, self.key, self.width)
        missing = [c for c in dict.fromkeys(hashes.values()) if c in row and c not in self.row]
        self.add(missing, rows[[row[content] for content in missing]])

    def _useful(self, hashes):
        """→ {stamp: content} of the lines whose image is still there, as it was."""
        paths = {path for path, *_ in hashes}
        return {
            stamp: content
            for stamp, content in self.hashes.items()
            if (stamp in hashes if stamp[0] in paths else os.path.exists(stamp[0]))
        }

    def _mostly_useful(self, hashes):
        """Whether at least half of the lines are. If so by the gallery alone, no other file is looked for."""
        half = len(self.hashes) / 2
        return sum(stamp in self.hashes for stamp in hashes) >= half or len(self._useful(hashes)) >= half

    def _append(self, new):
        for file, place, content in (
            (self.rows_file, self.mapped.nbytes, torch.cat([self.mapped[:0], *self.fresh]).numpy().tobytes()),
            (self.file, self.length, _lines(new, self.row)),
        ):
            with os.fdopen(os.open(file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)), "rb+") as out:
                out.seek(place)
                out.write(content)
                out.truncate()
                out.flush()
                os.fsync(out.fileno())
        self.hashes |= new
        self.length, self.stamp = self.length + len(content), stamp_of(self.file)
        self._map(self.rows_file, len(self.row))

    def _write_anew(self, hashes):
        contents = list(dict.fromkeys(hashes.values()))
        rows = self.rows()[torch.tensor([self.row[content] for content in contents])]
        name, row = f"index-{secrets.token_hex(8)}.f16", {content: i for i, content in enumerate(contents)}
        with whole(self.run / name) as temporary:
            rows.numpy().tofile(temporary)
        lines = json.dumps({"model": self.key, "rows": name}).encode() + b"\n" + _lines(hashes, row)
        with whole(self.file) as temporary:
            temporary.write_bytes(lines)
        for old in [*self.run.glob("index-*.f16"), self.run / "index.safetensors"]:  # .safetensors: of older versions
            if old.name != name:
                with contextlib.suppress(OSError):  # Windows deletes no file that is mapped
                    old.unlink()
        self.hashes, self.row, self.length, self.stamp = hashes, row, len(lines), stamp_of(self.file)
        self._map(self.run / name, len(contents))


def _lines(hashes, row):
    lines = (json.dumps([*stamp, content, row[content]]) for stamp, content in hashes.items())
    return "".join(f"{line}\n" for line in lines).encode()


def main():
    """Two images and a copy of one, indexed twice by the small CLIP, then one more."""
    from PIL import Image

    from build import load_base
    from fusion import FusedCLIP

    model = FusedCLIP(load_base("phantom")[0], 2, "none").eval()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{name}.png") for name in ("red", "blue", "copy", "new")]
        for file, colour in zip(files, ("red", "blue", "red", "green"), strict=True):
            Image.new("RGB", (64, 48), colour).save(file)
        for which, some in (("first", files[:3]), ("second", files[:3]), ("one more", files)):
            start = time.perf_counter()
            good, rows, _ = index_images(Path(folder), model, some, torch.device("cpu"), 2, 0)
            took = f"in {time.perf_counter() - start:.3f} s"
            cosines = [round(cosine, 3) for cosine in (rows @ rows[0]).tolist()]
            print(f"{which:8} {[file.stem for file in good]}: {tuple(rows.shape)} {took}; cosines {cosines}")
        size = {file.suffix: file.stat().st_size for file in Path(folder).glob("index*")}
        print(f"bytes of the rows and of the lines: {size['.f16']}, {size['.jsonl']}")


if __name__ == "__main__":
    main()
