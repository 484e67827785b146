"""What loading a run reads, and what it leaves alone until it is needed."""

import shutil

import pytest
import torch
from conftest import mistake

import build
import checkpoint
import encoding
import evaluate
import lora
import retrieve
from checkpoint import load_clip, save_clip

CPU = torch.device("cpu")


@pytest.fixture
def run(trained, base, tmp_path):
    """A copy of a run and of its base model, to be changed."""
    shutil.copytree(base, tmp_path / "base")
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("base.json", "index*"))


def count_checks(monkeypatch):
    files, check = [], checkpoint.refuse_odd
    monkeypatch.setattr(checkpoint, "refuse_odd", lambda tensors, file: files.append(file.name) or check(tensors, file))
    return files


def test_base_weights_are_read_whole_once_and_again_when_they_have_changed(script, run, tmp_path, monkeypatch):
    checked = count_checks(monkeypatch)
    for expected in (["adapter.safetensors", "model.safetensors"], ["adapter.safetensors"]):
        checked.clear()
        build.load_run(run, CPU, tmp_path / "base")
        assert checked == expected
    clip = load_clip(tmp_path / "base")
    with torch.no_grad():
        clip.text.proj.weight[0, 0] += 1
    save_clip(clip, tmp_path / "base/model.safetensors")
    assert "other base weights" in mistake(script(retrieve, "--run", run, "--weights", "base", "--text", "red"))
    (run / "base.json").write_text('{"stamp": 1}')  # damaged: as if there were none
    assert "other base weights" in mistake(script(evaluate, "--run", run, "--weights", "base"))


def test_a_folder_that_may_not_be_written_to_is_no_error(run, tmp_path):
    (run / "base.json").mkdir()
    for _ in range(2):
        assert build.load_run(run, CPU, tmp_path / "base")[2].classes


def test_a_search_by_text_leaves_the_image_tower_alone(script, trained, monkeypatch):
    assert script(retrieve, "--run", trained, "--text", "red")[0] == 0  # indexed
    merged, merge = [], build.merge_lora
    monkeypatch.setattr(build, "merge_lora", lambda tower: merged.append(type(tower).__name__) or merge(tower))
    assert script(retrieve, "--run", trained, "--text", "red")[0] == 0
    assert merged == ["TextTransformer"]


def test_a_tower_is_prepared_once_and_computes_the_same(trained, base):
    model, tokenizer, _ = build.load_run(trained, CPU, base)
    for layer in lora.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    tokens = tokenizer(["red", "a green shape"])
    before = model.encode_text(tokens)
    after = encoding.encode_texts(model, tokenizer, ["red", "a green shape"], CPU)
    torch.testing.assert_close(after, before)
    assert all(layer.merged for layer in lora.lora_layers(model.clip.text))
    assert not any(layer.merged for layer in lora.lora_layers(model.clip.visual))
    assert torch.equal(encoding.encode_texts(model, tokenizer, ["red", "a green shape"], CPU), after)
