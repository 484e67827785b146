"""Calibration, against scipy, NumPy and hand-computed cases; what classify.py says of its images."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mistake
from PIL import Image
from scipy.optimize import minimize_scalar

import classify
import evaluate
import train
from calibration import CALIBRATION, Calibration, calibration_error, coverage, fit_temperature, reliability
from errors import UserError


def rows_of(run):
    return list(csv.DictReader(io.StringIO((run / "split.csv").read_text())))


def overconfident(count, factor, seed=0):
    """Logits and labels, of which the labels are drawn by the softmax of logits / factor."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits * factor, labels


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_the_temperature_is_the_most_likely_one(factor):
    logits, labels = overconfident(3000, factor)

    def loss(u):  # the negative log-likelihood, and the prior
        log_p = torch.log_softmax(logits.double() * np.exp(u), 1)
        return -log_p.gather(1, labels[:, None]).sum().item() + u**2 / 2

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8})
    T = fit_temperature(logits, labels)
    assert pytest.approx(np.exp(-best.x), rel=1e-5) == T
    assert pytest.approx(factor, rel=0.1) == T


def test_where_all_is_right_the_temperature_stays_bounded():
    labels = torch.arange(40) % 4
    assert 0.1 < fit_temperature(20.0 * F.one_hot(labels, 4), labels) < 1
    assert 1 < fit_temperature(20.0 * F.one_hot(labels, 4), (labels + 1) % 4) < 21


def test_the_calibration_error_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 0])
    rows = reliability(probabilities, labels, bins=5)
    assert [row["images"] for row in rows] == [1, 1, 2]
    assert [row["accuracy"] for row in rows] == [0, 1, 0.5]
    assert calibration_error(rows) == pytest.approx((0.55 + 0.3 + 2 * 0.4) / 4)


def test_the_calibration_error_is_what_numpy_computes():
    logits, labels = overconfident(500, 2.0, seed=1)
    p = logits.double().softmax(1).numpy()
    said, right = p.max(1), p.argmax(1) == labels.numpy()
    error = 0.0
    for low in np.arange(15) / 15:
        here = (said > low) & (said <= low + 1 / 15)
        if here.any():
            error += here.mean() * abs(said[here].mean() - right[here].mean())
    rows = reliability(logits.softmax(1), labels)
    assert calibration_error(rows) == pytest.approx(error) and error > 0.1
    T = fit_temperature(*overconfident(500, 2.0, seed=2))
    assert calibration_error(reliability((logits / T).softmax(1), labels)) < error / 2


def test_coverage_by_hand():
    probabilities = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    rows = coverage(probabilities, torch.tensor([1, 1, 0, 0]), (1.0, 0.5, 0.01))
    assert [row["accuracy"] for row in rows] == [0.5, 1.0, 1.0]
    assert [row["at_least"] for row in rows] == pytest.approx([0.6, 0.8, 0.9])


def test_familiarity_is_the_share_of_held_out_images_that_are_as_far():
    known = torch.eye(4)[:2]
    angles = torch.tensor([10.0, 20, 30, 40]).deg2rad()
    held_out = torch.stack([angles.cos(), 0 * angles, angles.sin(), 0 * angles], 1)
    calibration = Calibration.fit(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), 7 * held_out, 5 * known)
    asked = torch.tensor([5.0, 25, 80]).deg2rad()
    asked = torch.stack([0 * asked, asked.cos(), 0 * asked, asked.sin()], 1)
    assert calibration.familiarity(3 * asked).tolist() == [1.0, 0.5, 0.0]
    assert Calibration().familiarity(asked) is None


def test_a_calibration_is_kept_and_a_damaged_one_refused(tmp_path):
    kept = Calibration(1.5, F.normalize(torch.randn(5, 8), dim=1).half(), torch.rand(3).sort().values)
    kept.save(tmp_path / CALIBRATION)
    read = Calibration.load(tmp_path / CALIBRATION, 8)
    assert read.temperature == 1.5 and torch.equal(read.known, kept.known) and torch.equal(read.held_out, kept.held_out)
    assert Calibration.load(tmp_path / "none", 8) == Calibration()
    for width, changes in (
        (9, {}),
        (8, {"temperature": float("nan")}),
        (8, {"temperature": -1.0}),
        (8, {"held_out": torch.empty(0)}),
        (8, {"known": torch.full((2, 8), torch.inf)}),
    ):
        broken = Calibration(**{**vars(kept), **changes})
        try:
            broken.save(tmp_path / "broken")
        except ValueError:  # JSON has no NaN
            continue
        with pytest.raises(UserError):
            Calibration.load(tmp_path / "broken", width)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


def test_classify_gives_the_calibrated_probabilities_of_the_report(script, trained, pictures, tmp_path):
    """The same images by both: coverage and calibration error are those of classify.py's probabilities."""
    metrics = json.loads((trained / "metrics.json").read_text())
    held_out = [row for row in rows_of(trained) if row["split"] == "val"]
    files = list(dict.fromkeys(row["image"] for row in held_out))
    label = {row["image"]: row["label"] for row in held_out}
    status, out, err = script(classify, "--run", trained, "--json", *files)
    assert status == 0, err
    results = json.loads(out)
    classes = list(results[0]["classes"])
    p = torch.tensor([list(r["classes"].values()) for r in results], dtype=torch.float64)
    labels = torch.tensor([classes.index(label[r["image"]]) for r in results])
    torch.testing.assert_close(p.sum(1), torch.ones(len(p), dtype=torch.float64), rtol=0, atol=1e-5)
    assert metrics["temperature"] != 1
    assert calibration_error(reliability(p, labels)) == pytest.approx(metrics["ece"], abs=1e-4)
    for ours, theirs in zip(coverage(p, labels), metrics["coverage"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert all(0 <= r["familiarity"] <= 1 for r in results)

    _, out, _ = script(classify, "--run", trained, *files, "--unsure", "0.9", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    sure = [r["probability"] >= 0.9 for r in results]
    assert [row["class"] != "unsure" for row in rows] == sure
    assert [row["probability"] for row in rows] == [str(r["probability"]) for r in results]
    assert "not a number from 0 to 1" in mistake(script(classify, "--run", trained, *files, "--unsure", "2"))


def test_strange_images_are_named(script, trained, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    (known,) = [row["image"] for row in rows_of(trained) if row["split"] == "train"][:1]
    status, out, err = script(classify, "--run", trained, tmp_path / "noise.png", known)
    assert status == 0, err
    strange, familiar = out.splitlines()[1:]
    assert "noise.png" in strange and strange.endswith("unlike the training images")
    assert "unlike" not in familiar


def test_a_run_without_a_calibration_works_and_a_prolonged_one_gets_a_new_one(script, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / CALIBRATION).read_bytes()
    (tmp_path / "run" / CALIBRATION).unlink()
    status, out, _ = script(evaluate, "--run", "run", "--json")
    found, kept = json.loads(out), json.loads((trained / "metrics.json").read_text())
    assert status == 0 and found["accuracy"] == kept["accuracy"] and "ece" not in found and "ece" in kept
    status, _, err = script(evaluate, "--run", "run", "--report", "out.html")
    assert status == 0 and "How far its probabilities" not in (tmp_path / "out.html").read_text(encoding="utf-8"), err
    status, out, _ = script(classify, "--run", "run", "--json")
    assert status == 0 and {r["familiarity"] for r in json.loads(out)} == {None}
    steps = str(kept["step"] + 200)
    status, _, err = script(train, "--resume", "--run", "run", "--steps", steps, "--device", "cpu")
    assert status == 0, err
    assert (tmp_path / "run" / CALIBRATION).read_bytes() != before
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
