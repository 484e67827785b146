"""Low-rank adaptation (LoRA): fine-tune a large linear layer by training a thin detour around it.

    x (in) ──┬──────────────── W x + b, frozen ─────────────────┬── y (out)
             └── dropout ── A: in → rank ── B: rank → out ── · alpha / rank ──┘  trained

    y = W x + b  +  (alpha / rank) · B A x          A: (rank, in), B: (out, rank), rank ≪ in, out

The idea: what fine-tuning changes in a weight matrix has low rank, so two thin matrices can hold it. For W of 768 × 768
and rank 8 they have 12,288 numbers instead of 589,824.

- B starts at zero, so an untrained adapter changes nothing. A must not be zero as well: with g the gradient of y,
  ∂loss/∂B = g (A x)ᵀ and ∂loss/∂A = Bᵀ g xᵀ (times alpha / rank). If B alone is zero, B gets a gradient at once, and A
  from the second step on. If both are, both gradients are zero, and stay so.
- B A x is a sum of `rank` terms. After one gradient step B = −η g (A x)ᵀ, so B A x = −η g ‖A x‖²: terms of one sign,
  whose sum grows with the rank. Dividing by the rank keeps its size: with the default alpha = 16 the factor is 2 at
  rank 8 and 0.5 at rank 32, and one learning rate should serve both. (Many set alpha = 2 × rank instead, and search the
  rate again.)
- q, k and v have an adapter each. One on their stacked matrix, as OpenAI stores it, would be B (3·out, rank) times one
  A (rank, in): q, k and v would have to share the same few directions of x.
- Trained, (alpha / rank) · B A can be added to W, for good: a *merged* adapter costs nothing.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). Names, initialization and
scaling are those of Hugging Face's PEFT, so that adapters can be exchanged with it.

Try changing this: start A at zero too (`nn.init.zeros_`): both gradients that `python lora.py` prints are 0. Start B at
random: the untrained adapters move the embedding. Adapt fc1 and fc2 only: fewer adapters, more parameters.
"""

import math

import torch
from torch import nn

from model import CLIP, CLIPConfig

PROJECTIONS = {
    "q": "attn.q_proj",
    "k": "attn.k_proj",
    "v": "attn.v_proj",
    "out": "attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
TOWERS = ("visual", "text")


class LoRALinear(nn.Module):
    """A linear layer with its low-rank detour: (…, in) → (…, out)."""

    def __init__(self, base: nn.Linear, rank, alpha, dropout=0.0):
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        # Uniform within ±√(2/(1 + a²))·√(3/in); a = √5 makes it ±1/√in. nn.Linear has just done the same; PEFT repeats
        # it, to show it. So A x has a standard deviation of 0.58 of an entry of x, whatever the width.
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.merged = False

    def forward(self, x):
        y = self.base(x)
        return y if self.merged else y + self.lora_B(self.lora_A(self.dropout(x)) * self.scaling)

    @torch.no_grad()
    def merge(self):
        """Add the detour into the base weight: the same function (to rounding), at the base layer's cost."""
        if not self.merged:
            self.base.weight += self.lora_B.weight @ self.lora_A.weight * self.scaling
            self.merged = True

    @torch.no_grad()
    def unmerge(self):
        """Take the detour out again, to go on training it."""
        if self.merged:
            self.base.weight -= self.lora_B.weight @ self.lora_A.weight * self.scaling
            self.merged = False


def add_lora(clip, rank=8, alpha=16.0, dropout=0.0, projections=("q", "k", "v", "out"), blocks=None, towers=TOWERS):
    """Replace linear layers of `clip` by LoRALinear ones, in place.

    projections: names of PROJECTIONS; blocks: numbers from 1 on, None for all; towers: names of TOWERS. A block number
    beyond a tower's depth is skipped there, as the towers may differ in depth. Returns the new layers. Raises KeyError
    for an unknown projection.
    """
    layers = []
    for tower in towers:
        for number, block in enumerate(getattr(clip, tower).blocks, start=1):
            if blocks is not None and number not in blocks:
                continue
            for projection in projections:
                parent, name = PROJECTIONS[projection].split(".")
                parent = getattr(block, parent)
                layer = LoRALinear(getattr(parent, name), rank, alpha, dropout)
                setattr(parent, name, layer.to(layer.base.weight.device))
                layers.append(layer)
    return layers


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def merge_lora(model):
    """Merge every adapter of `model` into its base weights, for inference."""
    for layer in lora_layers(model):
        layer.merge()


def unmerge_lora(model):
    """Undo `merge_lora`."""
    for layer in lora_layers(model):
        layer.unmerge()


def fold_lora(model):
    """Merge every adapter of `model` for good: plain layers take the adapted ones' places."""
    merge_lora(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoRALinear):
                setattr(parent, name, layer.base)


def main():
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig()).initialize().eval()
    clip.requires_grad_(False)
    pixels = torch.randn(1, 3, 224, 224)
    before = clip.encode_image(pixels)
    layers = add_lora(clip, rank=8)
    trained = sum(p.numel() for p in clip.parameters() if p.requires_grad)
    total = sum(p.numel() for p in clip.parameters())
    print(f"rank 8 on q, k, v and out of all blocks of ViT-B/16: {len(layers)} adapters")
    print(f"  {trained:,} trainable parameters, {trained / total:.2%} of {total:,}")
    embedding = clip.encode_image(pixels)
    print(f"untrained, the image embedding moves by {(embedding - before).abs().max():.1e}")
    embedding[0, 0].backward()
    adapter = lora_layers(clip.visual.blocks[-1])[-1]
    norm_A, norm_B = (part.weight.grad.norm().item() for part in (adapter.lora_A, adapter.lora_B))
    print(f"first gradient of an adapter in the last image block: ‖∂/∂A‖ = {norm_A:.2g}, ‖∂/∂B‖ = {norm_B:.2g}")
    with torch.no_grad():
        for layer in layers:
            nn.init.normal_(layer.lora_B.weight, std=0.02)
        adapted = clip.encode_image(pixels)
        print(f"with random B the embedding moves by {(adapted - before).abs().max():.1e}")
        merge_lora(clip)
        print(f"merging the adapters moves that by {(clip.encode_image(pixels) - adapted).abs().max():.1e} (rounding)")


if __name__ == "__main__":
    main()
