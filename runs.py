"""A run: the folder of a fine-tuned model.

    runs/<name>/adapter.safetensors   only what was trained: LoRA, fusion, head, scale (or everything, with --full);
                                      settings, classes, prompts and base model as JSON in the file's metadata
    runs/<name>/last.safetensors      all that resuming needs (train.py)
    runs/<name>/metrics.jsonl         the figures on val after each tenth of the steps, a line each (train.py)
    runs/<name>/metrics.json          the figures of the best model, and of the untrained one (train.py)
    runs/<name>/split.csv             which image was trained on, and which held out: a manifest (train.py)
    runs/<name>/skipped.txt           images that could not be read, with --skip-bad (train.py)
    runs/<name>/merges.txt            the BPE merges of a model trained from scratch
    runs/<name>/index.jsonl, ….f16    embeddings of the searched images (index.py)
    runs/<name>/base.json             which file of base weights was checked (build.py)
    runs/<name>/.lock                 keeps a second training out

Everything is safetensors and JSON: reading a file from elsewhere can't run code.
"""

import contextlib
import json
import os
import re
import shlex
import time
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

from build import Metadata, check_config, load_trained
from checkpoint import read_safetensors, write_safetensors
from data import load_dataset
from errors import UserError, shown
from files import locked, make_folder, parse_json, read_bytes, read_json, write_text
from parallel import rank
from split_file import hash_of, read_split, write_split
from trust import find_base, find_data, follow_images, remember, remember_images

RUNS = Path("runs")
OVERVIEW = "overview.txt"  # in a run's folder: what was said of its split


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def find_run(run, file="adapter.safetensors"):
    """The --run flag → the run's folder, by default the newest that has `file`. Raises UserError."""
    if run is None:
        runs = [path for path in RUNS.glob(f"*/{file}") if path.is_file()]
        runs.sort(key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"there is no run in {RUNS}/; train one with `python train.py`, or give its --run")
        return runs[-1].parent
    if not run.is_dir():
        raise UserError(f"there is no folder {run}; give --run one of the folders in {RUNS}/")
    if not (run / file).is_file():
        if (run / "last.safetensors").is_file():
            raise UserError(f"{run} was interrupted before it had a model; {_go_on(run)}")
        raise UserError(f"there is no {file} in {run}; give --run one of the folders in {RUNS}/")
    return run


def finished(run):
    """→ a finished training's metrics, else None."""
    with contextlib.suppress(UserError):
        metrics = read_json(run / "metrics.json")
        return metrics if isinstance(metrics, dict) and "split" in metrics else None


def check_unused(run):
    """Raise UserError where a new training would overwrite another one."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; choose another --run")
    if (run / "last.safetensors").exists() and not finished(run):
        raise UserError(f"{run} holds an interrupted training; {_go_on(run)}, or choose another --run")
    if (run / "adapter.safetensors").exists():
        raise UserError(f"{run} already holds a trained model; choose another --run")
    ours = ("split.csv", "merges.txt", "model.safetensors", "metrics.json")
    if any((run / name).exists() for name in ours) and not (run / ".lock").exists():
        raise UserError(f"{run} holds files that would be overwritten; choose another --run")


def _go_on(run):
    return f"go on with: python train.py --resume --run {shlex.quote(str(run))}"


@contextlib.contextmanager
def claimed(run, new=False):
    """Keep other trainings out of the run's folder while the block runs, and let Ctrl-C name the command that goes on.
    new: make the folder. Of several processes only the first does it."""
    if rank():
        yield
        return
    if new:
        make_folder(run)
    with locked(run / ".lock", f"another training writes to {run}; wait for its end, or choose another --run"):
        if new:
            check_unused(run)  # again: another training may have been faster
        for left_over in run.glob(".*.tmp"):  # of a process that was killed
            left_over.unlink()
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*[_go_on(run)] if (run / "last.safetensors").exists() else []) from None


def new_folder(settings):
    """Make a folder in runs/ that is nobody else's → its path."""
    names = (re.sub(r"[^\w.-]+", "_", Path(path).stem)[:40] for path in (settings.data, settings.weights))
    name = "-".join([*names, time.strftime("%Y%m%d-%H%M%S")])
    make_folder(RUNS)
    for number in count(1):
        run = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            run.mkdir()
            return run
        except FileExistsError:  # a training that began in the same second
            continue


def record(run, settings, splits, bad, overview):
    """What a training begins with: where its images and weights are, the split and what is to be said of it, and {image
    that was skipped: why}."""
    remember(*(path for path in (settings.data, settings.weights) if os.path.isabs(path)))  # others are names
    remember_images(splits, settings.data)
    write_split(run / "split.csv", splits)
    write_text(run / OVERVIEW, overview + "\n")
    if bad:
        write_text(run / "skipped.txt", "".join(f"{shown(why)}\n" for why in bad.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted trainings


@dataclass
class State:
    """Where a training stands. Kept with the optimizer's tensors in last.safetensors."""

    zero_shot: dict  # the untrained model's figures
    split: str  # the hash of split.csv
    step: int = 0  # finished steps
    threads: int = 0  # that computed: another number adds up in another order
    seconds: float = 0.0  # spent on them, evaluation included
    best_score: float = -1.0
    best_step: int = 0  # after which the model was best
    scaler: dict = field(default_factory=dict)  # GradScaler's

    def __post_init__(self):
        if not all(isinstance(getattr(self, f.name), f.type) for f in fields(self)) or self.step < 0:
            raise TypeError("a value is of another type")


class Saved(NamedTuple):
    """What last.safetensors holds."""

    metadata: Metadata
    state: State
    tensors: dict


def unfinished_run(run, longer):
    """--resume's run: the newest unfinished one, or the named one. longer: it may be a finished one, too."""
    if run is not None:
        if not longer and finished(run):
            raise UserError(f"{run} is finished; to train it longer, add --steps N, all in all")
        if run.is_dir() and not (run / "last.safetensors").is_file():
            raise UserError(f"{run} cannot be resumed, it has no last.safetensors; train a new run")
        return find_run(run, "last.safetensors")
    runs = [path for path in RUNS.glob("*/last.safetensors") if path.is_file()]
    runs.sort(key=lambda path: path.stat().st_mtime)
    runs = [path.parent for path in runs if longer or not finished(path.parent)]
    if not runs:
        raise UserError(f"there is no unfinished run in {RUNS}/; give its --run, or train one without --resume")
    return runs[-1]


def read_saved(run, given):
    """A run → what it `Saved`, and its splits. given: the settings on the command line. --data and --weights may say
    where these are now, --steps may prolong the training; any other change is a UserError."""
    file = run / "last.safetensors"
    tensors, stored = read_safetensors(file)
    metadata = Metadata.read(stored, file)
    try:
        state = State(**stored["state"])
    except (KeyError, TypeError):
        raise UserError(f"{file} is of another version or damaged; train a new run") from None
    settings = metadata.settings
    for name, value in given.items():
        old = getattr(settings, name)
        if name == "steps" and value < state.step:
            raise UserError(f"--steps {value} is less than the {state.step} steps that {run} has done; give more")
        if value != old and name not in ("data", "weights", "steps"):
            flag = "--" + name.replace("_", "-")
            said = "the default" if old is None else ",".join(map(str, old)) if isinstance(old, tuple) else old
            begun = f"with {flag} {said}" if not isinstance(old, bool) else f"{'with' if old else 'without'} {flag}"
            raise UserError(f"{run} was begun {begun}; leave the flag out, or train a new run")
    data = find_data(given.get("data"), metadata, run)
    data = data if data == "phantom" else str(Path(data).resolve())
    weights = find_base(given.get("weights"), settings.weights, run)
    moved = data == "phantom" or data != settings.data
    splits = read_split(run, load_dataset(data) if moved else None)
    follow_images(splits, run)
    if hash_of(splits) != state.split:
        raise UserError(
            f"the images of {data}, or {run / 'split.csv'}, are others than when the run was begun; restore them, or "
            "train a new run"
        )
    if moved:
        write_split(run / "split.csv", splits)
    settings = replace(settings, data=data, weights=weights, steps=given.get("steps", settings.steps))
    return Saved(replace(metadata, settings=settings), state, tensors), splits


def resume(run, saved, metadata, model, optimization, device):
    """Set model and optimizer back to where the run was interrupted → State. Raises UserError where the weights are
    others than when the run was begun."""
    if metadata.base["fingerprint"] != saved.metadata.base["fingerprint"]:
        raise UserError(
            f"{metadata.settings.weights} holds other weights than when {run} was begun; name those by --weights, or "
            "train a new run"
        )
    check_config(run, saved.metadata.base["config"], metadata.base["config"], metadata.settings.weights)
    prefix = "model."
    trained = {name.removeprefix(prefix): t for name, t in saved.tensors.items() if name.startswith(prefix)}
    load_trained(model, trained, run / "last.safetensors")
    optimization.restore(saved.tensors, device)
    optimization.scaler.load_state_dict(saved.state.scaler)
    best = run / "adapter.safetensors"
    if best.exists() and not rank():  # it may name data and weights where they are no more
        write_safetensors(best, read_safetensors(best)[0], asdict(metadata))
    print(f"resuming after step {saved.state.step}", flush=True)
    return saved.state


def read_log(run):
    """→ the lines of metrics.jsonl, dicts, but for damaged ones."""
    file, lines = run / "metrics.jsonl", []
    for text in read_bytes(file).decode("utf-8", "replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            line = parse_json(text)
            lines += [line] if isinstance(line, dict) and isinstance(line.get("step"), int) else []
    return lines


def log(run, step, line=None):
    """Drop the lines of metrics.jsonl after a step, and append one, a JSON object."""
    if rank():
        return
    lines = [each for each in read_log(run) if each["step"] <= step] + ([line] if line else [])
    write_text(run / "metrics.jsonl", "".join(f"{json.dumps(each)}\n" for each in lines))


def keep(run, metadata, state, optimization, best=False):
    """Write all that resuming needs; if it is the best model so far, also that."""
    if rank():
        return
    if best:
        write_safetensors(run / "adapter.safetensors", optimization.parameters, asdict(metadata))
    state.scaler = optimization.scaler.state_dict()
    write_safetensors(run / "last.safetensors", optimization.tensors(), {**asdict(metadata), "state": asdict(state)})
