"""Download CLIP ViT-B/16: python weights/download.py

Fetches model.safetensors (599 MB) and merges.txt from Hugging Face into weights/clip-vit-b-16. A broken download goes
on where it stopped, and a file gets its name only when its SHA-256 is right.
"""

import http.client
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from cli import Parser, file_path
from errors import UserError, advice, reason, run_script, shown
from files import locked, make_folder, sha256, take_name

REPOSITORY = "openai/clip-vit-base-patch16"
FILES = {  # name: (revision, SHA-256)
    "model.safetensors": ("refs/pr/10", "846bf12e84b91c2a65b44833a915241443b39356f1000ac1345c61d7bf8a209e"),
    "merges.txt": ("main", "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"),
}
ATTEMPTS, BLOCK = 5, 2**20
LIMIT = 2**30  # bytes
PATIENCE, SLOWEST = 60, 1000  # seconds; bytes a second


def show(name, done, total, start, first):
    """A progress bar in place, on terminals only."""
    if not sys.stderr.isatty():
        return
    rate = (done - first) / max(1e-6, time.monotonic() - start)
    left = round((total - done) / max(1, rate))
    bar = f"▕{'█' * (30 * done // total):30}▏ {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
    line = f"{name} {bar}  {rate / 1e6:.1f} MB/s  {left // 60}:{left % 60:02} left"
    print(f"\r{line}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)


def check_secure(url, allow_http):
    """Raise UserError where others on the way could change what is downloaded; the hash would tell, but late."""
    try:
        parts = urllib.parse.urlsplit(url)
        here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    except ValueError:
        raise UserError(f"{url} is no address; check --endpoint") from None
    if not (parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and (here or allow_http)))):
        raise UserError(f"{url} is not https; use another --endpoint, or --allow-http")


class SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follow a server that says the file is elsewhere, but not to where it isn't secure."""

    def __init__(self, allow_http):
        self.allow_http = allow_http

    def redirect_request(self, request, response, code, message, headers, url):
        check_secure(url, self.allow_http)
        return super().redirect_request(request, response, code, message, headers, url)


def fetch(url, part, allow_http):
    """Download to the file `part`, going on at its end where the server can. Raises OSError on a broken connection."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.build_opener(SecureRedirects(allow_http)).open(request, timeout=30)
    except urllib.error.HTTPError as problem:
        if problem.code == 416 and have:  # nothing lies beyond what we have: whole, or wrong, as the hash will tell
            return
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        first = have if response.status == 206 else 0
        length = response.headers.get("Content-Length", "0")
        total = first + (int(length) if length.isascii() and length.isdigit() else 0)
        done, start, last = first, time.monotonic(), 0.0
        while block := response.read1(BLOCK):
            done += len(block)
            seconds = time.monotonic() - start
            if seconds > PATIENCE and done - first < SLOWEST * seconds:
                raise ConnectionError(f"the server sends less than {SLOWEST:,} bytes a second")
            if done > LIMIT:
                raise UserError(f"{url} sends more than {LIMIT:,} bytes, which is not our file; try another --endpoint")
            try:
                file.write(block)
                file.flush()
            except OSError as problem:
                raise UserError(f"cannot write {part} ({reason(problem)}); {advice(problem)}") from None
            if seconds - last > 0.2 or done == total:
                last = seconds
                show(part.stem, done, max(done, total), start, first)
    if done < total:
        raise ConnectionError(f"the connection closed after {done:,} of {total:,} bytes")


def download(url, file, digest, allow_http=False):
    """Download `url` to `file` and check its SHA-256. Raises UserError."""
    check_secure(url, allow_http)
    part = file.with_name(file.name + ".part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            fetch(url, part, allow_http)
            break
        except UserError:
            raise
        except urllib.error.HTTPError as problem:
            raise UserError(f"{url}: {reason(problem)}; try later, or another --endpoint") from None
        except (OSError, http.client.HTTPException, ValueError) as problem:
            if attempt == ATTEMPTS:
                raise UserError(f"cannot download {url} ({reason(problem)}); run this again to go on") from None
            print(f"{shown(reason(problem))}; trying again", file=sys.stderr)
            time.sleep(attempt)
    found = sha256(part)
    if found != digest:
        part.unlink()
        raise UserError(f"{url} has the SHA-256 {found}, not {digest}; it was deleted, run this again")
    take_name(part, file)


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=file_path, default=Path(__file__).parent / "clip-vit-b-16", help="where to put it"
    )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    parser.add_argument("--endpoint", default=endpoint, help="Hugging Face or a mirror of it")
    parser.add_argument("--allow-http", action="store_true", help="also an endpoint without encryption")
    args = parser.parse_args()
    make_folder(args.folder)
    with locked(args.folder / ".lock", f"another download into {args.folder} runs; waiting for its end", wait=True):
        for name, (revision, digest) in FILES.items():
            file = args.folder / name
            if not (file.exists() and sha256(file) == digest):
                revision = urllib.parse.quote(revision, safe="")
                url = f"{args.endpoint}/{REPOSITORY}/resolve/{revision}/{name}"
                download(url, file, digest, args.allow_http)
            print(f"{file}: {file.stat().st_size:,} bytes, SHA-256 as expected")


if __name__ == "__main__":
    run_script(main)
