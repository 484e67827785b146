"""Download CLIP ViT-B/16, or another base model: python weights/download.py [--model NAME]

Fetches the weights, their configuration and merges.txt from Hugging Face into weights/NAME. A broken download goes on
where it stopped. A file gets its name only when its SHA-256 is right; where that is not known, when it can be read, and
the SHA-256 that it has is printed.
"""

import http.client
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from safetensors import SafetensorError, safe_open

sys.path.append(str(Path(__file__).parents[1]))
from cli import Parser, file_path
from errors import UserError, advice, reason, run_script, shown
from files import locked, make_folder, read_json, sha256, take_name

B_16 = "openai/clip-vit-base-patch16"
MERGES = (B_16, "main", "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a")  # all have the same
TENSORS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def of_open_clip(repository, revision="main", digest=None):
    """The files of a model that open_clip's authors keep, with its configuration."""
    return {TENSORS: (repository, revision, digest), CONFIG: (repository, revision, None), "merges.txt": MERGES}


MODELS = {  # {name: {file: (repository, revision, SHA-256 if it is known)}}
    "clip-vit-b-16": {
        "model.safetensors": (B_16, "refs/pr/10", "846bf12e84b91c2a65b44833a915241443b39356f1000ac1345c61d7bf8a209e"),
        "config.json": (B_16, "main", None),
        "preprocessor_config.json": (B_16, "main", None),
        "merges.txt": MERGES,
    },
    "clip-vit-b-32": of_open_clip(
        "timm/vit_base_patch32_clip_224.openai",
        "a6f597a30f7b82c51704746581f9a4e41421e878",
        "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",
    ),
    "clip-vit-l-14": of_open_clip("timm/vit_large_patch14_clip_224.openai"),
    "clip-vit-l-14-336": of_open_clip("timm/vit_large_patch14_clip_336.openai"),
    "clip-vit-b-16-laion": of_open_clip(
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "7288da5a0d6f0b51c4a2b27c624837a9236d0112"
    ),
}
ATTEMPTS, BLOCK = 5, 2**20
LIMIT = 2**31  # bytes; the largest has 1.7 GB
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
    """Download `url` to `file` and check its SHA-256, or, where that is None, that it can be read. Raises UserError."""
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
    if digest is None:
        check_readable(part, file, url)
    elif found != digest:
        part.unlink()
        raise UserError(f"{url} has the SHA-256 {found}, not {digest}; it was deleted, run this again")
    take_name(part, file)


def check_readable(part, file, url):
    """Raise UserError, and delete it, where a downloaded file is none of its kind but an error page, say."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(part, "pt"):
                return
        read_json(part)
    except (UserError, SafetensorError) as problem:
        part.unlink()
        raise UserError(f"{url} is no {file.suffix} file ({reason(problem)}); it was deleted, run this again") from None


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="clip-vit-b-16", help="which base model")
    parser.add_argument("--folder", type=file_path, help="where to put it; by default into weights/, by its name")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    parser.add_argument("--endpoint", default=endpoint, help="Hugging Face or a mirror of it")
    parser.add_argument("--allow-http", action="store_true", help="also an endpoint without encryption")
    args = parser.parse_args()
    folder = args.folder or Path(__file__).parent / args.model
    make_folder(folder)
    with locked(folder / ".lock", f"another download into {folder} runs; waiting for its end", wait=True):
        for name, (repository, revision, digest) in MODELS[args.model].items():
            file = folder / name
            if not (file.exists() and digest in (None, sha256(file))):
                revision = urllib.parse.quote(revision, safe="")
                download(f"{args.endpoint}/{repository}/resolve/{revision}/{name}", file, digest, args.allow_http)
            checked = "SHA-256 as expected" if digest else f"SHA-256 {sha256(file)}"
            print(f"{file}: {file.stat().st_size:,} bytes, {checked}")


if __name__ == "__main__":
    run_script(main)
