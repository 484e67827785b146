"""files.py: whole or not at all, one at a time, and nothing read without measure."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_data import user_error

import files
from errors import UserError, advice, reason, shown
from files import locked, parse_json, read_bytes, read_json, whole, write_json, write_text

ROOT = Path(__file__).parents[1]


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "file"
    write_text(file, "old")
    for interruption in (KeyboardInterrupt, SystemExit, ValueError):
        with pytest.raises(interruption), whole(file) as temporary:
            temporary.write_text("half of the n")
            assert file.read_text() == "old"
            raise interruption
        assert os.listdir(tmp_path) == ["file"] and file.read_text() == "old"
    write_text(file, "ne\udcffw →")
    assert file.read_bytes() == b"ne\xffw \xe2\x86\x92" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EIO])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch, number):
    file = tmp_path / "file"
    write_text(file, "old")

    def full(*_):
        raise OSError(number, os.strerror(number))

    for call in ("fsync", "replace", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, call, full)
            line = user_error(write_text, file, "new")
        assert str(file) in line and os.strerror(number) in line
        assert os.listdir(tmp_path) == ["file"] and file.read_text() == "old"


def test_what_is_written_follows_the_umask_and_replaces_a_link(tmp_path):
    (tmp_path / "elsewhere").write_text("not ours")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "link", {"a": 1})
    finally:
        os.umask(before)
    assert not (tmp_path / "link").is_symlink() and read_json(tmp_path / "link") == {"a": 1}
    assert (tmp_path / "link").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "elsewhere").read_text() == "not ours"


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    code = "import sys, time\nfrom files import locked\nwith locked(sys.argv[1], 'no'):\n print('in', flush=True)\n"
    command = [sys.executable, "-c", code + " time.sleep(60)", tmp_path / "lock"]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="another one works here"), locked(tmp_path / "lock", "another one works here"):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path / "lock", "no"):
        pass


def test_whoever_waits_for_a_lock_gets_it(tmp_path, capsys):
    code = "import sys, time\nfrom files import locked\nwith locked(sys.argv[1], 'no'):\n print('in', flush=True)\n"
    command = [sys.executable, "-c", code + " time.sleep(1)", tmp_path / "lock"]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    start = time.monotonic()
    with locked(tmp_path / "lock", "waiting", wait=True):
        assert time.monotonic() - start > 0.2
    assert capsys.readouterr().err == "waiting\n"
    other.wait()


def test_only_files_of_moderate_size_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        assert "is no file" in user_error(read_bytes, path)
    monkeypatch.setattr(files, "LONGEST", 10)
    (tmp_path / "long").write_bytes(b"x" * 11)
    assert "more than 10 bytes" in user_error(read_bytes, tmp_path / "long")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ("[NaN]", "NaN is not allowed"),
        ("[-Infinity]", "Infinity is not allowed"),
        ("[" * 100_000, "nested too deeply"),
        ("[1,", "Expecting value"),
    ],
)
def test_json_is_taken_strictly(text, says):
    with pytest.raises(ValueError, match=says):
        parse_json(text)


def test_names_are_shown_without_what_a_terminal_would_obey():
    assert shown("ear\x1b[31m left\n\udcff") == "ear\\x1b[31m left\\n\\udcff"
    assert shown("tai trái – 左") == "tai trái – 左"


def test_a_problem_of_the_disk_is_said_with_what_to_do():
    assert "free some space" in advice(OSError(errno.ENOSPC, "full"))
    assert "permissions" in advice(PermissionError(errno.EACCES, "denied"))
    assert reason(KeyError()) == "KeyError" and reason(OSError(28, "full\nup")) == "full up"
