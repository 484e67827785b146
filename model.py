"""CLIP by hand: a Vision Transformer and a text transformer that share one embedding space.

    image (3, 224, 224) ─ patches ─ [CLS] + 196 tokens ─ 12 blocks ─ CLS token ─ LayerNorm ─ projection ─┐
                                                                                                  (512) cosine
    text, ≤ 77 BPE tokens ───────── embeddings ───────── 12 blocks ─ end token ─ LayerNorm ─ projection ─┘

Both towers are stacks of the same pre-norm block; the text tower adds a causal mask. The numbers above are ViT-B/16's;
`load_clip` reads them off the shapes of any OpenAI-style CLIP ViT checkpoint, in OpenAI's or Hugging Face's names.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020); the
behaviour matched is that of github.com/openai/CLIP.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from errors import UserError

HEAD_WIDTH = 64  # every CLIP ViT has width / 64 heads; no checkpoint stores the number, OpenAI's loader infers it too


@dataclass(frozen=True)
class CLIPConfig:
    """The architecture; the defaults are CLIP ViT-B/16 (149,620,737 parameters)."""

    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12


class Attention(nn.Module):
    """Multi-head self-attention. q, k and v have a projection each (OpenAI stores them as one matrix), so that LoRA
    can adapt each by itself."""

    def __init__(self, width, causal):
        super().__init__()
        self.causal = causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        B, L, C = x.shape
        q, k, v = (
            proj(x).view(B, L, C // HEAD_WIDTH, HEAD_WIDTH).transpose(1, 2)  # (B, heads, L, 64)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, L, C))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x)  # "QuickGELU": CLIP was trained with this approximation, so GELU would be off
        return self.fc2(x)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, causal):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """(B, 3, H, W) → (B, layers, width): the CLS token as every block leaves it. CLIP itself uses the last one only;
    `fusion.py` uses several."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, size, patch = config.vision_width, config.image_size, config.patch_size
        self.image_size = size
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, causal=False) for _ in range(config.vision_layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, pixels):
        if pixels.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"this model takes images (B, 3, {self.image_size}, {self.image_size}), not {tuple(pixels.shape)}"
            )
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # (B, patches, width)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + self.position_embedding.to(x.dtype)  # (B, 1 + patches, width)
        x = self.ln_pre(x)
        levels = []
        for block in self.blocks:
            x = block(x)
            levels.append(x[:, 0])
        return torch.stack(levels, dim=1)  # (B, layers, width)

    def project(self, cls):
        """The last CLS token, (B, width), → CLIP's image embedding, (B, embed_dim)."""
        return self.proj(self.ln_post(cls))


class TextTransformer(nn.Module):
    """(B, L) token ids, L ≤ context_length → (B, embed_dim)."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width = config.text_width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = nn.ModuleList(Block(width, causal=True) for _ in range(config.text_layers))
        self.ln_final = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]  # (B, L, width)
        for block in self.blocks:
            x = block(x)
        # The end-of-text token has the highest id, so argmax finds it. Under the causal mask only this token has seen
        # the whole text, and whatever padding follows cannot reach it.
        end = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]  # (B, width)
        return self.proj(self.ln_final(end))


class CLIP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.text = TextTransformer(config)
        self.logit_scale = nn.Parameter(torch.empty(()))  # the logarithm of the inverse temperature

    def encode_image(self, pixels):
        """(B, 3, H, W) CLIP-normalized pixels → (B, embed_dim), not of unit length."""
        return self.visual.project(self.visual(pixels)[:, -1])

    def encode_text(self, tokens):
        """(B, L) int64 ids from `Tokenizer` → (B, embed_dim), not of unit length."""
        return self.text(tokens)

    def initialize(self):
        """Random weights to train from scratch, as CLIP draws them for its text tower (OpenAI's code leaves the vision
        blocks to PyTorch's defaults; here both towers get the same). Returns self."""
        for tower in (self.visual, self.text):
            width, layers = tower.proj.in_features, len(tower.blocks)
            for block in tower.blocks:
                for name, linear in block.named_modules():
                    if isinstance(linear, nn.Linear):
                        std = width**-0.5
                        if name == "mlp.fc1":
                            std *= 2**-0.5
                        elif name in ("attn.out_proj", "mlp.fc2"):  # what a block adds to the residual stream
                            std *= (2 * layers) ** -0.5
                        nn.init.normal_(linear.weight, std=std)
                        nn.init.zeros_(linear.bias)
            nn.init.normal_(tower.proj.weight, std=width**-0.5)
        for embedding in (self.visual.class_embedding, self.visual.position_embedding):
            nn.init.normal_(embedding, std=self.config.vision_width**-0.5)
        nn.init.normal_(self.text.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text.position_embedding, std=0.01)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Loading. Our parameter names are translated to the file's, so that an error speaks the file's own language.

HUGGING_FACE = [
    (r"^visual\.patch_embed\b", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.position_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\b", "vision_model.pre_layrnorm"),  # their spelling
    (r"^visual\.ln_post\b", "vision_model.post_layernorm"),
    (r"^visual\.proj\b", "visual_projection"),
    (r"^text\.token_embedding\b", "text_model.embeddings.token_embedding"),
    (r"^text\.position_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^text\.ln_final\b", "text_model.final_layer_norm"),
    (r"^text\.proj\b", "text_projection"),
    (r"^visual\.blocks\b", "vision_model.encoder.layers"),
    (r"^text\.blocks\b", "text_model.encoder.layers"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
]
OPENAI = [
    (r"^visual\.patch_embed\b", "visual.conv1"),
    (r"^visual\.position_embedding", "visual.positional_embedding"),
    (r"^visual\.proj\.weight", "visual.proj"),  # stored as (width, embed_dim): transposed
    (r"^text\.proj\.weight", "text_projection"),  # likewise
    (r"^text\.position_embedding", "positional_embedding"),
    (r"^visual\.blocks\b", "visual.transformer.resblocks"),
    (r"^text\.blocks\b", "transformer.resblocks"),
    (r"^text\.", ""),
    (r"\.attn\.[qkv]_proj\.", ".attn.in_proj_"),  # one matrix of q, k and v, stacked
    (r"\.mlp\.fc1\b", ".mlp.c_fc"),
    (r"\.mlp\.fc2\b", ".mlp.c_proj"),
]
# Bookkeeping that some checkpoints carry and no model needs.
IGNORED = re.compile(r".*\.position_ids|input_resolution|context_length|vocab_size")


def translate(name, naming):
    """A parameter's name in `CLIP` → its name in `HUGGING_FACE` or `OPENAI`."""
    for pattern, replacement in naming:
        name = re.sub(pattern, replacement, name)
    return name


def load_clip(path, dtype=torch.float32):
    """Build a `CLIP` from a .safetensors file, or from a folder with a model.safetensors.

    OpenAI's and Hugging Face's tensor names are both read, in any floating type. The file is mapped into memory: where
    it already holds `dtype`, no weight is copied until training writes to it.

    Raises UserError if there is no such file, if it is not a CLIP ViT checkpoint, or with every missing, unexpected and
    mis-shaped tensor by its name in the file.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no weights at {file}; `python weights/download.py` fetches CLIP ViT-B/16, or name a file")
    try:
        tensors = {name: t for name, t in load_file(file).items() if not IGNORED.fullmatch(name)}
    except SafetensorError as problem:
        raise UserError(f"{file} is not a whole safetensors file ({problem}); download it again") from None

    naming = OPENAI if "visual.conv1.weight" in tensors else HUGGING_FACE
    config = _infer_config(tensors, naming, file)
    with torch.device("meta"):
        clip = CLIP(config)

    state, missing, misshaped, used = {}, [], [], set()
    for name, parameter in clip.state_dict().items():
        source = translate(name, naming)
        used.add(source)
        if source not in tensors:
            missing.append(source)
            continue
        tensor, expected = tensors[source], tuple(parameter.shape)
        stacked = naming is OPENAI and ".attn.in_proj_" in source
        transposed = naming is OPENAI and name.endswith(".proj.weight")
        if stacked:
            expected = (3 * expected[0], *expected[1:])
        elif transposed:
            expected = expected[::-1]
        if tensor.shape != expected:
            misshaped.append(f"{source} is {tuple(tensor.shape)} instead of {expected}")
            continue
        if stacked:
            tensor = tensor.chunk(3)["qkv".index(name.split(".attn.")[1][0])]
        elif transposed:
            tensor = tensor.T.contiguous()
        state[name] = tensor.to(dtype)
    problems = [
        f"{kind}: {', '.join(dict.fromkeys(names))}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", sorted(tensors.keys() - used)),
            ("mis-shaped", misshaped),
        )
        if names
    ]
    if problems:
        raise UserError(f"{file} does not fit a CLIP ViT: {'; '.join(problems)}")
    clip.load_state_dict(state, assign=True)
    return clip


def save_clip(clip, file):
    """Write a `CLIP` to a .safetensors file by Hugging Face's tensor names, in half precision: its range is enough, and
    its rounding (1/2000) is far below what training leaves to chance. Adapters should be merged."""
    tensors = {  # a merged adapter has done its work, and its base is the layer
        translate(name.replace(".base.", "."), HUGGING_FACE): tensor.half().contiguous()
        for name, tensor in clip.state_dict().items()
        if ".lora_" not in name
    }
    save_file(tensors, file, metadata={"format": "pt"})


def _infer_config(tensors, naming, file):
    """Read the architecture off the tensors' names and shapes."""

    def shape(name, dims):
        source = translate(name, naming)
        if source not in tensors or tensors[source].dim() != dims or 0 in tensors[source].shape:
            raise UserError(f"{file} is not a CLIP ViT checkpoint: it has no {dims}-dimensional tensor {source}")
        return tensors[source].shape

    def layers(name):
        pattern = re.compile(re.escape(translate(name, naming)) + r"\.(\d+)\.")
        return 1 + max((int(m[1]) for m in map(pattern.match, tensors) if m), default=-1)

    vision_width, _, patch_size, _ = shape("visual.patch_embed.weight", 4)
    vocab_size, text_width = shape("text.token_embedding.weight", 2)
    grid = math.isqrt(shape("visual.position_embedding", 2)[0] - 1)
    projection = shape("text.proj.weight", 2)
    for width in (vision_width, text_width):
        if width % HEAD_WIDTH:
            raise UserError(f"{file}: width {width} is not a multiple of {HEAD_WIDTH}; this is not a CLIP ViT")
    if not (grid and layers("visual.blocks") and layers("text.blocks")):
        raise UserError(f"{file} is not a CLIP ViT checkpoint: it lacks patches or blocks")
    return CLIPConfig(
        embed_dim=projection[1] if naming is OPENAI else projection[0],
        image_size=grid * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=layers("visual.blocks"),
        context_length=shape("text.position_embedding", 2)[0],
        vocab_size=vocab_size,
        text_width=text_width,
        text_layers=layers("text.blocks"),
    )


def main():
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig()).initialize().eval()
    count = sum(p.numel() for p in clip.parameters())
    print(f"CLIP ViT-B/16 with random weights: {count:,} parameters")
    for name, tower in (("image", clip.visual), ("text", clip.text)):
        print(f"  {name} tower: {sum(p.numel() for p in tower.parameters()):,}, {len(tower.blocks)} blocks")
    pixels = torch.randn(2, 3, 224, 224)
    tokens = torch.tensor([[49406, 320, 1125, 49407, 0, 0]])
    with torch.no_grad():
        print(f"pixels {tuple(pixels.shape)} → CLS token of every block {tuple(clip.visual(pixels).shape)}")
        print(f"       → image embedding {tuple(clip.encode_image(pixels).shape)}")
        text = clip.encode_text(tokens)
        print(f"tokens {tuple(tokens.shape)} → text embedding {tuple(text.shape)}")
        gap = (clip.encode_text(tokens[:, :4]) - text).abs().max()
        print(f"without the padding behind the end token the text embedding moves by {gap:.1e}: cut it, it is free")


if __name__ == "__main__":
    main()
