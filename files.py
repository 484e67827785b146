"""Files that appear whole or not at all, and files that are read with care.

Machines die, disks fill up, and two programs may write at once. So a file is first written under a temporary name, then
forced to the disk, then renamed, which happens at once or not at all: whoever reads it finds the old file or the new
one. And as files come from strangers, they are measured before they are read.
"""

import hashlib
import json
import os
import secrets
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from errors import UserError, advice, reason

try:
    import fcntl
except ImportError:  # Windows has other locks; there, two trainings into one folder are not kept apart
    fcntl = None

LONGEST = 2**26  # bytes of a text or JSON file: 64 MiB are millions of images


@contextmanager
def whole(file):
    """Yield a temporary path to write to. At the end of the block it becomes `file`; after any exception it is deleted,
    and `file` is as it was. Raises UserError where it can't be written."""
    file = Path(file)
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")  # of this process alone; never an existing link
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            mode = os.fstat(descriptor).st_mode & 0o777  # as the user's umask wants it
            os.close(descriptor)
            yield temporary
            os.chmod(temporary, mode)
            take_name(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as problem:
        raise UserError(f"cannot write {file} ({reason(problem)}); {advice(problem)}") from None


def take_name(temporary, file):
    """Force a file to the disk and give it its name."""
    with open(temporary, "rb+") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)
    if os.name == "posix":  # elsewhere a folder can't be opened
        descriptor = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(file, text):
    """Write a text in UTF-8, whatever the locale; bytes of a file's name that are not UTF-8 stay as they are."""
    with whole(file) as temporary:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))


def write_json(file, content):
    write_text(file, json.dumps(content, indent=2) + "\n")


@contextmanager
def locked(file, says, wait=False):
    """Let no other process into this block while we are in it. The lock dies with its process; the file stays. If
    another process is in it, print `says` and wait, or, without `wait`, raise UserError(says). Yields whether there are
    locks here: Windows and some network disks have none."""
    try:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.fdopen(os.open(file, flags, 0o666), "rb+", buffering=0)
    except OSError as problem:
        raise UserError(f"cannot write {file} ({reason(problem)}); {advice(problem)}") from None
    with handle:
        works = fcntl is not None
        try:
            if works:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(says) from None
            print(says, file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a network disk without locks
            works = False
        yield works


def make_folder(folder):
    """Make a folder and its parents. Raises UserError where that is impossible."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder} is a file; give the name of a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as problem:
        raise UserError(f"cannot make the folder {folder} ({reason(problem)}); choose another place") from None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_bytes(file):
    """File → its bytes. Raises UserError where it is no file (a pipe, say, which may never end), or a very long one."""
    try:
        if not os.path.isfile(file):
            raise UserError(f"{file} is no file; check the path")
        with open(file, "rb") as handle:
            content = handle.read(LONGEST + 1)
    except OSError as problem:
        raise UserError(f"cannot read {file} ({reason(problem)}); {advice(problem)}") from None
    if len(content) > LONGEST:
        raise UserError(f"{file} has more than {LONGEST:,} bytes; check that it is the right file, or split it")
    return content


def sha256(file):
    """File of any length → the SHA-256 of its content, 64 hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_text(file):
    """→ the text of a file in UTF-8 or UTF-16."""
    content = read_bytes(file)
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # Excel's "Unicode text"
            return content.decode("utf-16")
        return content.decode("utf-8-sig", "surrogateescape")  # the name of a file may have any bytes
    except UnicodeDecodeError:
        raise UserError(f"{file} is damaged UTF-16; save it as UTF-8") from None


def stamp_of(file):
    """What can be known of a file without reading it: path, size, and times of modification and of status change. The
    last of these changes with any change of the file, and programs cannot set it back. Raises OSError."""
    status = os.stat(file)
    return os.path.realpath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_json(file):
    """JSON file → Python values, as strictly as `parse_json`. Raises UserError."""
    content = read_bytes(file)
    try:
        return parse_json(content.decode("utf-8-sig"))
    except ValueError as problem:
        raise UserError(f"{file} is not valid JSON ({reason(problem)}); correct it") from None


def parse_json(text):
    """JSON text → Python values. Duplicate keys, NaN and Infinity, which JSON does not know, and endless nesting raise
    ValueError, too."""

    def distinct(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} is there twice")
        return content

    def refuse(word):
        raise ValueError(f"{word} is not allowed, write null")

    try:
        return json.loads(text, object_pairs_hook=distinct, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def main():
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "metrics.json")
        write_json(file, {"accuracy": 0.5})
        try:
            with whole(file) as temporary:
                temporary.write_text("half of the new con")
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(f"interrupted while it was written anew: {read_json(file)}, beside it {os.listdir(folder)}")
        try:
            parse_json("[" * 100_000)
        except ValueError as problem:
            print(f"100,000 brackets: {problem}")


if __name__ == "__main__":
    main()
