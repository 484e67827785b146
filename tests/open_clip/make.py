"""Small models of open_clip_torch with random weights, their configuration files, and what open_clip computes with
them: what test_foreign.py compares ours with. open_clip needs torchvision, which the tests do without; so its results
are kept here. They were made by

    python tests/open_clip/make.py tests/open_clip        # open_clip_torch 3.3.0
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from PIL import Image
from safetensors.torch import save_file

TEXT = {"context_length": 12, "vocab_size": 300, "width": 32, "heads": 4, "layers": 2}
VISION = {"image_size": 32, "layers": 3, "width": 40, "head_width": 20, "patch_size": 8}
NORM = {"norm_kwargs": {"eps": 1e-3}}
MODELS = {  # name: (model's configuration, options)
    "gelu": (
        {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
        {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4)},
    ),
    "squash": (
        {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION | NORM, "text_cfg": TEXT | NORM},
        {"image_resize_mode": "squash", "image_interpolation": "bilinear"},
    ),
    "pad": (
        {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION | {"head_width": 8}, "text_cfg": TEXT},
        {"image_resize_mode": "longest"},
    ),
}


def main():
    for number, (name, (config, options)) in enumerate(MODELS.items()):
        folder = Path(sys.argv[1], name)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as configs:
            Path(configs, f"small-{name}.json").write_text(json.dumps(config))
            open_clip.add_model_config(configs)
            torch.manual_seed(number)
            model, _, preprocess = open_clip.create_model_and_transforms(f"small-{name}", **options)
        model.eval()
        with torch.no_grad():  # no bias at 0, no gain at 1, attention that is not nearly uniform
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() < 2 else parameter.mul_(2)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
        save_config_for_hf(model, folder / "open_clip_config.json", model_config=config)
        rng = np.random.default_rng(number)
        # Margins of the crop are even: at odd ones torchvision and transformers, whose rule ours is, differ by a pixel.
        images = [
            rng.integers(0, 256, (height, width, 3), np.uint8) for width, height in ((60, 40), (32, 32), (40, 60))
        ]
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
        tokens = torch.zeros(3, 12, dtype=torch.long)
        for row, length in zip(tokens, (2, 7, 12), strict=True):
            row[:length] = torch.from_numpy(rng.integers(0, 298, length))
            row[0], row[length - 1] = 298, 299
        with torch.no_grad():
            expected = {"image": model.encode_image(pixels), "text": model.encode_text(tokens)}
        expected |= {"pixels": pixels, "tokens": tokens}
        expected |= {f"image{i}": torch.from_numpy(image) for i, image in enumerate(images)}
        save_file(expected, folder / "expected.safetensors", {"open_clip_torch": open_clip.__version__})
        print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
