"""weights/export.py: a run becomes a base model."""

import torch
from conftest import mistake

import build
import train
from checkpoint import load_clip
from weights import export


def test_an_exported_run_is_a_base_model(script, pictures, base, tmp_path, trained):
    arguments = ["--data", pictures / "images", "--weights", base, "--steps", 1, "--lr", 1e-2]
    for run, extra in (("lora", ["--fusion", "none"]), ("full", ["--fusion", "none", "--full"])):
        assert script(train, *arguments, *extra, "--run", tmp_path / run)[0] == 0
        status, out, err = script(export, tmp_path / run, tmp_path / f"{run}-base", "--half")
        assert status == 0 and "bytes" in out, err
        model, tokenizer, _ = build.load_run(tmp_path / run, torch.device("cpu"))
        exported, its_tokenizer = build.load_base(str(tmp_path / f"{run}-base"))
        pixels, texts = torch.randn(2, 3, 32, 32), ["a red shape", "left"]
        with torch.no_grad():
            torch.testing.assert_close(exported.encode_image(pixels), model.encode_image(pixels), rtol=0.01, atol=0.01)
            tokens, its_tokens = tokenizer(texts), its_tokenizer(texts)
            torch.testing.assert_close(
                exported.encode_text(its_tokens), model.encode_text(tokens), rtol=0.01, atol=0.01
            )
        assert not torch.equal(exported.visual.blocks[0].attn.q_proj.weight,
                               load_clip(base).visual.blocks[0].attn.q_proj.weight)  # fmt: skip
    assert "already holds weights" in mistake(script(export, trained, base))
