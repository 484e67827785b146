"""Shared fixtures: CLIP models with random weights from transformers, the independent implementation to agree with."""

import os
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run on the CPU, in Python

import transformers

from model import CLIPConfig

torch.set_num_threads(1)  # threads that wait for each other are many times slower than one where cores are shared


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _reference(config, folder):
    """transformers' CLIP of our `config`, saved in `folder`. No weight is left at 0 or 1 and attention is not nearly
    uniform, as both are in transformers' own initialization: a forgotten bias or mask must show."""
    towers = {}
    for tower, width, layers in (
        ("vision_config", config.vision_width, config.vision_layers),
        ("text_config", config.text_width, config.text_layers),
    ):
        towers[tower] = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // 64,
            "num_hidden_layers": layers,
            "projection_dim": config.embed_dim,
        }
    towers["vision_config"] |= {"image_size": config.image_size, "patch_size": config.patch_size}
    towers["text_config"] |= {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
    }
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=config.embed_dim, **towers)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return SimpleNamespace(config=config, model=model, folder=folder)


@pytest.fixture(scope="session")
def vit_b16(tmp_path_factory):
    """Full-size ViT-B/16: `config` (ours), `model` (transformers'), `folder` (its 599 MB file)."""
    folder = tmp_path_factory.mktemp("vit-b-16")
    yield _reference(CLIPConfig(), folder)
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The same for a small CLIP that shares no number with ViT-B/16."""
    config = CLIPConfig(
        embed_dim=48,
        image_size=40,
        patch_size=8,
        vision_width=128,
        vision_layers=5,
        context_length=21,
        vocab_size=300,
        text_width=192,
        text_layers=3,
    )
    return _reference(config, tmp_path_factory.mktemp("small"))
