"""What stands between the scripts and their user: flags, the device and its precision, progress."""

import argparse
import csv
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

import parallel
from errors import UserError, counted, shown
from images import IMAGE_SUFFIXES


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Name the defaults, where there is one."""

    def _get_help_string(self, action):
        bare = action.default is None or action.default is False
        return action.help if bare else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that names the defaults in its help, and whose errors are one line, as all our errors are."""

    def __init__(self, description):
        prog = os.path.relpath(sys.argv[0]) if os.path.isfile(sys.argv[0]) else sys.argv[0]
        super().__init__(prog=prog, description=description, formatter_class=Help, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        for action in self._actions:
            if (
                action.nargs is None and getattr(parsed, action.dest, None) == [] != action.default
            ):  # argparse makes this of "--flag --"
                self.error(f"argument {action.option_strings[0]}: it lacks its value")
        return parsed

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}; see python {self.prog} --help")


def add_machine_flags(parser, trains=False):
    """Where to compute: --device and --workers; for a training also --threads and --cache-gb."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    workers = max(1, min(8, (os.cpu_count() or 1) // parallel.local_world()))
    parser.add_argument(
        "--workers", type=whole_number, default=workers, help="threads that read images; 0: the main one does"
    )
    if trains:
        free = "threads that compute; default: one for each core that no other program keeps busy"
        parser.add_argument("--threads", type=positive_int, help=free)
        most = "GB of the disk for decoded images while training, 0: none; default: a quarter of what is free"
        parser.add_argument("--cache-gb", type=gigabytes, help=most)


def add_run_flags(
    parser,
    data_help="images, as train.py takes them; by default the data set that the run was trained on",
    batch_help="images at a time",
):
    """Which fine-tuned model to use, and on what: --data, --run, --weights and --batch-size."""
    parser.add_argument("--data", type=typed(str), help=data_help)
    parser.add_argument("--run", type=file_path, help="a fine-tuned model's folder; by default the newest in runs/")
    parser.add_argument("--weights", type=typed(str), help="where the run's base model is, if it has moved")
    parser.add_argument("--batch-size", type=positive_int, default=32, help=batch_help)
    add_machine_flags(parser)


def typed(kind):
    """str, int or float → a function that makes one of a flag's text, and says in plain words where it can't."""
    noun = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]

    def read(text):
        if not text.strip():
            raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:100]!r} is not {noun}") from None

    return read


def file_path(text):
    """A flag's text → Path. An empty one would mean the working directory."""
    return Path(typed(str)(text))


def whole_number(text, least=0, most=10**9):
    number = typed(int)(text)
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text[:100]} is not a whole number from {least} to {most:,}")
    return number


def gigabytes(text):
    number = typed(float)(text)
    if not 0 <= number <= 1e6:
        raise argparse.ArgumentTypeError(f"{text[:100]} is not a number of gigabytes")
    return number


def fraction(text):
    number = typed(float)(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text[:100]} is not a number from 0 to 1")
    return number


def positive_int(text):
    return whole_number(text, least=1)


# ---------------------------------------------------------------------------------------------------------------------
# The device


def find_device(name, alone=False):
    """The --device flag → torch.device; auto takes a GPU if there is one, and of several processes each its own. Here
    they meet. Raises UserError where there is no such device, or where several would be in each other's way (alone)."""
    if alone and parallel.world() > 1:
        raise UserError("this is work for one process; start it with python, not with torchrun")
    if parallel.world() > 1:
        if name not in ("auto", "cpu", "cuda"):
            raise UserError("of several processes each finds its own GPU; leave --device out, or give cpu")
        cuda = torch.cuda.is_available() and name != "cpu"
        name = f"cuda:{parallel.local_rank()}" if cuda else "cpu" if name == "auto" else name
    parallel.start()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps"):  # others exist, of which nothing here knows
            raise RuntimeError
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what asks for "the" GPU gets this one, as with --device cuda:1
        return device
    except (RuntimeError, AssertionError):  # AssertionError: PyTorch without CUDA
        raise UserError(f"there is no device {name!r} on this machine; try --device cpu") from None


def add_query_flags(parser, what):
    """Submissions to the ENTRep challenge: --queries and --zip."""
    parser.add_argument(
        "--queries", type=file_path, help=f"print a submission to the ENTRep challenge, as JSON: {what}"
    )
    parser.add_argument("--zip", type=file_path, help="with --queries: write the submission into this zip archive, too")


def check_query_flags(args, *others):
    """Raise UserError where --zip or another flag has no effect. others: those that do not go with --queries."""
    if args.zip and not args.queries:
        raise UserError("--zip has no effect without --queries; leave it out")
    if args.zip and (args.zip.suffix.lower() != ".zip" or not args.zip.parent.is_dir()):
        raise UserError(f"--zip cannot write {args.zip}; give it a name that ends in .zip, in a folder that exists")
    idle = [name for name in others if args.queries and getattr(args, name)]
    if idle:
        raise UserError(f"--{idle[0]} has no effect with --queries; leave one of them out")


def check_sheet(args):
    """Raise UserError where --sheet cannot be written, or --explain has no effect."""
    if args.explain and not args.sheet:
        raise UserError("--explain has no effect without --sheet; explain.py shows a single image")
    if args.sheet and args.sheet.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"--sheet cannot write {args.sheet}; give it a name that ends in .png or .jpg")
    if args.sheet and not args.sheet.parent.is_dir():
        raise UserError(f"there is no folder {args.sheet.parent} to write {args.sheet.name} to; make it first")


def print_json(value):
    """In UTF-8, but for what a terminal would obey."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def print_csv(rows):
    """None is an empty cell."""
    name = shown if sys.stdout.isatty() else str  # a terminal would obey what a file keeps
    csv.writer(sys.stdout).writerows(["" if cell is None else name(cell) for cell in row] for row in rows)


def report_bad(bad):
    """{file that was skipped: why}: say so at the end, and end with status 1."""
    if bad:
        if not parallel.rank():
            print("\n".join(map(shown, bad.values())), file=sys.stderr)
            print(f"{counted(len(bad), 'image')} could not be read, as listed above, and left out", file=sys.stderr)
        sys.exit(1)


def set_threads(wanted=None):
    """As many threads compute as wanted; without a number one for each core that no other program keeps busy.

    Threads that share a matrix product wait for each other in a busy loop. Where another program takes one's core, all
    the others burn theirs: on two cores, two trainings at once were 2.5 times slower with two threads each than with
    one.
    """
    if not wanted and torch.get_num_threads() > 1:
        wanted = max(1, math.floor(min(torch.get_num_threads(), _idle_cores(0.2) + 0.5)))
        if wanted < torch.get_num_threads():
            print(f"note: other programs keep cores busy, so {counted(wanted, 'thread')} will do; --threads decides it")
    torch.set_num_threads(wanted or torch.get_num_threads())


def _idle_cores(seconds):
    """How many of the cores that this process may use were idle in the next seconds; infinite where nothing tells."""

    def idle():
        with open("/proc/stat") as file:
            times = {name: list(map(int, values)) for name, *values in map(str.split, file) if name.startswith("cpu")}
        mine = [times[f"cpu{core}"] for core in os.sched_getaffinity(0)]
        return sum(values[3] for values in mine), sum(map(sum, mine)), len(mine)  # idle, all, in hundredths of a second

    try:
        before, total_before, _ = idle()
        time.sleep(seconds)
        after, total_after, cores = idle()
        return cores * (after - before) / (total_after - total_before)
    except (OSError, AttributeError, KeyError, ValueError, ZeroDivisionError):  # not on Linux
        return math.inf


def native_precision(device):
    """The type that the device multiplies matrices in fastest, of those that serve: bfloat16 on GPUs and CPUs that have
    instructions for it, float16 on older GPUs, float32 elsewhere.

    Both 16-bit types halve the traffic, and such units multiply them several times as fast. bfloat16 has float32's
    range, with 7 digits after the binary point instead of 23. float16 has 10, but ends at 65,504 above and 6e-8 below,
    so small gradients vanish (see `Optimization` in optimization.py).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    can = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


def find_precision(name, device):
    """The setting `precision` → torch.dtype: what the device does fastest, or float32."""
    native = native_precision(device)
    return native if name in ("auto", name_of(native)) else torch.float32


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# Progress


class Progress:
    """Until all is done: progress, images or steps per second, time left; on a terminal in place every second, in a log
    a line every ten."""

    def __init__(self, total, file=None, unit="images", first=0):
        """first: so many were done before."""
        self.total, self.file, self.unit, self.first = total, file or sys.stdout, unit, first
        self.start = self.last = time.monotonic()

    def __call__(self, done, text, loss=None):
        """loss: a scalar tensor; its value is fetched from a GPU only when a line is printed."""
        now, tty = time.monotonic(), self.file.isatty()
        if now - self.last < (1 if tty else 10) or done == self.total or parallel.rank():
            return
        self.last = now
        rate = (done - self.first) / (now - self.start)
        left = round((self.total - done) / rate)
        text += "" if loss is None else f"  loss {loss:.3f}"
        line = f"{text}  {done / self.total:4.0%}  {rate:.1f} {self.unit}/s  {left // 60}:{left % 60:02} left"
        print(f"\r{line}\x1b[K" if tty else line, end="\r" if tty else "\n", file=self.file, flush=True)
