"""What a user's mistake looks like: one line that says what to do."""

import torch
from conftest import mistake
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import classify
import retrieve
import train
from tokenizer import save_merges


def test_mistakes_with_data_are_one_line(script, pictures, base, tmp_path):
    def training(data, *extra):
        return mistake(script(train, "--data", data, "--weights", base, "--steps", 1, *extra))

    assert "no" in training(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images" in training(tmp_path / "empty")
    (tmp_path / "one/only").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"one/only/{i}.png")
    assert "one class" in training(tmp_path / "one")
    (tmp_path / "one/single").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one/single/0.png")
    assert "'single' has only one image" in training(tmp_path / "one")
    (tmp_path / "one/single/1.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    assert "1.png" in training(tmp_path / "one")
    (tmp_path / "prompts.json").write_text('{"hlaf-left": ["a half"]}')
    assert "hlaf-left" in training(pictures / "images", "--prompts", tmp_path / "prompts.json")
    rows = [f"{pictures}/images/half-left/{i}.png,{label},{split}" for i, label, split in
            ((0, "a", "train"), (1, "b", "train"), (2, "c", "val"))]  # fmt: skip
    (tmp_path / "m.csv").write_text("\n".join(["image,label,split", *rows]))
    assert "labels that train lacks: c" in training(tmp_path / "m.csv")


def test_mistakes_with_weights_are_one_line(script, pictures, base, tmp_path):
    def training(weights, *extra):
        return mistake(script(train, "--data", pictures / "images", "--weights", weights, "--steps", 1, *extra))

    if not (checkpoint.WEIGHTS / "clip-vit-b-16").exists():
        assert "python weights/download.py" in training("clip-vit-b-16")
    assert "python weights/download.py" in training(tmp_path / "nowhere")
    tensors = load_file(base / "model.safetensors")
    tensors["text_projection.weight"] = torch.zeros(64, 63)
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    save_file(tensors, wrong / "model.safetensors")
    assert "text_projection.weight is (64, 63) instead of (64, 64)" in training(wrong)
    save_file(load_file(base / "model.safetensors"), wrong / "model.safetensors")
    assert "merges.txt" in training(wrong)
    save_merges([("a", "b")], wrong / "merges.txt")
    assert "tokens" in training(wrong)
    assert "nothing to fuse" in training(base, "--levels", "4")
    assert "no block 9" in training(base, "--levels", "3,9")
    assert "blocks are 1 to 4" in training(base, "--lora-blocks", "12")


def test_other_mistakes_are_one_line(script, trained, base, pictures, tmp_path):
    taken = mistake(script(train, "--data", pictures / "images", "--run", trained, "--weights", base))
    assert "already holds a trained model" in taken
    assert "-1 is not a whole number from 0 to" in mistake(
        script(train, "--data", pictures / "images", "--workers", -1)
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in mistake(script(train, "--data", pictures / "images", "--run", tmp_path / "file"))
    assert "no folder" in mistake(script(classify, "--run", tmp_path / "nowhere", pictures / "images"))
    assert "finished" in mistake(script(train, "--resume", "--run", trained))
    assert "no unfinished run" in mistake(script(train, "--resume"))
    assert "invalid choice" in mistake(script(train, "--data", pictures, "--fusion", "sum"))
    assert "cuda:7" in mistake(script(train, "--data", pictures, "--device", "cuda:7"))
    assert "train.py" in mistake(script(classify, pictures / "images"))
    assert "nowhere" in mistake(script(classify, tmp_path / "nowhere"))
    (tmp_path / "text.png").write_text("not an image")
    status, _, err = script(classify, "--run", trained, tmp_path / "text.png")
    assert status == 1 and "text.png" in err
    assert "--text" in mistake(script(retrieve, "--run", trained))
    assert "--mix" in mistake(script(retrieve, "--run", trained, "--text", "a", "--mix", 2))
    assert ".png" in mistake(script(retrieve, "--run", trained, "--text", "a", "--sheet", "sheet.xyz"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/adapter.safetensors").write_bytes(b"\0" * 100)
    assert "damaged" in mistake(script(classify, "--run", tmp_path / "bad", pictures / "images"))
    other = tmp_path / "other"
    other.mkdir()
    tensors = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors")
    (other / "merges.txt").write_text((base / "merges.txt").read_text())
    assert "other base weights" in mistake(script(classify, "--run", trained, "--weights", other, pictures / "images"))
