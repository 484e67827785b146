"""Precision and threads: what the device can do, and what stays in float32 whatever it does."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import mistake

import build
import cli
import evaluate
import train
from build import load_base, to_device
from checkpoint import read_safetensors
from fusion import FusedCLIP
from images import OPENAI, normalize
from settings import Settings

CPU = torch.device("cpu")


@pytest.fixture
def native(monkeypatch):
    """A CPU that multiplies bfloat16; any can, if slowly."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


@pytest.mark.parametrize("can, expected", [({}, "float32"), ({"amx_bf16": True}, "bfloat16"), ({"avx2": 1}, "float32")])
def test_auto_is_what_the_processor_has_instructions_for(can, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert cli.name_of(cli.find_precision("auto", CPU)) == expected
    assert cli.find_precision("float32", CPU) == torch.float32
    assert cli.name_of(cli.find_precision("bfloat16", CPU)) == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions
    assert cli.find_precision("auto", CPU) == torch.float32


def test_in_bfloat16_the_embeddings_are_nearly_those_of_float32(native):
    """Both towers, against the same in float32. Their type stays float32, as that of whatever is trained does."""
    clip, tokenizer = load_base("phantom")
    model = FusedCLIP(clip, 2).requires_grad_(False)
    model.fusion.mix.weight.normal_(std=0.02).requires_grad_(True)
    pixels = normalize(torch.randint(0, 256, (4, 128, 128, 3), dtype=torch.uint8), OPENAI)
    tokens = tokenizer(["left ear", "a polyp"])
    settings = Settings(data="x", weights="x", steps=1, lr=1.0)
    exact = model.encode_image(pixels), model.encode_text(tokens)
    to_device(model, settings, CPU)
    assert clip.visual.blocks[0].mlp.fc1.weight.dtype == clip.text.proj.weight.dtype == torch.bfloat16
    assert model.fusion.mix.weight.dtype == clip.visual.ln_post.weight.dtype == torch.float32
    rounded = model.encode_image(pixels), model.encode_text(tokens)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        assert 0.999 < F.cosine_similarity(ours, theirs).min() < 1 - 1e-7


def test_frozen_matrices_kept_in_bfloat16_give_autocasts_bits(native):
    """PyTorch's autocast rounds the same matrices at every step."""
    pixels = torch.randn(2, 3, 128, 128)
    one, other = (FusedCLIP(load_base("phantom")[0], 2, "none").requires_grad_(False) for _ in range(2))
    to_device(one, Settings(data="x", weights="x", steps=1, lr=1.0), CPU)
    other.precision = torch.bfloat16
    assert torch.equal(one.encode_image(pixels), other.encode_image(pixels))


def test_a_run_keeps_its_precision(script, pictures, base, native, tmp_path, monkeypatch):
    flags = "--data", pictures / "images", "--weights", base, "--steps", 5, "--batch-size", 8, "--lr", "1e-3"
    status, out, _ = script(train, *flags, "--run", "a", "--device", "cpu")
    assert status == 0 and f"{base} on cpu, 1 thread, bfloat16: training" in out
    tensors, info = read_safetensors(tmp_path / "a/adapter.safetensors")
    assert info["settings"]["precision"] == "bfloat16" and {t.dtype for t in tensors.values()} == {torch.float32}
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    _, out, _ = script(evaluate, "--run", "a", "--json", "--device", "cpu")
    assert all(metrics[key] == value for key, value in json.loads(out).items())
    assert build.load_run(tmp_path / "a", CPU)[0].precision == torch.bfloat16
    assert build.read_run(tmp_path / "a")[0].precision == torch.float32  # for export and further training
    assert script(train, *flags, "--run", "b", "--precision", "float32", "--device", "cpu")[0] == 0
    assert build.load_run(tmp_path / "b", CPU)[0].precision == torch.float32
    assert "begun with --precision bfloat16" in mistake(
        script(train, "--resume", "--run", "a", "--steps", 10, "--precision", "float32")
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # on another machine
    assert build.load_run(tmp_path / "a", CPU)[0].precision == torch.float32
    refused = mistake(script(train, *flags, "--run", "c", "--precision", "bfloat16", "--device", "cpu"))
    assert "cpu computes in float32 here" in refused
    status, out, _ = script(train, "--resume", "--run", "a", "--steps", 10, "--device", "cpu")
    assert status == 0 and "on cpu, 1 thread, float32: training" in out


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle, wanted, expected", [(8, None, 4), (2.6, None, 3), (0, None, 1), (0, 7, 7)])
def test_threads_leave_busy_cores_alone(idle, wanted, expected, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_idle_cores", lambda seconds: idle)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        cli.set_threads(wanted)
        assert torch.get_num_threads() == expected
        assert (f"so {expected} thread" in capsys.readouterr().out) == (expected < 4)
    finally:
        torch.set_num_threads(before)


def test_idle_cores_are_those_that_nobody_uses():
    assert 0 <= cli._idle_cores(0.05) <= torch.multiprocessing.cpu_count() + 0.5 or cli._idle_cores(0.05) == torch.inf


def test_a_resumed_training_computes_with_as_many_threads_as_before(script, trained, monkeypatch, tmp_path):
    chosen, trained = [], shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(train, "set_threads", chosen.append)
    assert script(train, "--resume", "--run", trained, "--steps", 4, "--lr", "3e-3")[0] == 0
    assert script(train, "--resume", "--run", trained, "--steps", 5, "--threads", 2)[0] == 0
    assert chosen == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch compiles for a CPU with g++")
def test_a_compiled_training_is_nearly_the_plain_one(script, pictures, base, tmp_path):
    flags = "--data", pictures / "images", "--weights", base, "--steps", 3, "--batch-size", 7, "--device", "cpu"
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        status, _, err = script(train, *flags, "--lr", "1e-4", "--run", name, *more)
        assert status == 0, err
    plain, compiled = (read_safetensors(tmp_path / name / "last.safetensors")[0] for name in ("plain", "compiled"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    moved = [name for name in plain if "lora_B" in name and plain[name].abs().max() > 1e-5]
    assert len(moved) > 4 and plain.keys() == compiled.keys()
    for name in moved:
        torch.testing.assert_close(compiled[name], plain[name], rtol=0, atol=2e-5, msg=name)


def test_without_a_compiler_the_flag_is_refused(script, pictures, base, monkeypatch):
    def fail(function):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", fail)
    flags = "--data", pictures / "images", "--weights", base, "--steps", 3, "--device", "cpu"
    assert "cannot compile for cpu (no C++ compiler was found); leave out --compile" in mistake(
        script(train, *flags, "--compile", "--run", "run")
    )
