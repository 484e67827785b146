"""Exports and adapters at full ViT-B/16 size, against transformers and PEFT; and a run that starts from another run."""

import ast
import json
import shutil
from dataclasses import asdict
from itertools import product

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import mistake, readme_code
from PIL import Image
from safetensors.torch import load_file, save_file

import ablate
import build
import classify
import train
from build import load_base, load_run, new_model, trained_parameters
from checkpoint import load_clip, read_safetensors, write_safetensors
from errors import UserError
from images import load_image, preprocess
from lora import merge_lora
from settings import Settings
from tokenizer import CLIP_MERGES, byte_symbols, save_merges
from trust import remember
from weights import export

PROMPTS = {"ear": ["the inside of an ear"], "nose": ["a nose, by an endoscope", "a photo of a nose"]}
PEFT_LAYERS = ["q_proj", "v_proj", "fc1"]


@pytest.fixture(scope="module")
def big(vit_b16, pictures, tmp_path_factory):
    """ViT-B/16 with merges as many as CLIP's, all different, that a run's settings may name → its folder."""
    symbols = list(byte_symbols().values())
    pairs = [pair for pair, _ in zip(product(symbols, symbols), range(CLIP_MERGES), strict=False)]
    save_merges(pairs, vit_b16.folder / "merges.txt")
    transformers.CLIPImageProcessor().save_pretrained(vit_b16.folder)
    return vit_b16.folder


def make_run(folder, weights, pictures, **settings):
    """A run with random adapters, fusion and head, as if it were trained → its FusedCLIP, not merged, and Tokenizer."""
    weights = str(weights)
    chosen = Settings(data=str(pictures / "images"), weights=weights, steps=1, lr=1e-3, **settings)
    folder.mkdir()
    model, tokenizer, metadata = new_model(chosen, PROMPTS, [], folder)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if "lora_B" in name or name.startswith("fusion.mix"):
                torch.nn.init.normal_(parameter, std=0.02)
            elif name.startswith(("fusion", "head")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    write_safetensors(folder / "adapter.safetensors", trained_parameters(model), asdict(metadata))
    rows = ["image,label,caption,group,split,match"]
    rows += [f"{path},x,,,{split},," .removesuffix(",") for path, split in
             zip(sorted((pictures / "images").rglob("*.png")), ["train", "val"] * 9, strict=True)]  # fmt: skip
    (folder / "split.csv").write_text("\n".join(rows) + "\n")
    remember(pictures, weights)
    return model.eval(), tokenizer


def inputs():
    tokens = torch.randint(0, 49000, (2, 77))
    tokens[:, 0], tokens[0, 9], tokens[1, 76] = 49406, 49407, 49407
    tokens[0, 10:] = 0
    return torch.randn(2, 3, 224, 224), tokens


def gap(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def test_a_run_becomes_a_peft_adapter(big, pictures, script, tmp_path):
    model, _ = make_run(tmp_path / "run", big, pictures, lora_projections=("q", "out", "fc2"), lora_alpha=5.0)
    status, out, err = script(export, tmp_path / "run", tmp_path / "adapter", "--format", "peft", "--weights", big)
    assert status == 0 and "over 9 held-out images their cosine is" in out, err
    base = transformers.CLIPModel.from_pretrained(big).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    pixels, tokens = inputs()
    assert gap(model.clip.encode_image(pixels), theirs.get_image_features(pixels).pooler_output) < 1e-5
    assert gap(model.clip.encode_text(tokens), theirs.get_text_features(tokens).pooler_output) < 1e-5
    plain = load_clip(big)
    assert gap(model.clip.encode_image(pixels), plain.encode_image(pixels)) > 0.01  # the adapters do something

    (tmp_path / "adapter/model.safetensors").symlink_to(big / "model.safetensors")  # beside its base
    for name in ("config.json", "preprocessor_config.json", "merges.txt"):
        (tmp_path / "adapter" / name).symlink_to(big / name)
    back, _ = load_base(str(tmp_path / "adapter"))
    assert gap(back.encode_image(pixels), model.clip.encode_image(pixels)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 3}, {"target_modules": r".*layers\.1\.mlp\.fc[12]"}])
def test_a_peft_adapter_is_a_base_model(big, tmp_path, options):
    base = transformers.CLIPModel.from_pretrained(big)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": PEFT_LAYERS} | options)
    theirs = peft.get_peft_model(base, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    theirs.save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "merges.txt"):
        (tmp_path / name).symlink_to(big / name)
    ours, _ = load_base(str(tmp_path))
    pixels, tokens = inputs()
    assert gap(ours.encode_image(pixels), theirs.get_image_features(pixels).pooler_output) < 1e-5
    assert gap(ours.encode_text(tokens), theirs.get_text_features(tokens).pooler_output) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_a_run_becomes_a_hugging_face_folder(big, pictures, script, tmp_path, half):
    model, tokenizer = make_run(tmp_path / "run", big, pictures, fusion="none")
    extra = ["--half"] if half else []
    status, out, err = script(export, tmp_path / "run", tmp_path / "hf", "--weights", big, *extra)
    assert status == 0 and "cosine" not in out, err
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "hf")
    files = sorted((pictures / "images").rglob("*.png"))[:3]
    texts = ["A red shape, on the left", "tai phải: 3 mm!", "a"]
    found = processor(text=texts, images=[Image.open(f) for f in files], return_tensors="pt", padding=True)
    pixels = torch.stack([preprocess(load_image(file)) for file in files])
    merge_lora(model)
    tolerance = 5e-3 if half else 1e-4
    own = model.encode_image(pixels), model.encode_text(tokenizer(texts))
    image = theirs.get_image_features(found["pixel_values"]).pooler_output
    text = theirs.get_text_features(found["input_ids"], attention_mask=found["attention_mask"]).pooler_output
    assert gap(image, own[0]) < tolerance and gap(text, own[1]) < tolerance
    (tmp_path / "hf/model.safetensors").unlink()


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["concat", "slerp"])
def test_fusion_and_head_serve_beside_the_exported_model(base, pictures, script, tmp_path, fusion):
    model, _ = make_run(tmp_path / "run", base, pictures, fusion=fusion)
    status, out, err = script(export, tmp_path / "run", tmp_path / "exported", "--weights", base)
    assert status == 0 and "nor is the fusion" in out, err
    tensors, info = read_safetensors(tmp_path / "exported/fusion_head.safetensors")
    pixels = torch.randn(2, 3, 32, 32)
    assert info["mode"] == fusion and info["classes"] == list(PROMPTS) and info["levels"] == [1, 2, 3, 4]
    clip, _ = load_base(str(tmp_path / "exported"))
    again = build.FusedCLIP(clip, 2, info["mode"], info["levels"])
    again.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(again.encode_image(pixels), model.encode_image(pixels), rtol=1e-3, atol=1e-4)
    assert torch.equal(again.head, model.head)


@torch.no_grad()
def test_the_readmes_lines_load_fusion_and_head(base, pictures, script, tmp_path, capsys):
    make_run(tmp_path / "run", base, pictures)
    script(export, tmp_path / "run", tmp_path / "exported", "--weights", base)
    shutil.copy(sorted((pictures / "images").rglob("*.png"))[3], tmp_path / "image.png")
    exec(readme_code("loader"), {})
    printed = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    status, out, err = script(classify, "--run", tmp_path / "run", "--weights", base, tmp_path / "image.png", "--json")
    assert status == 0, err
    assert printed == pytest.approx(json.loads(out)[0]["classes"], abs=1e-3)


@torch.no_grad()
def test_openais_names_come_back_bit_by_bit(big, pictures, script, tmp_path):
    model, _ = make_run(tmp_path / "run", big, pictures)
    status, _, err = script(export, tmp_path / "run", tmp_path / "openai", "--format", "openai", "--weights", big)
    assert status == 0, err
    merge_lora(model)
    clip, _ = load_base(str(tmp_path / "openai"))
    expected = {n.replace(".base.", "."): p for n, p in model.clip.state_dict().items() if ".lora_" not in n}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in clip.state_dict().items())
    assert clip.config == model.clip.config
    (tmp_path / "openai/open_clip_model.safetensors").unlink()


def test_open_clips_own_files_come_back_bit_by_bit(tmp_path):
    """A model that open_clip wrote, loaded and written again, has its names, bits and configuration."""
    from test_foreign import OPEN_CLIP

    from checkpoint import OPENAI, save_clip

    for name in ("gelu", "squash"):
        clip = load_clip(OPEN_CLIP / name)
        save_clip(clip, tmp_path / "file.safetensors", torch.float32, OPENAI)
        ours, theirs = (
            load_file(tmp_path / "file.safetensors"),
            load_file(OPEN_CLIP / name / "open_clip_model.safetensors"),
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        written, original = (
            export.to_open_clip(clip.config),
            json.loads((OPEN_CLIP / name / "open_clip_config.json").read_text()),
        )
        assert written["preprocess_cfg"] == original["preprocess_cfg"]
        assert written["model_cfg"] == {"quick_gelu": False} | original["model_cfg"]


def test_adapters_that_do_not_fit_are_refused_by_name(base, pictures, script, tmp_path):
    make_run(tmp_path / "run", base, pictures, lora_projections=("q", "v"))
    script(export, tmp_path / "run", tmp_path / "adapter", "--format", "peft", "--weights", base)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "merges.txt"):
        (tmp_path / "adapter" / name).symlink_to(base / name)
    file, about = tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter/adapter_config.json"
    tensors, config = load_file(file), json.loads(about.read_text())
    shutil.copy(file, tmp_path / "original")
    key = next(iter(tensors))

    def refusal(config=config, tensors=tensors):
        about.write_text(json.dumps(config))
        save_file(tensors, file)
        return mistake(script(train, "--data", pictures / "images", "--weights", tmp_path / "adapter", "--steps", 1))

    assert "its rank is not the r of" in refusal(config | {"r": 4})
    assert f"missing: {key}" in refusal(tensors={name: t for name, t in tensors.items() if name != key})
    assert "unexpected: base_model.model.x.lora_A.weight" in refusal(
        tensors=tensors | {"base_model.model.x.lora_A.weight": torch.ones(2)}
    )
    assert "unexpected: lora_magnitude" in refusal(tensors=tensors | {"lora_magnitude": torch.ones(2)})
    assert "trained on another base" in refusal(tensors=tensors | {key: torch.ones(8, 65)})
    for name, value in (
        ("use_dora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 3}),
        ("modules_to_save", ["x"]),
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [5]),
        ("of_tomorrow", 3),
    ):
        assert f"{name} = {value}" in refusal(config | {name: value})
    for targets in ("(", 5, None, [3]):
        assert "says target_modules" in refusal(config | {"target_modules": targets})
    assert "describes no LoRA adapter" in refusal(config | {"peft_type": "IA3"})
    assert "r = 0" in refusal(config | {"r": 0})
    other = {name: tensor + 0.1 for name, tensor in load_file(base / "model.safetensors").items()}
    (tmp_path / "adapter/model.safetensors").unlink()
    save_file(other, tmp_path / "adapter/model.safetensors")
    about.write_text(json.dumps(config))
    shutil.copy(tmp_path / "original", file)
    arguments = ["--data", pictures / "images", "--weights", tmp_path / "adapter", "--steps", 1]
    assert "trained on another base model than the one in" in mistake(script(train, *arguments))
    (tmp_path / "adapter/model.safetensors").unlink()
    assert "not its base model" in refusal()
    assert "download.py --model clip-vit-l-14" in refusal(
        config | {"base_model_name_or_path": "openai/clip-vit-large-patch14"}
    )


def test_exports_that_cannot_be_are_one_line(base, pictures, script, tmp_path, trained):
    make_run(tmp_path / "pad", base, pictures, frame="pad")
    make_run(tmp_path / "field", base, pictures, frame="field")
    make_run(tmp_path / "full", base, pictures, full=True)
    make_run(tmp_path / "second", trained, pictures)

    def refusal(run, form, *extra):
        return mistake(script(export, tmp_path / run, tmp_path / "out", "--format", form, "--weights", base, *extra))

    assert "--frame pad" in refusal("pad", "hf") and "--frame field" in refusal("field", "openai")
    assert "has no adapters" in refusal("full", "peft") and not (tmp_path / "out").exists()
    assert "has no adapters" in refusal("full", "peft") and "--half has no effect" in refusal("pad", "peft", "--half")
    arguments = tmp_path / "second", tmp_path / "out", "--format", "peft", "--weights", trained
    assert "use --format hf" in mistake(script(export, *arguments))
    assert not list(tmp_path.glob("out/*model.safetensors"))
    assert script(export, tmp_path / "pad", tmp_path / "out", "--format", "openai", "--weights", base)[0] == 0
    assert "already holds weights" in refusal("pad", "openai")
    assert "already holds weights" in mistake(script(export, tmp_path / "pad", tmp_path / "pad", "--weights", base))
    assert "it is empty" in mistake(script(export, tmp_path / "pad", tmp_path / "x", "--weights", ""))


def test_a_run_starts_from_another_with_other_classes(trained, base, pictures, tmp_path, script):
    old, _, before = load_run(trained, torch.device("cpu"))
    arguments = ["--data", pictures / "images", "--weights", trained, "--steps", 1, "--lr", 0, "--device", "cpu"]
    prompts = {name: [f"a {name}"] for name in before.classes} | {"another": ["something else", "another"]}
    settings = Settings(data="x", weights=str(trained), steps=1, lr=0.0)
    (tmp_path / "new").mkdir()
    model, tokenizer, metadata = new_model(settings, prompts, [], tmp_path / "new")
    model.eval()
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(pixels), old.encode_image(pixels))  # fusion included
    assert torch.equal(model.head[:3], old.head) and metadata.classes[:3] == before.classes
    expected = F.normalize(model.encode_text(tokenizer(prompts["another"], 77)), dim=1).mean(0)
    torch.testing.assert_close(model.head[3], expected)

    status, out, err = script(train, *arguments, "--run", tmp_path / "second")  # and a third from the second
    assert status == 0, err
    second, _, _ = load_run(tmp_path / "second", torch.device("cpu"))
    torch.testing.assert_close(second.encode_image(pixels), old.encode_image(pixels))
    third = ["--data", pictures / "images", "--weights", tmp_path / "second", "--steps", 1, "--fusion", "none"]
    status, out, err = script(train, *third, "--run", tmp_path / "third")
    assert status == 0 and "which is left behind" in out, err
    load_run(tmp_path / "third", torch.device("cpu"))
    second = tmp_path / "second/adapter.safetensors"
    tensors, info = read_safetensors(second)
    louder = {**info, "settings": {**info["settings"], "lora_alpha": 99.0}}
    for changed in ((tensors | {"head": tensors["head"] + 1}, info), (tensors, louder)):
        write_safetensors(second, *changed)
        with pytest.raises(UserError, match="other base weights"):
            load_run(tmp_path / "third", torch.device("cpu"))
    write_safetensors(second, tensors, info)
    note = "of those that the run named by --weights was trained on"
    fresh = ["--data", pictures / "images", "--steps", 1, "--weights"]
    assert note not in script(train, *fresh, base, "--run", tmp_path / "first")[1]
    assert note not in script(train, *fresh, tmp_path / "first", "--run", tmp_path / "next")[1]  # the same split
    other = ["--data", pictures / "images", "--weights", tmp_path / "second", "--steps", 1, "--seed", 5]
    assert note in script(train, *other)[1]
    (tmp_path / "second/metrics.json").unlink()
    assert "is not finished" in mistake(script(train, *third))
    assert "is a run" in mistake(script(ablate, *other[:-2], "--seeds", 0))
