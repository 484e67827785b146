"""classify.py as a user runs it."""

import csv
import io
import json

import pytest
from shapes import SHAPES

import classify


def test_classify_prints_the_same_as_table_json_and_csv(script, trained, pictures):
    folder = pictures / "images" / "half-left"
    _, out, _ = script(classify, "--run", trained, folder, "--json")
    results = json.loads(out)
    assert [r["image"] for r in results] == [str(folder / f"{i}.png") for i in range(6)]
    for r in results:
        assert r["classes"].keys() == SHAPES.keys()
        assert r["probability"] == max(r["classes"].values()) == r["classes"][r["class"]]
        assert sum(r["classes"].values()) == pytest.approx(1, abs=1e-3)
    _, out, _ = script(classify, "--run", trained, folder, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(r["image"], r["class"], float(r["half-left"])) for r in rows] == [
        (r["image"], r["class"], r["classes"]["half-left"]) for r in results
    ]
    _, out, _ = script(classify, "--run", trained, folder / "0.png")
    assert len(out.splitlines()) == 2 and results[0]["class"] in out
