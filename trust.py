"""Which paths are followed: a run may come from a stranger, and says where its images and base weights are."""

import contextlib
import shlex
from pathlib import Path

from checkpoint import NAMES, WEIGHTS, base_folder
from data import load_dataset
from errors import UserError, reason
from files import read_json, write_json
from phantom import DEFAULT

NAMED = Path("named-paths.json")  # in the working directory; not in runs/, where a stranger's runs are unpacked


def follow(path, flag, run, roots=None):
    """Return a path that a run's file gives, if it may be read. A run may come from a stranger, who could make us read
    any file: only what lies below the working directory or in weights/ is read, and what was named by a flag before, or
    lies in a folder that was. roots: the places below which all may be read, if they are known. Raises UserError."""
    try:
        real = Path(path).resolve()
        trusted = not (roots or _roots()).isdisjoint([real, *real.parents])
    except (OSError, ValueError) as problem:
        raise UserError(f"{run} gives the path {path!r} ({reason(problem)}); say where it is by {flag}") from None
    if not trusted:
        raise UserError(
            f"{run} wants to read {path}, outside of the working directory; if you trust it, add {flag} "
            f"{shlex.quote(str(path))}"
        )
    return path


def _roots():
    return {folder.resolve() for folder in (Path.cwd(), WEIGHTS, DEFAULT, *map(Path, _named()))}


def _named():
    """→ the paths that flags have named."""
    with contextlib.suppress(UserError):
        known = read_json(NAMED)
        return [path for path in known if isinstance(path, str)] if isinstance(known, list) else []
    return []


def remember(*paths):
    """Let `follow` follow paths that flags name, from now on."""
    known = _named()
    new = [str(path) for path in (Path(path).resolve() for path in paths) if path.exists() and str(path) not in known]
    if new:
        with contextlib.suppress(UserError):  # where nothing can be written, the flag is needed again
            write_json(NAMED, known + new)


def remember_images(splits, data):
    """A data set that a flag names may lie in several places, by links or a manifest's absolute paths."""
    places = {sample.image.resolve().parent for part in splits.values() for sample in part}
    remember(*sorted(place for place in places if not place.is_relative_to(Path(data).resolve())))


def follow_images(splits, run):
    """As `follow` does, for all images of {name: samples}."""
    roots = _roots()
    for place in {sample.image.resolve().parent for part in splits.values() for sample in part}:
        follow(place, "--data", run, roots)


def find_data(data, metadata, run):
    """--data, by default what the run was trained on."""
    if data is None and metadata.settings.data != "phantom":
        return follow(metadata.settings.data, "--data", run)
    if data not in (None, "phantom"):
        remember(data)
    return data or "phantom"


def find_samples(data, metadata, run):
    """→ the samples of --data, by default those of the data set that the run was trained on."""
    samples = load_dataset(find_data(data, metadata, run))
    if data is None:
        follow_images({"all": samples}, run)  # links may lead elsewhere
    elif data != "phantom":
        remember_images({"all": samples}, data)
    return samples


def find_base(weights, base, run):
    """--weights, by default those that the run was trained on."""
    if weights is None and base not in (*NAMES, "scratch"):
        return follow(base, "--weights", run)
    if weights is not None and base_folder(weights) == Path(weights):
        remember(weights)
    return weights or base
