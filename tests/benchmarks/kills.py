"""Kill the programs at random moments, and let them run out of disk: is anything lost or broken?

    python tests/benchmarks/kills.py --kills 120 --full 24

Training, indexing, downloading and exporting are each killed (SIGKILL, SIGTERM or SIGINT in turn) at random moments and
started again, several times in a row, until one start ends by itself. After each kill every file must be readable. At
the end the result must be that of a run that nobody disturbed: to the bit, or for the index, whose images then come in
other batches, to rounding. A resumed training may repeat the round that was just reported, but none before.

A full disk is a limit to the size of files: the program must end with one line on standard error, what was there must
stay readable, and once there is room it must come to the same end.
"""

import argparse
import hashlib
import http.server
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fuzz
import numpy as np
import torch
from safetensors.torch import load_file

from files import parse_json

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
DOWNLOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import download
from errors import run_script
from pathlib import Path
run_script(lambda: download.download(sys.argv[2], Path("file"), sys.argv[3]))
"""


class Program:
    """A command, the files that it makes, and what goes on with it after an interruption, if that is another one."""

    def __init__(self, folder, command, results, going_on=None):
        self.folder, self.command, self.results, self.going_on = folder, command, results, going_on
        self.fresh = folder.with_name(folder.name + " fresh")
        shutil.copytree(folder, self.fresh)

    def reset(self):
        shutil.rmtree(self.folder)
        shutil.copytree(self.fresh, self.folder)

    def start(self, limit=None):
        def restrict():
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        resumable = self.going_on and (self.folder / "run/last.safetensors").exists()
        command = [sys.executable, *map(str, self.going_on if resumable else self.command)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=environment, preexec_fn=restrict, **pipes)

    def finish(self, limit=None):
        """→ exit status, standard output, standard error."""
        process = self.start(limit)
        out, err = process.communicate()
        return process.returncode, out, err

    def check_readable(self):
        for file in self.folder.rglob("*"):
            if file.suffix == ".safetensors":
                load_file(file)
            elif file.suffix == ".json":
                parse_json(file.read_text())
            elif file.suffix == ".jsonl":
                [parse_json(line) for line in file.read_text().splitlines()]

    def result(self):
        """→ {file: what should be the same in every run}."""
        found = {}
        for name in self.results:
            file = self.folder / name
            if name.endswith("index.jsonl"):
                head, *lines = map(json.loads, file.read_text().splitlines())
                rows = np.fromfile(file.with_name(head["rows"]), np.float16).reshape(-1, 64)
                rows = rows[: 1 + max(row for *_, row in lines)]
                found[name] = sorted(rows.astype(np.float64).sum(1).tolist())
            elif name.endswith(".safetensors"):  # without its metadata, which tell how long the training took
                found[name] = {key: tensor.numpy().tobytes() for key, tensor in load_file(file).items()}
            else:
                found[name] = file.read_bytes()
        return found

    def same(self, expected):
        for name, value in self.result().items():
            if isinstance(value, list):
                torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0)
            elif value != expected[name]:
                raise AssertionError(f"{name} differs from an undisturbed run's")


def programs(folder, address):
    """→ {name: Program}, each in a folder of its own."""
    pictures, base, run = fuzz.prepare(folder)
    for copy in range(12):
        shutil.copytree(pictures / "images", folder / "many" / f"{copy}")
    flags = ["--data", pictures / "manifest.csv", "--weights", base, "--device", "cpu", "--workers", 1]
    training = [ROOT / "train.py", *flags, "--batch-size", 6]
    work = {name: folder / name for name in ("training", "indexing", "downloading", "exporting")}
    for place in work.values():
        place.mkdir()
    shutil.copytree(run, work["indexing"] / "run")
    plain = [sys.executable, *training, "--steps", 4, "--fusion", "none", "--run", "plain"]
    subprocess.run([*map(str, plain)], cwd=work["exporting"], check=True, capture_output=True)
    search = ["--run", "run", "--data", folder / "many", "--weights", base, "--text", "red", "--workers", 1]
    content = random.Random(0).randbytes(40_000_000)
    (folder / "served").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    commands = {
        "training": (
            [*training, "--steps", 400, "--run", "run"],
            ["run/adapter.safetensors", "run/last.safetensors", "run/metrics.jsonl"],
            [ROOT / "train.py", "--resume", "--run", "run", "--workers", 1, "--weights", base, "--device", "cpu"],
        ),
        "indexing": ([ROOT / "retrieve.py", *search, "--batch-size", 4], ["run/index.jsonl"]),
        "downloading": (["-c", DOWNLOAD, ROOT / "weights", f"{address}/served", digest], ["file"]),
        "exporting": (
            [ROOT / "weights/export.py", "plain", "out", "--weights", base],
            ["out/model.safetensors", "out/merges.txt"],
        ),
    }
    return {name: Program(work[name], *parts) for name, parts in commands.items()}


def serve(folder):
    """Serve the folder's files slowly, with ranges → its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = (folder / self.path[1:]).read_bytes()
            start = int(self.headers.get("Range", "bytes=0-").split("=")[1].rstrip("-"))
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            try:
                for at in range(start, len(content), 400_000):
                    self.wfile.write(content[at : at + 400_000])
                    time.sleep(0.01)
            except OSError:
                pass  # killed

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def kill(name, program, expected, seconds, kills, rng):
    """Kill so many times → how often it was still running. Raises AssertionError where something is lost."""
    hits = 0
    while kills > 0:
        program.reset()
        reported = []
        for _ in range(min(kills, rng.randrange(1, 6))):
            kills -= 1
            process = program.start()
            time.sleep(rng.uniform(0.5, seconds))
            process.send_signal(SIGNALS[kills % 3])
            out, err = process.communicate()
            hits += process.returncode != 0
            if "Traceback" in err and "import" not in err:  # before our first line Python itself prints one
                raise AssertionError(f"{name}: {err}")
            program.check_readable()
            resumed = re.search(r"resuming after step (\d+)", out)
            if resumed and len(reported) > 1 and int(resumed[1]) < reported[-2]:
                raise AssertionError(f"{name}: resumed after step {resumed[1]}, reported were {reported}")
            reported += [int(step) for step in re.findall(r"^step +(\d+)/", out, re.MULTILINE)]
            finished = process.returncode == 0 or (program.going_on and (program.folder / "run/metrics.json").exists())
            if finished:
                break
        status, _, err = (0, "", "") if finished else program.finish()
        if status and "already holds weights" not in err:  # killed when all was done
            raise AssertionError(f"{name}: after the kills it ends with {status}: {err}")
        program.check_readable()
        program.same(expected)
    return hits


def fill(name, program, expected, limits):
    """→ how many limits stopped the program."""
    stopped = 0
    for limit in limits:
        program.reset()
        status, _, err = program.finish(limit)
        lines = err.splitlines()
        if status not in (0, 2) or "Traceback" in err or (status == 2 and not lines[-1].startswith("error: ")):
            raise AssertionError(f"{name}, at most {limit:,} bytes: {status} {err}")
        stopped += status == 2
        program.check_readable()
        status, _, err = program.finish()
        if status:
            raise AssertionError(f"{name}, once there is room: {err}")
        program.same(expected)
    return stopped


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--full", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        os.chdir(folder)
        made = programs(folder, serve(folder))
        shares = {"training": 0.5, "indexing": 0.2, "downloading": 0.15, "exporting": 0.15}
        for name, program in made.items():
            start = time.monotonic()
            status, _, err = program.finish()
            if status:
                raise AssertionError(f"{name}: undisturbed {status} {err}")
            seconds, expected = time.monotonic() - start, program.result()
            largest = max(file.stat().st_size for file in program.folder.rglob("*") if file.is_file())
            kills, full = round(args.kills * shares[name]), args.full // len(made)
            hits = kill(name, program, expected, seconds, kills, rng)
            stopped = fill(name, program, expected, [rng.randrange(largest) for _ in range(full)])
            print(f"{name:11} {seconds:.1f} s undisturbed; {kills} kills, {hits} while it ran: ", end="")
            print(f"nothing lost; {full} limits, {stopped} of them hit: nothing broken", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
