"""Which images are trained on, and which are held out.

Why groups matter: neighbouring frames of one video are nearly the same picture. A random split puts them on both sides,
and a model that has memorized the training images then seems to recognize patients whom it has never met.

Try changing this: in `main`, split "random" with other seeds and count the patients who are on both sides: about three
of five. By "group" there are none.
"""

import random
import re
from collections import Counter
from pathlib import Path

from data import Sample, class_names, load_dataset
from errors import UserError, counted, shown
from images import find_duplicates, look_at

FEW = 30  # images to be scored: one of them is more than 0.03 of the accuracy


def split_dataset(samples, how="auto", seed=0, fraction=0.2, fold=None, duplicates=()):
    """Samples → {"train": […], "val": […], "test": […]}; test is empty unless the manifest has one.

    how: "manifest" takes its split column as it is (with train and test but no val, val is taken from train: by groups
    if every training image has one, else at random); "group" holds out whole groups; "random" is stratified by class;
    "auto" is the first of these that the data has. About `fraction` of each class is held out, at least one image, or
    one group; a class with one group only stays in train.

    fold: "k/n" holds out part k of n instead. Over all k every image is held out once, except those of the only unit of
    a class, which are always trained on. Class counts are evened out, the largest units first.

    duplicates: lists of images that show the same picture (`images.find_duplicates`), which are kept on one side. Where
    the manifest has them on several, the later ones of train, val and test are left out. So are an image and its match,
    unless there is a test part: a search of the held-out images should be able to find it.

    Raises UserError where the labels do not allow training.
    """
    unlabelled = next((sample for sample in samples if sample.label is None), None)
    if unlabelled:
        raise UserError(
            f"{unlabelled.image} has no label; give a sub-folder for each class, or a manifest with the column label"
        )
    if how == "auto":
        has_split, has_group = any(sample.split for sample in samples), any(sample.group for sample in samples)
        how = "manifest" if has_split else "group" if has_group else "random"
    if how == "group" and not all(sample.group for sample in samples):
        lacking = next(sample.image for sample in samples if not sample.group)
        raise UserError(
            f"{lacking} has no group; fill the manifest's group column for every image, or use --split random, which "
            "may put a patient on both sides"
        )
    if how == "manifest":
        if fold:
            raise UserError("--fold makes its own splits; use --split group or --split random with it")
        splits = _split_by_manifest(samples, seed, fraction, duplicates)
    else:
        matches = [(sample.image, sample.match) for sample in samples if sample.match]
        unit = _units(samples, how == "group", [*duplicates, *matches])
        if fold:
            splits = _split_by_fold(samples, unit, seed, fold)
        else:
            splits = (_split_by_group if how == "group" else _split_randomly)(samples, unit, seed, fraction)
    classes = class_names(splits["train"])
    if len(classes) < 2:
        if not classes:
            raise UserError("no image is marked train; mark some in the manifest's split column")
        raise UserError(f"there is only one class to train on, {classes[0]!r}; give images of two classes or more")
    for name in ("val", "test"):
        unknown = sorted(set(class_names(splits[name])) - set(classes))
        if unknown:
            raise UserError(
                f"the {name} split has labels that train lacks: {', '.join(unknown)}; mark some of these as train"
            )
    if not splits["val"]:
        if how == "manifest":
            raise UserError("no image is marked val; mark some in the manifest's split column, or use --split random")
        raise UserError(
            "no class has a second group that could be held out; give images of more groups, or use --split random"
        )
    return splits


def scored_split(splits):
    """The name of the split that a run's final figures are of: test, which nothing was chosen by, else val."""
    return "test" if splits["test"] else "val"


def describe(splits, samples, duplicates=(), bad=()):
    """→ a text: how many images of each class there are on each side, and what the user should know of the split."""
    names, classes = [name for name, part in splits.items() if part], class_names(splits["train"])
    sides = ", ".join(f"{len(splits[name]):,} {name}" for name in names)
    lines = [f"{sum(map(len, splits.values())):,} images of {len(classes)} classes: {sides}"]
    counts = {name: Counter(sample.label for sample in splits[name]) for name in names}
    width = max(len(shown(label)) for label in classes)
    for label in classes:
        lines.append(f"  {shown(label):{width}}  " + ", ".join(f"{counts[name][label]:,} {name}" for name in names))
    if any(sample.group for sample in samples):
        groups = [f"{len({sample.group for sample in splits[name]}):,} {name}" for name in names]
        lines.append(f"  {'groups':{width}}  " + ", ".join(groups))
    return "\n".join(lines + [f"note: {shown(note)}" for note in _notes(splits, samples, duplicates, bad)])


def _notes(splits, samples, duplicates, bad):
    """Yield what makes the split's figures doubtful."""
    if bad:
        yield f"left out, as unreadable: {counted(len(bad), 'image')}"
    if duplicates:
        yield f"{counted(len(duplicates), 'picture')} found more than once; copies are kept on one side"
    label = {sample.image: sample.label for sample in samples}
    for copies in duplicates:
        a, b = copies[0], next((image for image in copies if label[image] != label[copies[0]]), None)
        if b:
            yield f"{a} and {b} show the same picture, but are {label[a]!r} and {label[b]!r}; correct one of them"
    if len(samples) > sum(map(len, splits.values())):
        left_out = len(samples) - sum(map(len, splits.values()))
        yield f"{counted(left_out, 'image')} left out, a copy of which is on another side of the split"
    classes, sides = class_names(splits["train"]), {}
    for name, part in splits.items():
        lacking = set(classes) - set(class_names(part))
        if part and lacking:
            yield f"{name} has no image of {', '.join(sorted(lacking))}"
        for sample in part:
            sides.setdefault(sample.group, set()).add(name)
    mixed = sorted(group for group, names in sides.items() if group and len(names) > 1)
    if mixed:
        yield f"{counted(len(mixed), 'group')} on several sides, {mixed[0]} for one: the figures are too good"
    for name in ("val", "test"):
        if 0 < len(splits[name]) < FEW:
            yield f"only {counted(len(splits[name]), 'image')} in {name}: its figures are rough"


def _by_label(samples):
    classes = {}
    for sample in samples:
        classes.setdefault(sample.label, []).append(sample)
    return dict(sorted(classes.items()))


def _split_by_manifest(samples, seed, fraction, duplicates):
    if not all(sample.split for sample in samples):
        raise UserError(
            "not every image has a split; fill the manifest's split column, or use --split group or --split random"
        )
    splits = {name: [s for s in samples if s.split == name] for name in ("train", "val", "test")}
    if splits["test"] and splits["train"] and not splits["val"]:
        by_group = all(sample.group for sample in splits["train"])
        unit = _units(splits["train"], by_group, duplicates)
        rest = (_split_by_group if by_group else _split_randomly)(splits["train"], unit, seed, fraction)
        splits |= {"train": rest["train"], "val": rest["val"]}
    picture = {image: number for number, copies in enumerate(duplicates) for image in copies}
    seen = set()
    for name, part in splits.items():
        splits[name] = [s for s in part if picture.get(s.image, s.image) not in seen]
        seen |= {picture.get(s.image, s.image) for s in part}
    return splits


def _units(samples, by_group, duplicates):
    """What stays on one side of a split: images of a group, copies of a picture → {image: name of its unit}. If
    patients share a picture, they become one unit, and so on along chains of copies."""
    unit, joined = {s.image: s.group if by_group else s.image for s in samples}, {}

    def find(name):
        while name in joined:
            name = joined[name]
        return name

    for copies in duplicates:
        names = {find(unit[image]) for image in copies if image in unit}
        if names:
            joined |= dict.fromkeys(names - {min(names)}, min(names))
    return {image: find(name) for image, name in unit.items()}


def _split_randomly(samples, unit, seed, fraction):
    rng, chosen = random.Random(seed), set()
    for label, members in _by_label(samples).items():
        images = sorted({unit[sample.image] for sample in members})  # an image with two captions stays on one side
        if len(images) < 2:
            raise UserError(
                f"class {label!r} has only one image (copies count once); give at least two, or leave the class out"
            )
        chosen.update(rng.sample(images, max(1, round(fraction * len(images)))))
    return _divide(samples, unit, chosen)


def _divide(samples, unit, chosen):
    splits = {"train": [], "val": [], "test": []}
    for sample in samples:
        splits["val" if unit[sample.image] in chosen else "train"].append(sample)
    return splits


def _split_by_group(samples, unit, seed, fraction):
    rng, chosen = random.Random(seed), set()
    for members in _by_label(samples).values():
        sizes = Counter(unit[sample.image] for sample in members)
        groups = sorted(sizes)
        rng.shuffle(groups)
        groups.sort(key=lambda group: max(0, sizes[group] - fraction * len(members)))  # those that fit first, at random
        for group in groups:
            out = [sample for sample in members if unit[sample.image] in chosen]
            # A group may hold images of several classes: none of them may lose its last group to train on.
            touched = {sample.label for sample in samples if unit[sample.image] == group}
            left = {sample.label for sample in samples if unit[sample.image] not in chosen | {group}}
            if len(out) < fraction * len(members) and touched <= left:
                chosen.add(group)
    return _divide(samples, unit, chosen)


def _split_by_fold(samples, unit, seed, fold):
    """The largest units first, each goes to the fold that has least of its classes so far. The only unit of a class
    stays in train in every fold."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", fold)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not (parts > 1 and 1 <= part <= parts):
        raise UserError(f"--fold should be like 1/5, the first of five parts, not {fold!r}")
    content, classes = {}, {}
    for sample in {s.image: s for s in samples}.values():  # an image once
        content.setdefault(unit[sample.image], Counter())[sample.label] += 1
        classes.setdefault(sample.label, set()).add(unit[sample.image])
    total = sum(content.values(), Counter())
    units = sorted(set(content) - {name for names in classes.values() if len(names) == 1 for name in names})
    random.Random(seed).shuffle(units)
    units.sort(key=lambda name: -content[name].total())
    if len(units) < parts:
        raise UserError(f"--fold {fold}: there are only {len(units)} groups or images for {parts} parts; use fewer")
    folds = [[] for _ in range(parts)]
    loads = [Counter() for _ in range(parts)]
    for name in units:

        def cost(i, name=name):  # how much the squares of the classes' shares in the folds would grow
            return sum(loads[i][label] * n / total[label] ** 2 for label, n in content[name].items()), loads[i].total()

        best = min(range(parts), key=cost)
        folds[best].append(name)
        loads[best] += content[name]
    return _divide(samples, unit, set(folds[part - 1]))


def few(samples, shots, seed):
    """→ `shots` random images of each class, or as many as there are. Fewer shots are a subset of more."""
    chosen = set()
    for members in _by_label(samples).values():
        images = sorted({sample.image for sample in members})
        chosen.update(random.Random(seed).sample(images, len(images))[:shots])
    return [sample for sample in samples if sample.image in chosen]


def load_checked(settings, workers):
    """→ the samples of --data, lists of images that show the same picture, and {image that cannot be read: why}. Raises
    UserError where there are such images, unless they are to be skipped."""
    samples = load_dataset(settings.data)
    print(f"reading {counted(len(samples), 'image')} to find damaged ones and copies", flush=True)
    looks, bad = look_at([sample.image for sample in samples], workers)
    for why in bad.values():
        print(shown(why))
    if bad and not settings.skip_bad:
        raise UserError(
            f"{len(bad):,} of {len(samples):,} images cannot be read, {next(iter(bad))} for one, all are listed above; "
            "repair them or move them away, or add --skip-bad to go on without them"
        )
    samples = [sample for sample in samples if sample.image not in bad]
    return samples, find_duplicates(looks) if settings.duplicates == "together" else [], bad


def make_splits(settings, workers):
    """→ the splits of --data, a text that describes them, and {image that is left out: why}."""
    samples, duplicates, bad = load_checked(settings, workers)
    splits = split_dataset(samples, settings.split, settings.seed, fold=settings.fold, duplicates=duplicates)
    return splits, describe(splits, samples, duplicates, bad), bad


def main():
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], group=f"patient {i // 4}") for i in range(20)]
    print("20 images of 5 patients and 2 classes:")
    for how in ("random", "group"):
        splits = split_dataset(samples, how)
        counts = {name: dict(Counter(sample.label for sample in part)) for name, part in splits.items() if part}
        patients = [{sample.group for sample in splits[name]} for name in ("train", "val")]
        print(f"split {how:6} {counts}, {len(patients[0] & patients[1])} patients on both sides")


if __name__ == "__main__":
    main()
