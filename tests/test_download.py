"""weights/download.py against a small HTTP server on this machine."""

import contextlib
import hashlib
import http.server
import importlib.util
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import checkpoint
from errors import UserError

spec = importlib.util.spec_from_file_location("download", Path(__file__).parents[1] / "weights" / "download.py")
download = importlib.util.module_from_spec(spec)
spec.loader.exec_module(download)

CONTENT = bytes(range(256)) * 20000  # 5 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT with ranges. `breaks`: close the connection after so many bytes, one by one; `log`: requests."""
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.log.append((self.path, asked))
            if "missing" in self.path:
                return self.send_error(404)
            if state.drip:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                with contextlib.suppress(OSError):
                    while state.drip:
                        self.wfile.write(b"x")
                        threading.Event().wait(0.02)
                return None
            if state.odd:
                return self.wfile.write(state.odd)
            if "insecure" in self.path:
                self.send_response(302)
                self.send_header("Location", "http://example.invalid/file")
                return self.end_headers()
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", "/target")
                return self.end_headers()
            content = state.bodies.get(self.path.rsplit("/", 1)[1], CONTENT)
            start = int(asked.split("=")[1].rstrip("-")) if asked and state.ranges else 0
            if asked and start >= len(content):
                return self.send_error(416)
            self.send_response(206 if asked and state.ranges else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : start + state.breaks.pop(0)] if state.breaks else content[start:])

        def log_message(self, *args):
            pass

    state = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.log, state.breaks, state.ranges, state.odd = [], [], True, b""
    state.drip, state.bodies = False, {}
    state.url = f"http://127.0.0.1:{state.server_port}"
    threading.Thread(target=state.serve_forever, daemon=True).start()
    yield state
    state.shutdown()
    state.server_close()


def test_a_file_gets_its_name_when_its_hash_is_right(server, tmp_path):
    download.download(f"{server.url}/file", tmp_path / "file", DIGEST)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_wrong_hash_is_refused_and_nothing_is_left(server, tmp_path):
    with pytest.raises(UserError, match="SHA-256"):
        download.download(f"{server.url}/file", tmp_path / "file", "0" * 64)
    assert not list(tmp_path.iterdir())


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.breaks = [1_000_000, 2_500_000]
    download.download(f"{server.url}/moved/file", tmp_path / "file", DIGEST)
    assert (tmp_path / "file").read_bytes() == CONTENT
    asked = [range_ for path, range_ in server.log if path == "/target"]
    assert asked == [None, "bytes=1000000-", "bytes=3500000-"]


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.part").write_bytes(b"something else")
    download.download(f"{server.url}/file", tmp_path / "file", DIGEST)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_whole_part_file_is_only_renamed(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    download.download(f"{server.url}/file", tmp_path / "file", DIGEST)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_giving_up_keeps_what_came(server, tmp_path):
    server.breaks = [1000] * download.ATTEMPTS
    with pytest.raises(UserError, match="run this again"):
        download.download(f"{server.url}/file", tmp_path / "file", DIGEST)
    assert (tmp_path / "file.part").read_bytes() == CONTENT[: 1000 * download.ATTEMPTS]


def test_a_missing_file_is_said_at_once(server, tmp_path):
    with pytest.raises(UserError, match="404"):
        download.download(f"{server.url}/missing", tmp_path / "file", DIGEST)
    assert len(server.log) == 1


def test_the_script_asks_for_the_known_files_and_downloads_once(server, tmp_path, monkeypatch, capsys):
    known = {name: (*place, digest and DIGEST) for name, (*place, digest) in download.MODELS["clip-vit-b-16"].items()}
    monkeypatch.setitem(download.MODELS, "clip-vit-b-16", known)
    monkeypatch.setattr(sys, "argv", ["download.py", "--endpoint", server.url, "--folder", str(tmp_path / "clip")])
    server.bodies = {"config.json": b"{}", "preprocessor_config.json": b"{}"}
    download.main()
    download.main()
    assert [path for path, _ in server.log] == [
        "/openai/clip-vit-base-patch16/resolve/refs%2Fpr%2F10/model.safetensors",
        "/openai/clip-vit-base-patch16/resolve/main/config.json",
        "/openai/clip-vit-base-patch16/resolve/main/preprocessor_config.json",
        "/openai/clip-vit-base-patch16/resolve/main/merges.txt",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[0].endswith("SHA-256 as expected")
    assert lines[1].endswith(f"SHA-256 {hashlib.sha256(b'{}').hexdigest()}")  # nobody knows it beforehand


@pytest.mark.parametrize("name", [name for name in download.MODELS if name != "clip-vit-b-16"])
def test_each_model_has_weights_configuration_and_merges(name, server, tmp_path, monkeypatch, capsys):
    files = download.MODELS[name]
    assert name in checkpoint.NAMES and set(download.MODELS) == set(checkpoint.NAMES[1:])
    known = {file: (*place, DIGEST if file == "merges.txt" else None) for file, (*place, _) in files.items()}
    monkeypatch.setitem(download.MODELS, name, known)
    arguments = ["download.py", "--model", name, "--endpoint", server.url, "--folder", str(tmp_path / "clip")]
    monkeypatch.setattr(sys, "argv", arguments)
    for wrong in ("open_clip_model.safetensors", "open_clip_config.json"):  # an error page, say
        with pytest.raises(UserError, match=f"{wrong} is no .(safetensors|json) file"):
            download.main()
        assert not (tmp_path / "clip" / wrong).exists()
        server.bodies |= {wrong: save({"a": torch.ones(2)}) if wrong.endswith("safetensors") else b"{}"}
    download.main()
    names = ["merges.txt", "open_clip_config.json", "open_clip_model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "clip").iterdir() if file.suffix) == names


@pytest.mark.parametrize(
    "url",
    [
        "http://example.invalid/file",
        "ftp://example.invalid/file",
        "file:///etc/passwd",
        "example.invalid",
        "https://",
        "http://[::1",
        "http://127.0.0.1.example.invalid/file",
        "http://localhost@example.invalid/file",
    ],
)
def test_only_https_is_asked(tmp_path, url):
    with pytest.raises(UserError, match=r"is not https|is no address"):
        download.download(url, tmp_path / "file", DIGEST)


def test_a_server_may_not_lead_to_where_it_is_not_secure(server, tmp_path):
    with pytest.raises(UserError, match=r"example\.invalid/file is not https; use another --endpoint, or --allow-http"):
        download.download(f"{server.url}/insecure", tmp_path / "file", DIGEST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0\xff\n\n",
        b"HTTP/1.1 999999999999 what\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 9-3/1\r\n\r\nabc",
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n",
        b"HTTP/1.1 416 No\r\n\r\n",
        b"HTTP/1.1 503 \x1b[31mred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
def test_a_hostile_server_is_one_line_and_leaves_no_file(server, tmp_path, answer):
    server.odd = answer
    if not answer:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError) as error:
        download.download(f"{server.url}/file", tmp_path / "file", DIGEST)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "file").exists()


def test_a_server_that_drips_is_not_waited_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.1)
    server.drip = True
    with pytest.raises(UserError, match="less than 1,000 bytes a second"):
        download.download(f"{server.url}/file", tmp_path / "file", DIGEST)
    server.drip = False


def test_an_endless_file_is_cut_short(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LIMIT", 3_000_000)
    with pytest.raises(UserError, match="more than 3,000,000 bytes"):
        download.download(f"{server.url}/file", tmp_path / "file", DIGEST)


def test_two_downloads_at_once_fetch_once(server, tmp_path):
    root = Path(__file__).parents[1]
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import download as d\n"
    files = dict.fromkeys("ab", ("repository", "main", DIGEST))
    code += f"d.MODELS['clip-vit-b-16'] = {files}\nd.run_script(d.main)"
    flags = [root / "weights", "--endpoint", server.url, "--folder", tmp_path / "clip"]
    command = list(map(str, [sys.executable, "-c", code, *flags]))
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(*process.communicate(), process.returncode) for process in started]
    assert [code for _, _, code in ends] == [0, 0, 0], ends
    assert len(server.log) == 2 and sorted(file.name for file in (tmp_path / "clip").iterdir()) == [".lock", "a", "b"]


def test_a_full_disk_is_said_and_not_tried_again(server, tmp_path, monkeypatch):
    class Full(type(open(os.devnull, "wb"))):  # noqa: SIM115
        def write(self, content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "open", lambda name, mode: Full(io.FileIO(name, mode)), raising=False)
    with pytest.raises(UserError, match="No space left on device\\); free some space"):
        download.download(f"{server.url}/file", tmp_path / "file", DIGEST)
    assert len(server.log) == 1
