"""Checkpoints of others: clip_config.py against transformers' models and image processors, and against what open_clip
computed (open_clip/make.py). What our model can't represent is refused by name."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from test_checkpoint import as_openai, loading_error
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from checkpoint import load_clip
from images import preprocess

OPEN_CLIP = Path(__file__).parent / "open_clip"
TEXT = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "projection_dim": 32,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 298, "eos_token_id": 299}  # fmt: skip
VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 2,
          "num_attention_heads": 5, "projection_dim": 32}  # fmt: skip


def save_theirs(folder, text=None, vision=None, **processor):
    """transformers' CLIPModel and image processor, random and saved in the folder → both."""
    config = transformers.CLIPConfig(
        text_config=TEXT | (text or {}), vision_config=VISION | (vision or {}), projection_dim=32
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() < 2 else parameter.mul_(4)
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPImageProcessorPil(**sizes | processor)
    processor.save_pretrained(folder)
    return model, processor


def pictures():
    numbers = torch.randint(0, 256, (3, 90, 60, 3), dtype=torch.uint8).numpy()
    return [
        Image.fromarray(numbers[0]),
        Image.fromarray(numbers[1]).rotate(90, expand=True),
        Image.fromarray(numbers[2]),
    ]


def tokens():
    ids = torch.zeros(3, 16, dtype=torch.long)
    for row, length in zip(ids, (2, 9, 16), strict=True):
        row[1 : length - 1] = torch.randint(0, 298, (length - 2,))
        row[0], row[length - 1] = 298, 299
    return ids


def assert_near(ours, theirs):
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("heads", [5, 4])  # of 64 and of 80
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-2])
def test_features_are_those_of_transformers(tmp_path, activation, heads, eps):
    same = {"hidden_act": activation, "layer_norm_eps": eps}
    theirs, _ = save_theirs(tmp_path, same, same | {"num_attention_heads": heads})
    ours, pixels, ids = load_clip(tmp_path), torch.randn(2, 3, 32, 32), tokens()
    assert_near(ours.encode_image(pixels), theirs.get_image_features(pixels).pooler_output)
    assert_near(ours.encode_text(ids), theirs.get_text_features(ids).pooler_output)
    assert (ours.config.vision_head_width, ours.config.activation) == (320 // heads, activation)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"resample": 2},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    ],
    ids=["as OpenAI's", "mean", "bilinear", "squash"],
)
def test_pixels_are_those_of_transformers(tmp_path, options):
    _, processor = save_theirs(tmp_path, **options)
    config = load_clip(tmp_path).config
    for image in pictures():
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        assert_near(preprocess(image, 32, config.preprocessing), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gelu", "squash"])
def test_features_are_those_of_open_clip(name):
    expected, ours = load_file(OPEN_CLIP / name / "expected.safetensors"), load_clip(OPEN_CLIP / name)
    assert_near(ours.encode_image(expected["pixels"]), expected["image"])
    assert_near(ours.encode_text(expected["tokens"]), expected["text"])


@pytest.mark.parametrize("name", ["gelu", "squash", "pad"])
def test_pixels_are_those_of_open_clip(name, tmp_path):
    for file in (OPEN_CLIP / name).iterdir():
        shutil.copy(file, tmp_path)
    if name == "pad":  # its weights are not kept
        shutil.copy(OPEN_CLIP / "gelu/open_clip_model.safetensors", tmp_path)
    expected, config = load_file(tmp_path / "expected.safetensors"), load_clip(tmp_path).config
    for i, pixels in enumerate(expected["pixels"]):
        ours = preprocess(Image.fromarray(expected[f"image{i}"].numpy()), 32, config.preprocessing)
        if (name, i) == ("squash", 2):  # two versions of Pillow differ here, by one level of 255
            assert (ours - pixels).abs().max() < 1.1 / 255 / min(config.preprocessing.std)
        else:
            assert_near(ours, pixels)


def change(file, path, value):
    """Set one value of a JSON file; path: its keys, with dots."""
    content = part = json.loads(file.read_text())
    *parents, last = path.split(".")
    for name in parents:
        part = part[name]
    part[last] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "file, path, value, says",
    [
        ("config.json", "vision_config.hidden_act", "gelu_new", "vision_config.hidden_act = gelu_new, which our model"),
        ("config.json", "text_config.hidden_act", "gelu", "vision_config.hidden_act = quick_gelu, but text_config"),
        ("config.json", "text_config.layer_norm_eps", 1e-6, "vision_config.layer_norm_eps = 1e-05, but text_config"),
        ("config.json", "vision_config.num_attention_heads", 7, "num_attention_heads = 7, which does not divide"),
        ("config.json", "vision_config.num_attention_heads", "five", "num_attention_heads = five, which is no number"),
        ("config.json", "vision_config.image_size", 224, "vision_config.image_size = 224, but the weights have 32"),
        ("config.json", "text_config.intermediate_size", 100, "intermediate_size = 100, but the weights have 512"),
        ("config.json", "text_config.eos_token_id", 7, "text_config.eos_token_id = 7, which our model"),
        ("config.json", "model_type", "siglip", "its model_type is 'siglip'"),
        ("config.json", "vision_config", [], "no JSON object in vision_config"),
        ("preprocessor_config.json", "size", {"shortest_edge": 40}, "size = {'shortest_edge': 40}, which our model"),
        ("preprocessor_config.json", "crop_size", 30, "crop_size = 30, which our model"),
        ("preprocessor_config.json", "resample", 1, "resample = 1, which our model"),
        ("preprocessor_config.json", "do_normalize", False, "do_normalize = False, which our model"),
        ("preprocessor_config.json", "image_std", [0.2, 0.2], "image_std = [0.2, 0.2], which are no three numbers"),
        ("preprocessor_config.json", "image_processor_type", "ViTImageProcessor", "= ViTImageProcessor, which our"),
    ],
)
def test_what_transformers_can_and_we_cannot_is_refused_by_name(tmp_path, file, path, value, says):
    save_theirs(tmp_path)
    change(tmp_path / file, path, value)
    message = loading_error(tmp_path)
    assert str(tmp_path / file) in message and says in message


@torch.no_grad()
@pytest.mark.parametrize(
    "text, vision, changes",
    [
        (
            {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 8},
            {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 12},
            ["text_config.num_attention_heads", "vision_config.num_attention_heads"],
        ),
        ({}, {}, ["text_config.hidden_act", "vision_config.layer_norm_eps"]),
    ],
)
def test_what_a_configuration_leaves_out_has_transformers_defaults(tmp_path, text, vision, changes):
    save_theirs(tmp_path, text, vision)
    for path in changes:
        part, name = path.split(".")
        content = json.loads((tmp_path / "config.json").read_text())
        content[part].pop(name, None)
        (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    ours, pixels, ids = load_clip(tmp_path), torch.randn(2, 3, 32, 32), tokens()
    assert_near(ours.encode_image(pixels), theirs.get_image_features(pixels).pooler_output)
    assert_near(ours.encode_text(ids), theirs.get_text_features(ids).pooler_output)


def test_old_files_say_it_twice_and_the_second_counts(tmp_path):
    save_theirs(tmp_path, {"hidden_act": "gelu"}, {"hidden_act": "gelu"})
    content = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        content[f"{part}_dict"] = {k: v for k, v in content[part].items() if k != "hidden_act"}  # then the default
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_clip(tmp_path).config.activation == "quick_gelu"


def test_transformers_newer_processor_files_are_read(tmp_path):
    _, processor = save_theirs(tmp_path, image_mean=[0.1, 0.2, 0.3])
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor.to_dict()}))
    assert load_clip(tmp_path).config.preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    "path, value, says",
    [
        ("model_cfg.vision_cfg.timm_model_name", "vit_tiny", "timm_model_name = vit_tiny, which our model"),
        ("model_cfg.vision_cfg.ls_init_value", 1e-4, "ls_init_value = 0.0001, which our model"),
        ("model_cfg.vision_cfg.pool_type", "avg", "vision_cfg.pool_type = avg, which our model"),
        ("model_cfg.vision_cfg.mlp_ratio", 4.9, "mlp_ratio = 4.9, which our model"),
        ("model_cfg.vision_cfg.head_width", 30, "head_width = 30, which does not divide"),
        ("model_cfg.vision_cfg.what_comes_next", True, "what_comes_next = True, which our model"),
        ("model_cfg.text_cfg.no_causal_mask", True, "no_causal_mask = True, which our model"),
        ("model_cfg.text_cfg.pool_type", "last", "text_cfg.pool_type = last, which our model"),
        ("model_cfg.text_cfg.hf_model_name", "bert", "hf_model_name = bert, which our model"),
        ("model_cfg.text_cfg.norm_kwargs", {"eps": 1e-6}, "vision_cfg.norm_kwargs"),
        ("model_cfg.custom_text", True, "custom_text = True, which our model"),
        ("model_cfg.vision_cfg.width", 48, "vision_cfg.width = 48, but the weights have 40"),
        ("preprocess_cfg.interpolation", "random", "interpolation = random, which our model"),
        ("preprocess_cfg.resize_mode", "stretch", "resize_mode = stretch, which our model"),
        ("preprocess_cfg.fill_color", 128, "fill_color = 128, which our model"),
    ],
)
def test_what_open_clip_can_and_we_cannot_is_refused_by_name(tmp_path, path, value, says):
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        shutil.copy(OPEN_CLIP / "squash" / name, tmp_path)
    load_clip(tmp_path)
    change(tmp_path / "open_clip_config.json", path, value)
    assert says in loading_error(tmp_path)


def test_switches_that_are_off_change_nothing(tmp_path):
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        shutil.copy(OPEN_CLIP / "squash" / name, tmp_path)
    for name, value in (
        ("patch_dropout", 0.5),
        ("attentional_pool", False),
        ("pool_type", "tok"),
        ("timm_pool", "avg"),
    ):
        change(tmp_path / "open_clip_config.json", f"model_cfg.vision_cfg.{name}", value)
    change(tmp_path / "open_clip_config.json", "model_cfg.nonscalar_logit_scale", False)
    assert load_clip(tmp_path).config == load_clip(OPEN_CLIP / "squash").config
    for content in ({}, {"embed_dim": 24, "quick_gelu": True}):  # open_clip's own model files
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        assert "has no model_cfg" in loading_error(tmp_path)
    heads = {"model_cfg": {"vision_cfg": {"head_width": 20}, "text_cfg": {"heads": 7}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(heads))
    assert "text_cfg.heads = 7, which does not divide" in loading_error(tmp_path)
    del heads["model_cfg"]["vision_cfg"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(heads | {"model_cfg": {"text_cfg": {"heads": 4}}}))
    assert "leaves out model_cfg.vision_cfg.head_width, which does not divide" in loading_error(tmp_path)


def test_wide_models_need_their_configuration(tmp_path, capsys):
    wide = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 1}
    save_theirs(tmp_path, vision=wide)
    assert load_clip(tmp_path).config.vision_head_width == 80
    (tmp_path / "config.json").unlink()
    assert "the widths 1280 and 128 don't tell how many heads" in loading_error(tmp_path)


def test_without_configuration_openais_is_assumed_aloud(tmp_path, capsys):
    save_theirs(tmp_path)
    capsys.readouterr()
    load_clip(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "preprocessor_config.json").unlink()
    load_clip(tmp_path)
    assert f"note: there is no {tmp_path / 'preprocessor_config.json'}" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    for _ in range(2):
        load_clip(tmp_path)
    assert capsys.readouterr().err.count("QuickGELU, heads 64 wide") == 1


def test_the_files_that_belong_to_the_names_count(tmp_path):
    """A folder may hold both libraries' files."""
    save_theirs(tmp_path, {"hidden_act": "gelu"}, {"hidden_act": "gelu"}, image_mean=[0.1, 0.2, 0.3])
    theirs = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": {"head_width": 64}, "text_cfg": {"heads": 2}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": theirs, "preprocess_cfg": {}}))
    config = load_clip(tmp_path).config
    assert config.activation == "gelu" and config.preprocessing.mean == (0.1, 0.2, 0.3)
    save_file(as_openai(load_file(tmp_path / "model.safetensors")), tmp_path / "open_clip_model.safetensors")
    config = load_clip(tmp_path / "open_clip_model.safetensors").config
    assert config.activation == "quick_gelu" and config.preprocessing.mean[0] > 0.4


class Scripted(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, x):
        return x


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ViT-B-32.pt", "open_clip_pytorch_model.bin"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    model, _ = save_theirs(tmp_path / "whole")
    folder = tmp_path / "it's here"
    folder.mkdir()
    if name.endswith(".pt"):  # as OpenAI's: a program
        torch.jit.script(Scripted({"a.b": torch.ones(2)})).save(folder / name)
    else:
        torch.save(model.state_dict(), folder / name)
    message = loading_error(folder)
    assert message == loading_error(folder / name) and "may run code" in message
    command = shlex.split(message.split("convert it: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    if name.endswith(".pt"):
        assert load_file(folder / "model.safetensors").keys() == {"a_b"}
    else:
        expected, ours = load_clip(tmp_path / "whole").state_dict(), load_clip(folder).state_dict()
        assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())
