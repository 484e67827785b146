"""weights/download.py against a small HTTP server on this machine."""

import hashlib
import http.server
import importlib.util
import threading
from pathlib import Path

import pytest

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
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", "/target")
                return self.end_headers()
            start = int(asked.split("=")[1].rstrip("-")) if asked and state.ranges else 0
            if asked and start >= len(CONTENT):
                return self.send_error(416)
            self.send_response(206 if asked and state.ranges else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start : start + state.breaks.pop(0)] if state.breaks else CONTENT[start:])

        def log_message(self, *args):
            pass

    state = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.log, state.breaks, state.ranges = [], [], True
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
    revisions = {name: (revision, DIGEST) for name, (revision, _) in download.FILES.items()}
    monkeypatch.setattr(download, "FILES", revisions)
    monkeypatch.setattr("sys.argv", ["download.py", "--endpoint", server.url, "--folder", str(tmp_path / "clip")])
    download.main()
    download.main()
    assert [path for path, _ in server.log] == [
        "/openai/clip-vit-base-patch16/resolve/refs%2Fpr%2F10/model.safetensors",
        "/openai/clip-vit-base-patch16/resolve/main/merges.txt",
    ]
    assert capsys.readouterr().out.count("as expected") == 4
