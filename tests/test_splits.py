"""splits.py against scikit-learn and what the user is promised."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold
from test_data import LARYNX, needs_larynx, user_error

from data import Sample, load_dataset
from split_file import read_split, trained_images, write_split
from splits import describe, split_dataset


def table(*rows):
    """(label, group, split) … → samples of an image each."""
    return [
        Sample(Path(f"{i}.png"), label=row[0], **dict(zip(("group", "split"), row[1:], strict=False)))
        for i, row in enumerate(rows)
    ]


def classes(samples):
    return Counter(sample.label for sample in samples)


def assert_covering(splits, samples):
    assert list(splits) == ["train", "val", "test"]
    everything = [sample for part in splits.values() for sample in part]
    assert Counter(everything) == Counter(samples)


@pytest.mark.parametrize("seed", range(5))
def test_a_random_split_holds_out_a_fifth_of_each_class(seed):
    samples = table(*[("a",)] * 100 + [("b",)] * 35 + [("c",)] * 2)
    splits = split_dataset(samples, seed=seed)
    assert classes(splits["val"]) == {"a": 20, "b": 7, "c": 1}
    assert not splits["test"]
    assert_covering(splits, samples)


def test_a_random_split_follows_its_seed_not_the_order_of_the_samples():
    samples = table(*[("a",), ("b",)] * 30)
    splits = [split_dataset(samples, "random", seed=seed)["val"] for seed in range(10)]
    assert splits == [split_dataset(samples, "random", seed=seed)["val"] for seed in range(10)]
    assert len({tuple(val) for val in splits}) == 10
    assert set(split_dataset(samples[::-1], "random", seed=3)["val"]) == set(splits[3])


def test_splits_are_the_same_in_every_process():
    """Python's sets of strings come in another order in each process: resuming a run would train on its val images."""
    code = """if True:
        from splits import *
        samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], group=f"{i % 2}{i // 4}") for i in range(80)]
        print([[s.image.name for s in split_dataset(samples, how)["val"]] for how in ("random", "group")])"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 100


def test_a_split_may_hold_out_another_fraction():
    splits = split_dataset(table(*[("a",), ("b",)] * 20), fraction=0.4)
    assert classes(splits["val"]) == {"a": 8, "b": 8}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=4, max_size=40), st.integers(0, 9))
def test_an_image_with_several_captions_stays_on_one_side(captions, seed):
    several = [(i, f"caption {j}") for i, n in enumerate(captions) for j in range(n)]
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], (caption,)) for i, caption in several]
    splits = split_dataset(samples, "random", seed=seed)
    assert_covering(splits, samples)
    assert not {s.image for s in splits["train"]} & {s.image for s in splits["val"]}


rows = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("pqrstuvw")), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows, st.integers(0, 9), st.sampled_from([0.1, 0.2, 0.5]))
def test_no_group_is_on_both_sides_and_every_class_is_trained_on(rows, seed, fraction):
    samples = table(*rows)
    homes = {label: {g for lab, g in rows if lab == label} for label, _ in rows}
    free = [g for _, g in rows if all(homes[label] != {g} for label in homes)]  # groups that no class depends on
    if len(homes) < 2 or not free:
        user_error(split_dataset, samples, "group", seed, fraction)
        return
    splits = split_dataset(samples, "group", seed, fraction)
    assert_covering(splits, samples)
    assert not {s.group for s in splits["train"]} & {s.group for s in splits["val"]}
    assert classes(splits["train"]).keys() == homes.keys()
    assert splits["val"]
    assert splits == split_dataset(samples, "group", seed, fraction)


@pytest.mark.parametrize("seed", range(5))
def test_a_group_split_holds_out_a_fifth_of_the_groups_of_each_class(seed):
    samples = table(*[(label, f"{label}{i // 3}") for label in "ab" for i in range(30)])
    val = split_dataset(samples, "group", seed=seed)["val"]
    assert classes(val) == {"a": 6, "b": 6}
    assert len({s.group for s in val}) == 4


def test_group_splits_differ_by_seed():
    samples = table(*[(label, f"{label}{i}") for label in "ab" for i in range(20)])
    assert len({tuple(split_dataset(samples, "group", seed=seed)["val"]) for seed in range(10)}) == 10


def test_a_class_of_one_group_stays_in_train():
    samples = table(*[("a", "p")] * 5, *[("b", "q"), ("b", "r")] * 3)
    for seed in range(5):
        splits = split_dataset(samples, "group", seed=seed)
        assert classes(splits["train"]) == {"a": 5, "b": 3}
        assert classes(splits["val"]) == {"b": 3}


def test_the_manifests_own_split_is_kept():
    samples = table(("a", "p", "train"), ("b", "p", "train"), ("a", "p", "val"), ("b", "p", "test"), ("b", "q", "val"))
    splits = split_dataset(samples)
    assert [[samples.index(s) for s in part] for part in splits.values()] == [[0, 1], [2, 4], [3]]


def test_where_the_manifest_has_train_and_test_only_val_comes_from_train():
    samples = table(*[("a", None, "train"), ("b", None, "train")] * 10, *[("a", None, "test"), ("b", None, "test")] * 3)
    splits = split_dataset(samples, seed=1)
    assert splits["test"] == samples[20:]
    assert classes(splits["val"]) == {"a": 2, "b": 2}
    assert_covering(splits, samples)


def test_val_taken_from_train_keeps_groups_together():
    rows = [(f"{i}.png", "ab"[i % 2], None, f"patient {i // 4}", "train") for i in range(40)]
    rows += [(f"t{i}.png", "ab"[i % 2], None, f"other {i}", "test") for i in range(4)]
    splits = split_dataset([Sample(Path(image), *rest) for image, *rest in rows])
    train, val = ({sample.group for sample in splits[name]} for name in ("train", "val"))
    assert val and not train & val and len(splits["test"]) == 4


def test_auto_prefers_the_manifests_split_to_groups_and_groups_to_chance():
    rows = [(label, f"{label}{i // 2}", "val" if i > 6 else "train") for label in "ab" for i in range(8)]
    split = {how: split_dataset(table(*rows), how) for how in ("auto", "manifest", "group", "random")}
    assert split["auto"] == split["manifest"]
    assert len(split["manifest"]["val"]) == 2
    grouped = table(*[row[:2] for row in rows])
    assert split_dataset(grouped) == split_dataset(grouped, "group") != split_dataset(grouped, "random")
    alone = table(*[row[:1] for row in rows])
    assert split_dataset(alone) == split_dataset(alone, "random")


@pytest.mark.parametrize(
    ("rows", "how", "says"),
    [
        ([("a",)] * 9, "random", "'a'"),
        ([("a", "p"), ("a", "q")] * 9, "group", "'a'"),
        ([("a",)] * 9 + [("b",)], "random", "'b'"),
        ([("a",), (None,), ("b",)], "auto", "1.png"),
        ([("a", None, "train"), ("b", None, "train"), ("c", None, "val")], "auto", "lacks: c"),
        ([("a", None, "train"), ("b", None, "train"), ("a", None, "val"), ("d", None, "test")], "auto", "lacks: d"),
        ([("a", None, "train"), ("b", None, "train")], "auto", "no image is marked val"),
        ([("a", None, "train"), ("b", None, "train"), ("b",)], "auto", "not every image has a split"),
        ([("a", None, "train"), ("b", None, "train"), ("b",)], "manifest", "not every image has a split"),
        ([("a", "p"), ("a", "q"), ("b", "p"), ("b",)], "auto", "has no group"),
        ([("b",), ("a", "p"), ("a", "q"), ("b", "p")], "auto", "has no group"),
        ([("b",), ("a", None, "train"), ("b", None, "val")], "auto", "not every image has a split"),
        ([("a", None, "val"), ("b", None, "val")], "auto", "no image is marked train"),
        ([("a",), ("a",), ("b",), ("b",)], "group", "has no group"),
        ([("a", "p"), ("b", "p")] * 9, "group", "second group"),
    ],
)
def test_labels_that_do_not_allow_to_train_are_named(rows, how, says):
    assert says in user_error(split_dataset, table(*rows), how)


@needs_larynx
def test_the_larynx_sequences_are_kept_apart():
    splits = split_dataset(load_dataset(LARYNX / "manifest.csv"))
    assert not {s.group for s in splits["train"]} & {s.group for s in splits["val"]}
    assert len(classes(splits["train"])) == 4
    assert sum(map(len, splits.values())) == 139


# ---------------------------------------------------------------------------------------------------------------------
# Folds


def folds_of(samples, parts, how, seed=0, duplicates=()):
    return [split_dataset(samples, how, seed, fold=f"{k}/{parts}", duplicates=duplicates) for k in range(1, parts + 1)]


def unevenness(folds):
    """By how many images the counts of a class differ between folds at most."""
    counts = [Counter(sample.label for sample in splits["val"]) for splits in folds]
    labels = {label for count in counts for label in count}
    return max(max(c[label] for c in counts) - min(c[label] for c in counts) for label in labels)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abc"), min_size=30, max_size=60), st.integers(2, 5), st.integers(0, 5))
def test_every_image_is_held_out_once_and_classes_are_even(labels, parts, seed):
    labels = [*"abc" * 5, *labels]
    samples = [Sample(Path(f"{i}.png"), label) for i, label in enumerate(labels)]
    folds = folds_of(samples, parts, "random", seed)
    out = Counter(sample for splits in folds for sample in splits["val"])
    assert set(out) == set(samples) and set(out.values()) == {1}
    for splits in folds:
        assert set(splits["train"]) | set(splits["val"]) == set(samples) and not splits["test"]
    assert unevenness(folds) <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=20, max_size=40), st.integers(2, 4))
def test_folds_by_group_are_as_even_as_scikit_learns(groups, parts):
    groups = [*(("abc"[i % 3], 3) for i in range(3 * parts)), *groups]
    samples = [
        Sample(Path(f"{g}-{i}.png"), label, group=f"patient {g}")
        for g, (label, n) in enumerate(groups)
        for i in range(n)
    ]
    folds = folds_of(samples, parts, "group")
    for splits in folds:
        assert not {s.group for s in splits["train"]} & {s.group for s in splits["val"]}
    assert sum(len(splits["val"]) for splits in folds) == len(samples)
    labels, names = [s.label for s in samples], [s.group for s in samples]
    theirs = []
    for _, out in StratifiedGroupKFold(parts, shuffle=True, random_state=0).split(labels, labels, names):
        theirs.append({"val": [samples[i] for i in out]})
    assert unevenness(folds) <= max(9, unevenness(theirs))


def test_the_only_group_of_a_class_stays_in_train():
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], group=f"{i // 2}") for i in range(20)]
    samples += [Sample(Path(f"c{i}.png"), "c", group="alone") for i in range(3)]
    for splits in folds_of(samples, 5, "group"):
        assert all(sample in splits["train"] for sample in samples[-3:])


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "one of five", "1", "1/5/2", "-1/5"])
def test_an_odd_fold_is_named(fold):
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2]) for i in range(20)]
    assert "1/5" in user_error(split_dataset, samples, "random", fold=fold)


def test_folds_need_enough_groups_and_no_split_column():
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], group=f"{i // 5}") for i in range(20)]
    assert "groups or images for 9 parts" in user_error(split_dataset, samples, "group", fold="1/9")
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], split="train") for i in range(20)]
    assert "--split group" in user_error(split_dataset, samples, fold="1/5")


@needs_larynx
def test_the_larynx_folds_hold_out_every_sequence_once():
    samples = load_dataset(LARYNX / "manifest.csv")
    folds = folds_of(samples, 4, "group")
    alone = "patient2-seq8"  # the only sequence of its class
    assert Counter(s.group for splits in folds for s in splits["val"]) == Counter(
        s.group for s in samples if s.group != alone
    )


# ---------------------------------------------------------------------------------------------------------------------
# Duplicates


def test_copies_stay_on_one_side_of_a_random_split():
    samples = [Sample(Path(f"{i:02}.png"), "ab"[i % 2]) for i in range(40)]
    duplicates = [[samples[i].image, samples[i + 20].image] for i in range(0, 20, 3)]
    for seed in range(5):
        whole = split_dataset(samples, "random", seed, duplicates=duplicates)
        for splits in [whole, *folds_of(samples, 3, "random", seed, duplicates)]:
            train = {sample.image for sample in splits["train"]}
            assert all((a in train) == (b in train) for a, b in duplicates)
            assert len(splits["train"]) + len(splits["val"]) == 40


def test_groups_with_copies_of_a_picture_stay_together():
    samples = [Sample(Path(f"{i:02}.png"), "ab"[i % 2], group=f"g{i // 4}") for i in range(40)]
    duplicates = [[samples[0].image, samples[12].image], [samples[13].image, samples[30].image]]  # groups 0, 3 and 7
    for seed in range(5):
        splits = split_dataset(samples, "group", seed, duplicates=duplicates)
        out = {sample.group for sample in splits["val"]}
        assert len(out & {"g0", "g3", "g7"}) in (0, 3)


def test_a_manifests_test_images_that_are_copies_of_training_images_are_left_out():
    rows = [Sample(Path(f"{i}.png"), "ab"[i % 2], split=("train", "val", "test")[i // 10]) for i in range(30)]
    duplicates = [[rows[0].image, rows[20].image], [rows[1].image, rows[11].image], [rows[12].image, rows[22].image]]
    splits = split_dataset([*rows, Sample(rows[2].image, "a", split="test")], duplicates=duplicates)
    assert splits["train"] == rows[:10]
    assert splits["val"] == [s for s in rows[10:20] if s is not rows[11]]
    assert splits["test"] == [s for s in rows[20:] if s not in (rows[20], rows[22])]
    text = describe(splits, [*rows, rows[2]], duplicates)
    assert "3 pictures found more than once" in text and "4 images left out" in text


def test_a_split_is_kept_as_a_manifest(tmp_path):
    rows = [Sample(tmp_path / f"{i}.png", "ab"[i % 2], ("a, b", "c")[: i % 3], f"g{i // 4}") for i in range(20)]
    rows[3] = replace(rows[3], match=rows[2].image)
    for row in rows:
        row.image.write_bytes(b"")
    splits = split_dataset(rows, "group")
    write_split(tmp_path / "split.csv", splits)
    for again, name in itertools.product(
        (split_dataset(load_dataset(tmp_path / "split.csv")), read_split(tmp_path)), ("train", "val", "test")
    ):
        assert [(s.image, s.label, s.captions, s.group, s.match) for s in again[name]] == [
            (s.image, s.label, s.captions, s.group, s.match) for s in splits[name]
        ]
    assert trained_images(tmp_path) == {s.image for s in splits["train"]} and trained_images(tmp_path / "no") == set()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.sampled_from(["random", "group"]))
def test_an_image_and_its_match_stay_on_one_side(seed, how):
    rng = random.Random(seed)
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], group=f"g{i // 2}") for i in range(60)]
    for a in rng.sample(range(60), 12):
        samples[a] = replace(samples[a], match=samples[rng.randrange(60)].image)
    splits = split_dataset(samples, how, seed=seed)
    side = {sample.image: name for name, part in splits.items() for sample in part}
    assert all(side[s.image] == side[s.match] for s in samples if s.match) and len(side) == 60
