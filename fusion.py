"""Multi-level CLS fusion, slerp augmentation and the class head: what the paper adds on top of CLIP.

Every block of the vision transformer leaves a CLS token. The last one knows what is in the image; earlier ones still
carry texture, colour and shape, which is much of what tells one mucosa from another. So the CLS tokens of several
levels are fused into one embedding:

    block 3   6   9   12         cₗ: CLS token of level l, (B, width)
      │   │   │   │
      LN  LN  LN  LN             eₗ = W LNₗ(cₗ): a LayerNorm each (starting as ln_post), CLIP's own projection W
      └───┴─┬─┴───┘
          fuse → (B, embed_dim)

with e the last level's embedding, which is exactly CLIP's own, and l running over the other levels:

    gate     e + Σ gₗ ⊙ eₗ               gₗ a vector of embed_dim gates, starting at 0
    slerp    ê, then towards each eₗ     fold along great circles by a trained fraction tₗ each, starting at 0
    concat   e + V [c₃; c₆; c₉]          LayerNormed tokens side by side, V starting at 0
    mean     average of the unit eₗ      nothing new but the LayerNorms; does not start as CLIP

Every new path but `mean` starts at zero, so an untrained model still answers zero-shot as CLIP does.

Source: arXiv 2509.00752. It names the components; the modes and their zero start are this project's choices.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kernels import slerp
from model import CLIP, CLIPConfig

MODES = ("gate", "slerp", "concat", "mean")


def default_levels(layers):
    """Four levels at the quarters of the depth: 12 blocks → (3, 6, 9, 12)."""
    return tuple(sorted({max(1, round(layers * quarter / 4)) for quarter in (1, 2, 3, 4)}))


class MultiLevelFusion(nn.Module):
    """(B, layers, width) CLS tokens of all blocks → (B, embed_dim). levels: block numbers from 1 on; the last block is
    always among them."""

    def __init__(self, visual, levels, mode="gate"):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown fusion mode {mode!r}; choose one of {', '.join(MODES)}")
        last = len(visual.blocks)
        if any(not 1 <= level <= last for level in levels):
            raise ValueError(f"levels {list(levels)} are not all between 1 and {last}, the number of blocks")
        self.mode = mode
        self.levels = sorted({*levels, last})
        self.norms = nn.ModuleList(nn.LayerNorm(visual.ln_post.normalized_shape) for _ in self.levels)
        for norm in self.norms:
            norm.load_state_dict(visual.ln_post.state_dict())
        width, embed_dim, earlier = visual.proj.in_features, visual.proj.out_features, len(self.levels) - 1
        if mode == "gate":
            self.gates = nn.Parameter(torch.zeros(earlier, embed_dim))
        elif mode == "slerp":
            self.fractions = nn.Parameter(torch.zeros(earlier))
        elif mode == "concat":
            self.mix = nn.Linear(width * earlier, embed_dim, bias=False)
            nn.init.zeros_(self.mix.weight)

    def forward(self, cls, proj):
        """cls: (B, layers, width); proj: CLIP's projection, width → embed_dim."""
        *tokens, last = (norm(cls[:, level - 1]) for norm, level in zip(self.norms, self.levels, strict=True))
        fused = proj(last)
        if self.mode == "concat":
            return fused + self.mix(torch.cat(tokens, dim=1))
        embeddings = [proj(token) for token in tokens]
        if self.mode == "gate":
            for gate, embedding in zip(self.gates, embeddings, strict=True):
                fused = fused + gate * embedding
        elif self.mode == "slerp":
            for fraction, embedding in zip(self.fractions, embeddings, strict=True):
                fused = slerp(fused, embedding, fraction)
        elif self.mode == "mean":
            fused = torch.stack([F.normalize(e, dim=1) for e in [*embeddings, fused]]).mean(0)
        return fused


class FusedCLIP(nn.Module):
    """CLIP with multi-level fusion in its image tower and a cosine classifier on top: the model that is fine-tuned.

    mode: of MODES, or "none" for CLIP's own image embedding. `head`: a row for each class, to be started as the mean
    text embedding of the class's prompts (`set_head`), so that the untrained classifier is CLIP's zero-shot classifier.
    """

    def __init__(self, clip: CLIP, num_classes, mode="gate", levels=None):
        super().__init__()
        self.clip = clip
        levels = levels or default_levels(len(clip.visual.blocks))
        self.fusion = None if mode == "none" else MultiLevelFusion(clip.visual, levels, mode)
        self.head = nn.Parameter(torch.zeros(num_classes, clip.config.embed_dim))

    def encode_image(self, pixels):
        """(B, 3, H, W) → (B, embed_dim), the fused embedding, not of unit length."""
        if self.fusion is None:
            return self.clip.encode_image(pixels)
        return self.fusion(self.clip.visual(pixels), self.clip.visual.proj)

    def encode_text(self, tokens):
        """(B, L) → (B, embed_dim), not of unit length."""
        return self.clip.encode_text(tokens)

    @property
    def scale(self):
        """exp(logit_scale), at most 100 as in CLIP; one scale serves the classifier and the contrastive loss."""
        return self.clip.logit_scale.exp().clamp(max=100)

    def classify(self, embedding):
        """(B, embed_dim) → (B, classes) logits: scaled cosines with the class vectors."""
        return self.scale * F.normalize(embedding.float(), dim=1) @ F.normalize(self.head, dim=1).T

    @torch.no_grad()
    def set_head(self, tokens_of_class):
        """Start each class vector as the mean unit text embedding of its prompts. tokens_of_class: a (prompts, L)
        tensor for each class."""
        for row, tokens in zip(self.head, tokens_of_class, strict=True):
            row.copy_(F.normalize(self.encode_text(tokens).float(), dim=1).mean(0))


def slerp_mix(embedding, labels, probability, generator=None):
    """Augment embeddings along great circles: with `probability`, move each to a random point on the arc to another
    embedding of its class in the batch. It happens after the towers, so it costs next to nothing.

    embedding: (B, D); labels: (B,). Returns (B, D); a mixed row has unit length, the others are as they were.
    The partner is drawn by ranking random numbers among the rows of the same class; an only child stays itself.
    """
    B, device = len(labels), labels.device
    draw = torch.rand(B, B + 2, generator=generator).to(device)  # drawn on the CPU: the same on every device
    allowed = (labels[:, None] == labels) & ~torch.eye(B, dtype=torch.bool, device=device)
    partner = draw[:, :B].masked_fill(~allowed, -1).argmax(1)
    mixed = (draw[:, B] < probability) & allowed.any(1)
    return torch.where(mixed[:, None], slerp(embedding, embedding[partner], draw[:, B + 1]), embedding)


def main():
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(image_size=64, vision_width=128, embed_dim=64, text_width=64, vocab_size=600)).initialize()
    pixels = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        print(f"CLS tokens of all blocks {tuple(clip.visual(pixels).shape)}; levels {default_levels(12)}")
        own = F.normalize(clip.encode_image(pixels), dim=1)
        for mode in MODES:
            model = FusedCLIP(clip, num_classes=7, mode=mode)
            new = sum(p.numel() for p in model.fusion.parameters())
            gap = (F.normalize(model.encode_image(pixels), dim=1) - own).abs().max()
            print(f"{mode:7} {new:7,} new parameters; untrained, the unit embedding moves by {gap:.1e}")
        mixed = slerp_mix(own, torch.tensor([0, 0, 0, 1]), probability=1.0)
        cosines = [round(c, 3) for c in (mixed * own).sum(1).tolist()]
        print(f"slerp_mix of four images of the classes 0 0 0 1: cosines with the originals {cosines}")


if __name__ == "__main__":
    main()
