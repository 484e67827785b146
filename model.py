"""CLIP by hand: a Vision Transformer and a text transformer that share one embedding space.

    image (3, 224, 224) ─ patches ─ [CLS] + 196 tokens ─ 12 blocks ─ CLS token ─ LayerNorm ─ projection ─┐
                                                                                                  (512) cosine
    text, ≤ 77 BPE tokens ───────── embeddings ───────── 12 blocks ─ end token ─ LayerNorm ─ projection ─┘

Both towers are stacks of the same pre-norm block; the text tower adds a causal mask. The numbers above are ViT-B/16's;
`checkpoint.py` reads them off the shapes of any OpenAI-style CLIP ViT checkpoint, in OpenAI's or Hugging Face's names.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020); the
behaviour matched is that of github.com/openai/CLIP.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

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
