"""settings.py: one check for flags and for a run's file."""

import json
from dataclasses import asdict

import pytest
from conftest import mistake
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import classify
import train
from errors import UserError
from runs import Metadata
from settings import Settings

GIVEN = {"weights": "phantom", "steps": 3, "lr": 1e-3}


def test_defaults_fit_their_own_ranges():
    assert Settings(**GIVEN).lora_projections == ("q", "k", "v", "out")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", 0, "--steps should be a whole number from 1 to 1,000,000,000, not 0"),
        ("steps", 10**400, "a whole number"),
        ("steps", 2.0, "a whole number"),
        ("steps", True, "a whole number"),
        ("lr", -1e-3, "a number from 0 to 1,000"),
        ("lr", float("inf"), "a number from 0 to 1,000"),
        ("lr", float("nan"), "a number from 0 to 1,000"),
        ("lr", "fast", "a number from 0 to 1,000, not 'fast'"),
        ("slerp", 1.1, "a number from 0 to 1"),
        ("fusion", "sum", "one of concat"),
        ("full", 1, "true or false"),
        ("levels", (3, 0), "a whole number from 1 to 1,000; or several, each once"),
        ("levels", (), "or several"),
        ("levels", (3, 3), "each once, with commas between them, not 3,3"),
        ("lora_projections", ("q", "qkv"), "one of q, k, v"),
        ("lora_projections", "q", "or several"),
        ("data", None, "a text"),
    ],
)
def test_what_is_of_another_type_or_out_of_range_is_named_by_its_flag(name, value, says):
    with pytest.raises(UserError) as error:
        Settings(**GIVEN | {name: value})
    assert str(error.value).startswith("--" + name.replace("_", "-")) and says in str(error.value)


def test_settings_survive_json():
    settings = Settings(**GIVEN, levels=(2, 4), full=True, lora_dropout=0.5)
    classes = {"classes": ["a", "b"], "prompts": {"a": ["p"], "b": ["q"]}}
    base = {"weights": "phantom", "fingerprint": "0", "config": {}}
    stored = json.loads(json.dumps({"settings": asdict(settings), **classes, "base": base}))
    assert Metadata.read(stored, "file").settings == settings


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps", 0], "--steps should be a whole number from 1"),
        (["--steps", "many"], "--steps: 'many' is not a whole number"),
        (["--warmup", 2], "--warmup should be a number from 0 to 1"),
        (["--lr", "nan"], "--lr should be"),
        (["--levels", "3,x"], "--levels: 'x' is not a whole number"),
        (["--lora-projections", "q,qkv"], "--lora-projections should be one of q, k, v, out, fc1, fc2; or several"),
        (["--seed", -1], "--seed should be"),
    ],
)
def test_odd_flags_are_one_line(script, pictures, base, flags, says):
    line = mistake(script(train, "--data", pictures / "images", "--weights", base, *flags))
    assert says in line


def test_odd_settings_in_a_runs_file_are_one_line(script, trained, pictures, tmp_path):
    file = trained / "adapter.safetensors"
    with safe_open(file, "pt") as f:
        stored = json.loads(f.metadata()["info"])
    for key, value in (("fusion", "sum"), ("slerp", "often"), ("unheard_of", 1)):
        changed = {**stored, "settings": {**stored["settings"], key: value}}
        save_file(load_file(file), tmp_path / file.name, metadata={"info": json.dumps(changed)})
        assert key in mistake(script(classify, "--run", tmp_path, pictures / "images"))
