"""What each part of the method is worth on your data: python ablate.py --data path

Three questions, each answered by many trainings:

    --parts               What is each part worth alone, added to those before it, and left out? Asked by default.
    --shots 2,4,8,16      How many training images does each class need?
    --vary lora-rank=4    What would another setting of train.py give? May be repeated.

The *parts* are LoRA, levels (multi-level CLS fusion), slerp, contrastive (the contrastive loss) and prompts (against
the bare class name). The *head*, the classifier, is always trained. Alone, it leaves CLIP's towers frozen.

Every training is repeated with several seeds, which also draw the split (--seeds). Or it is done once for each of n
parts of the data, which are held out in turn (--folds n). Both ways the repeats are *paired*: what makes a split easy
or hard is the same for all lines of the table, and cancels in their differences. After each figure stands in brackets
by how much it differs from the line that it is compared with: the mean of the repeats' differences and its 95 %
confidence interval, mean ± t · s / √n (s: their standard deviation, n: their number, t: Student's; folds count by their
images). An interval that includes zero shows nothing; the others are bold. Of many intervals, one in twenty misses the
truth by chance. Repeats share images, test images above all; how lucky the choice of those was, no interval says.

No round is chosen here: the model after the last step is scored, on the test images if there are any, else on the
validation images. Finished trainings are kept in --folder, so that an interrupted ablation goes on.

Source: arXiv 2509.00752 for the parts. Where a part does not help on some data, the table says so.
"""

import json
import math
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from cache import open_cache
from checkpoint import base_folder
from cli import Parser, add_machine_flags, file_path, find_device, positive_int, set_threads, whole_number
from data import class_names
from errors import UserError, counted, run_script
from files import make_folder, read_json, write_json, write_text
from pictures import curves
from prompts import class_prompts
from runs import claimed, finished
from settings import Settings, add_settings, given_settings, refuse_idle
from split_file import hash_of, write_split
from splits import describe, few, load_checked, split_dataset
from train import finish, train

OFF = {  # part: the settings that switch it off
    "LoRA": {"lora_rank": 0},
    "levels": {"fusion": "none"},
    "slerp": {"slerp": 0.0},
    "contrastive": {"contrastive": 0.0},
}
FIGURES = {  # key in metrics.json: column
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "i2i_mrr": "image→image MRR",
    "t2i_mrr": "text→image MRR",
    "t2i_caption_mrr": "same caption MRR",
}
# Student's t for a 95 % interval from 2, 3, … 11 repeats; with more, the last one, which is slightly too wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Variant(NamedTuple):
    """A way to train."""

    name: str
    changes: dict  # of the settings
    prompts: bool = True  # False: a class's only prompt is its name


class Row(NamedTuple):
    """A line of the table."""

    variant: Variant
    trained: bool = True  # False: the figures before training
    against: str | None = None  # the line that it is compared with


# ---------------------------------------------------------------------------------------------------------------------
# The questions


def with_parts(*parts):
    """→ the Variant in which these parts of OFF are on, and the others off."""
    changes = {key: value for part, off in OFF.items() if part not in parts for key, value in off.items()}
    return Variant("+".join(part for part in OFF if part in parts) or "head", changes)


def rows_of_parts(full):
    """→ {name: Row}. full: every weight is trained, by "head", too; so there is no LoRA to be switched off."""
    parts = [part for part in OFF if not (full and part == "LoRA")]
    everything = with_parts(*parts)
    nameless = Variant("names", everything.changes, prompts=False)
    rows = {"zero-shot, class names": Row(nameless, trained=False)}
    rows["zero-shot, prompts"] = Row(everything, trained=False, against="zero-shot, class names")
    rows["head"] = Row(with_parts(), against="zero-shot, prompts")
    rows |= {f"head + {part}": Row(with_parts(part), against="head") for part in parts}
    for i in range(1, len(parts) - 1):
        so_far = " + ".join(["head", *parts[:i]])
        rows[f"{so_far} + {parts[i]}"] = Row(with_parts(*parts[: i + 1]), against=so_far)
    rows["all"] = Row(everything, against=" + ".join(["head", *parts[:-1]]))
    rows |= {f"all but {p}": Row(with_parts(*(q for q in parts if q != p)), against="all") for p in parts}
    return rows | {"all but prompts": Row(nameless, against="all")}


def rows_of_shots(full):
    """→ {name: Row}, for each number of images."""
    everything = with_parts(*OFF)
    rows = {"zero-shot": Row(everything, trained=False), "head": Row(with_parts(), against="zero-shot")}
    rows |= {} if full else {"LoRA": Row(with_parts("LoRA"), against="head")}
    return rows | {"all": Row(everything, against="head" if full else "LoRA")}


def rows_of_settings(texts, parser, settings, device):
    """The --vary flags, like "lora-rank=4 lr=1e-3" → {name: Row}."""
    rows = {"all": Row(with_parts(*OFF))}
    for text in texts:
        flags = [f"--{flag}" for flag in text.split()]
        varied = Settings.from_flags(parser.parse_args([*sys.argv[1:], *flags]), device)
        refuse_idle([flag.strip("-").split("=")[0].replace("-", "_") for flag in flags], varied)
        new, old = asdict(varied), asdict(settings)
        changes = {key: value for key, value in new.items() if value != old[key]}
        if not changes or changes.keys() & {"data", "split", "fold", "duplicates", "seed"}:
            raise UserError(
                f"--vary {text!r} changes no setting that can be compared; name flags of train.py other than data, "
                "split, fold, duplicates and seed, with other values"
            )
        rows[text] = Row(Variant(text, changes), against="all")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The trainings


class Trainings:
    """Variants × repeats, each trained once: what repeats share is prepared once."""

    def __init__(self, settings, repeats, args, total):
        """repeats: {name: changes of the settings}; total: how many trainings there will be."""
        self.settings, self.repeats, self.args, self.total = settings, repeats, args, total
        self.untrained, self.runs, self.done = {}, set(), 0  # runs: those looked at; done: those trained now
        self.how = find_device(args.device), args.workers, open_cache(args.folder, args.cache_gb)
        with redirect_stdout(sys.stderr):  # standard output is the table's
            self.samples, self.duplicates, _ = load_checked(settings, args.workers)

    def run(self, row, shots=None):
        """→ [metrics of each repeat]. shots: training images of each class; None: all of them."""
        results = []
        for repeat, changes in self.repeats.items():
            name = "-".join([row.variant.name.replace("/", "_"), *([f"{shots}-shots"] if shots else []), repeat])
            run = self.args.folder / name
            self.runs.add(run)
            if not finished(run):
                print(f"{len(self.runs)} of {self.total}: training {run}", file=sys.stderr, flush=True)
                try:
                    self.train(run, row.variant, replace(self.settings, **changes, **row.variant.changes), shots)
                except UserError as problem:
                    raise UserError(f"{run}: {problem}") from None
            metrics = finished(run)
            results.append(metrics if row.trained else _untrained(metrics))
        return results

    def train(self, run, variant, settings, shots):
        splits = split_dataset(
            self.samples, settings.split, settings.seed, fold=settings.fold, duplicates=self.duplicates
        )
        if shots:
            splits["train"] = few(splits["train"], shots, settings.seed)
        if not self.done:
            print(describe(splits, self.samples, self.duplicates), file=sys.stderr)
        classes = class_names(splits["train"])
        prompts = class_prompts(classes, self.args.prompts) if variant.prompts else {name: [name] for name in classes}
        # What decides the untrained model's figures, which are computed once. From scratch they are chance.
        key = settings.seed, settings.fold, settings.weights, settings.frame, settings.precision, variant.prompts
        make_folder(run)
        (run / "log.txt").unlink(missing_ok=True)  # it might be a link
        with (
            claimed(run),
            open(run / "log.txt", "w", encoding="utf-8", errors="backslashreplace") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            write_split(run / "split.csv", splits)
            trained = train(run, settings, splits, prompts, *self.how, known=self.untrained.get(key), rounds=1)
            metrics = finish(run, splits, *trained, *self.how, report=False)
            (run / "last.safetensors").unlink()  # nothing is resumed in the middle of a training
        self.untrained[key], self.done = _untrained(metrics), self.done + 1


def _untrained(metrics):
    prefix = "zero_shot_"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------------
# The figures


def mean_and_interval(values, weights):
    """→ mean, and half the width of its 95 % interval (None where all values are the same). weights: the images behind
    each value; a fold's accuracy counts as much as its images, so that the mean is the accuracy over all of them."""
    weights = [weight / sum(weights) for weight in weights]
    mean = sum(w * v for w, v in zip(weights, values, strict=True))
    if max(values) - min(values) < 1e-9:
        return mean, None
    square = sum((w * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    n = len(values)
    return mean, STUDENT[min(n, len(STUDENT) + 1) - 2] * math.sqrt(square * n / (n - 1))


def summarize(results):
    """{row: (its [metrics of each repeat], those of the row that it is compared with, or None)} → {row: {figure:
    {"mean", "values", and with a comparison "difference", "interval"}}}, of those figures that every repeat has."""
    rows = {}
    for name, (own, other) in results.items():
        weights = [sum(of_class["images"] for of_class in metrics["by_class"].values()) for metrics in own]
        rows[name] = {}
        for key in FIGURES:
            values = [metrics.get(key) for metrics in own]
            if None in values or (other and None in [metrics.get(key) for metrics in other]):
                continue
            rows[name][key] = {"mean": mean_and_interval(values, weights)[0], "values": values}
            if other:
                differences = [value - metrics[key] for value, metrics in zip(values, other, strict=True)]
                difference, interval = mean_and_interval(differences, weights)
                rows[name][key] |= {"difference": difference, "interval": interval}
    return rows


def markdown(rows, against, heading):
    """{row: summary}, {row: the one that it is compared with} → a Markdown table, without the columns that have no
    figures. Differences are bold where their interval excludes zero."""
    keys = [key for key in FIGURES if any(key in row for row in rows.values())]
    lines = [[heading, "compared with", *(FIGURES[key] for key in keys)], ["---"] * (2 + len(keys))]
    lines += [[name, against[name] or "", *(_cell(row.get(key)) for key in keys)] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(figure):
    if figure is None:
        return "–"
    text = f"{figure['mean']:.3f}"
    if "difference" in figure:
        difference, interval = figure["difference"], figure["interval"]
        shown = f"({difference:+.3f})" if interval is None else f"({difference:+.3f} ± {interval:.3f})"
        text += f" **{shown}**" if interval is not None and abs(difference) > interval else f" {shown}"
    return text


def draw_shots(summary, numbers, rows):
    """Accuracy and image→image MRR, if there is one, over the number of training images → SVG."""
    panels = {}
    for key in ("accuracy", "i2i_mrr"):
        if all(key in row for row in summary.values()):
            panels[FIGURES[key]] = {
                name: [(n, summary[f"{n} images, {name}"][key]["values"]) for n in numbers] for name in rows
            }
    return curves(panels, "training images of each class")


# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument_group("ablation").add_argument
    add("--parts", action="store_true", help="what each part is worth alone, added, and left out")
    add("--shots", type=numbers, metavar="A,B,…", help="train on so many images of each class; held-out ones stay")
    add("--vary", action="append", help="another setting, like lora-rank=4; two at once: 'lr=1e-3 slerp=1'")
    seeds_help = "train everything once with each of these seeds; default: 0 1 2 3 4"
    add("--seeds", type=whole_number, nargs="+", help=seeds_help)
    add("--folds", type=positive_int, help="instead of the seeds: hold out each of so many parts in turn")
    add("--folder", type=file_path, default=Path("runs/ablation"), help="where runs and tables are written")
    add("--prompts", type=file_path, help="as in train.py")
    add_machine_flags(parser, trains=True)
    add_settings(parser)
    args = parser.parse_args()
    if ((args.parts or args.vary) and args.shots and len(args.shots) > 1) or (args.parts and args.vary):
        raise UserError("ask one question: --parts, --vary or several --shots; one --shots goes with the others")
    args.given = given_settings(parser)
    if args.given.keys() & {"seed", "fold"}:
        raise UserError("--seed and --fold are for a single training; use --seeds or --folds here")
    if args.folds and args.seeds:
        raise UserError("--folds takes the place of --seeds; leave one of them out")
    if args.folds == 1:
        raise UserError("--folds should be 2 or more, not 1")
    args.seeds = args.seeds or [0, 1, 2, 3, 4]
    return parser, args


def numbers(text):
    return tuple(positive_int(number) for number in text.split(","))


def check_folder(folder, name, content):
    """Refuse to mix the trainings of two ablations."""
    make_folder(folder)
    kept = folder / f"{name}.json"
    same = kept.exists() and read_json(kept) == json.loads(json.dumps(content))
    if any(folder.glob("*/metrics.json")) and not same:
        raise UserError(f"{folder} holds an ablation with other {name}; choose another --folder")
    write_json(kept, content)


def main():
    parser, args = parse_arguments()
    device = find_device(args.device, alone=True)
    settings = Settings.from_flags(args, device)
    refuse_idle(args.given, settings)
    set_threads(args.threads)
    if (base_folder(settings.weights) / "adapter.safetensors").is_file():
        raise UserError(f"{settings.weights} is a run, which has learned already; name the base model by --weights")
    prompts = read_json(args.prompts) if args.prompts else None
    check_folder(args.folder, "settings", {**asdict(settings), "prompts": prompts})
    if args.vary:
        question, rows = "vary", rows_of_settings(args.vary, parser, settings, device)
    elif args.shots and not args.parts:
        question, rows = "shots", rows_of_shots(settings.full)
    else:
        question, rows = "parts", rows_of_parts(settings.full)
    repeats = {str(seed): {"seed": seed} for seed in args.seeds}
    if args.folds:
        repeats = {f"fold-{k}-of-{args.folds}": {"fold": f"{k}/{args.folds}"} for k in range(1, args.folds + 1)}
    total = len({row.variant.name for row in rows.values()}) * len(args.shots or [None]) * len(repeats)
    trainings, start, lines, against = Trainings(settings, repeats, args, total), time.monotonic(), {}, {}
    check_folder(args.folder, "images", hash_of({"all": trainings.samples}))
    for shots in args.shots or (None,):
        results = {name: trainings.run(row, shots) for name, row in rows.items()}
        for name, row in rows.items():
            line = f"{shots} images, {name}" if question == "shots" else name
            lines[line], against[line] = (results[name], results.get(row.against)), row.against

    summary = summarize(lines)
    table = markdown(summary, against, f"{len(repeats)} {'folds' if args.folds else 'seeds'}")
    content = {"settings": asdict(settings), "repeats": list(repeats), "rows": summary}
    name = f"{question}-{args.shots[0]}" if args.shots and question != "shots" else question
    write_json(args.folder / f"{name}.json", content)
    write_text(args.folder / f"{name}.md", table)
    if question == "shots":
        write_text(args.folder / "shots.svg", draw_shots(summary, args.shots, rows))
    print(table, end="")
    print(f"{counted(trainings.done, 'training')} in {(time.monotonic() - start) / 60:.0f} min", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
