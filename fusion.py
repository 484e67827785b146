"""Multi-level CLS fusion, slerp augmentation and the class head: what the paper adds on top of CLIP.

Every block of the vision transformer leaves a CLS token, and CLIP uses the last one only. But each block is a *level*
of its own, and what can be read off their tokens differs, as the table below shows. Here the CLS tokens of several
levels are fused into one embedding:

    (B, 3, 224, 224) pixels
      │  12 blocks
    (B, 12, 768) ── blocks 3, 6, 9, 12 ── CLS tokens, (B, 768) each
                       │  │  │  │
                      LN LN LN LN         cₗ: each has a LayerNorm, started as a copy of CLIP's own ln_post
                       │  │  │  │
                       └──┴─┬┴──┘
                          fuse            with CLIP's own projection W, 768 → 512: eₗ = W cₗ
                            │
                        z: (B, 512)       the image's embedding

With e the last level's embedding, which before training is exactly CLIP's own, there are two ways to fuse:

    concat   e + V [c₃; c₆; c₉]          the earlier levels' LayerNormed tokens side by side, and a new projection V of
                                         their own that starts at 0
    slerp    ê, then towards each eₗ     along great circles, the shortest ways on the sphere, by trained fractions tₗ
                                         that start at 0

slerp has to read the earlier tokens through W, which was trained for the last one alone. It has three new numbers,
where V has 1.2 million for ViT-B/16.

The new path starts at zero, so an untrained model still answers zero-shot as CLIP does. A zero V learns nevertheless:
∂loss/∂V = ∂loss/∂z ⊗ [c₃; c₆; c₉], and the tokens are not zero. tₗ likewise.

What do the levels know? `python fusion.py` asks the small CLIP. It trains a *linear probe* on each block's CLS token, a
linear classifier that shows what can be read off it: the class, the finding, and through which of two scopes the
picture was taken. Tested on 210 phantoms:

    block                  1     2     4     6     8     2, 4, 6, 8 side by side
    class (of 7)         0.60  0.81  0.95  0.97  0.97    0.98
    finding (of 5)       0.51  0.66  0.69  0.69  0.75    0.72
    scope (of 2)         0.82  0.88  0.93  0.88  0.86    0.93

One standard error is 0.03 around 0.7 and 0.01 to 0.02 above 0.9. The class, which the small CLIP was trained on, is
clear from block 4 on, and no level knows more of it than the last. The scope is a matter of tint and sharpness, which
no caption ever mentioned. It is read best at block 4; towards the end it fades.

Does a fusion use that? Its weights and the class head are trained on 210 phantoms, while CLIP stays frozen, and tested
on 210 others; mean of three trainings:

                            class   scope
    head alone              0.963   0.694
    concat                  0.971   0.906
    concat, block 8 only    0.959   0.879    as many new weights, but the last token in place of every level's
    slerp                   0.976   0.789

So a fusion helps where the task is another than CLIP's own. Most of that is due to the new weights: given nothing but
the last token, they find the scope nearly as well. Where the last level knows the answer, no fusion brings much.
docs/choices.md has the measurements that made `concat` the default.

Source: arXiv 2509.00752. It names the components; the modes and their zero start are this project's choices.

Try changing this: give only one early level, `FusedCLIP(clip, count, mode, levels=(4,))`, and the scope is still read
at 0.89. Raise the probe's ridge to 10: the scope becomes hard to read, the class does not.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kernels import slerp
from model import CLIP

MODES = ("concat", "slerp")


def default_levels(layers):
    """Four levels at the quarters of the depth: 12 blocks → (3, 6, 9, 12)."""
    return tuple(sorted({max(1, round(layers * quarter / 4)) for quarter in (1, 2, 3, 4)}))


class MultiLevelFusion(nn.Module):
    """(B, layers, width) CLS tokens of all blocks → (B, embed_dim). levels: block numbers from 1 on; the last block is
    always among them. Raises ValueError for an unknown mode or level."""

    def __init__(self, visual, levels, mode="concat"):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown fusion mode {mode!r}; choose one of {', '.join(MODES)}")
        last = len(visual.blocks)
        if any(not 1 <= level <= last for level in levels):
            raise ValueError(f"levels {list(levels)} are not all between 1 and {last}, the number of blocks")
        self.mode = mode
        self.levels = sorted({*levels, last})
        last_norm = visual.ln_post
        shape, eps = last_norm.normalized_shape, last_norm.eps
        self.norms = nn.ModuleList(nn.LayerNorm(shape, eps) for _ in self.levels)
        for norm in self.norms:
            norm.load_state_dict(last_norm.state_dict())
        width, embed_dim, earlier = visual.proj.in_features, visual.proj.out_features, len(self.levels) - 1
        if mode == "concat":
            self.mix = nn.Linear(width * earlier, embed_dim, bias=False)  # V
            nn.init.zeros_(self.mix.weight)
        else:
            self.fractions = nn.Parameter(torch.zeros(earlier))

    def forward(self, cls, proj):
        """cls: (B, layers, width); proj: CLIP's projection, width → embed_dim."""
        *tokens, last = (norm(cls[:, level - 1]) for norm, level in zip(self.norms, self.levels, strict=True))
        fused = proj(last)
        if self.mode == "concat":
            return fused + self.mix(torch.cat(tokens, dim=1))
        for fraction, token in zip(self.fractions, tokens, strict=True):
            fused = slerp(fused, proj(token), fraction)
        return fused


class FusedCLIP(nn.Module):
    """CLIP with multi-level fusion in its image tower and a cosine classifier on top: the model that is fine-tuned.

    mode: of MODES, or "none" for CLIP's own image embedding. `head`: a row for each class, to be started as the mean
    text embedding of the class's prompts (`set_head`). Why a mean: with unit vectors tᵢ of n prompts, x̂ · (1/n) Σ tᵢ is
    the mean cosine of the image with the prompts. A mean of unit vectors is shorter the
    more they disagree. Left in, that length would lower the logits of a class for every image alike, although it says
    nothing about the image; so it is divided out (`classify`), as in CLIP's own ensembles of prompts, and the logit
    depends on the angle alone. The untrained classifier is zero-shot CLIP, asked in several ways.
    """

    def __init__(self, clip: CLIP, num_classes, mode="concat", levels=None):
        super().__init__()
        self.clip = clip
        levels = levels or default_levels(len(clip.visual.blocks))
        self.fusion = None if mode == "none" else MultiLevelFusion(clip.visual, levels, mode)
        self.head = nn.Parameter(torch.zeros(num_classes, clip.config.embed_dim))
        # The type that the towers multiply matrices in. Of a run that was loaded (build.py): which towers encoding.py
        # has yet to prepare, and a hash of what it is.
        self.precision, self.waiting, self.fingerprint = torch.float32, set(), None

    def encode_image(self, pixels):
        """(B, 3, H, W) → (B, embed_dim) float32, the fused embedding, not of unit length."""
        with self._autocast(pixels.device):
            if self.fusion is None:
                return self.clip.encode_image(pixels).float()
            return self.fusion(self.clip.visual(pixels), self.clip.visual.proj).float()

    def encode_text(self, tokens):
        """(B, L) → (B, embed_dim) float32, not of unit length."""
        with self._autocast(tokens.device):
            return self.clip.encode_text(tokens).float()

    def _autocast(self, device):
        """A context in which PyTorch multiplies matrices in `precision`. Softmaxes and norms are summed in float32, and
        weights that are trained are kept so."""
        return torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)

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
            row.copy_(F.normalize(self.encode_text(tokens), dim=1).mean(0))


def slerp_mix(embedding, labels, probability, generator=None):
    """Augment embeddings along great circles: with `probability`, move each to a random point on the arc to another
    embedding of its class in the batch. It happens after the towers, so it costs next to nothing.

    embedding: (B, D); labels: (B,). Returns (B, D); a mixed row has unit length, the others are as they were.
    The partner is drawn by ranking random numbers among the rows of the same class. The only image of a class stays as
    it is.
    """
    B, device = len(labels), labels.device
    # Three kinds of random numbers in one draw, on the CPU: the same on every device.
    rank, coin, t = torch.rand(B, B + 2, generator=generator).to(device).split([B, 1, 1], dim=1)  # (B, B), (B, 1) twice
    allowed = (labels[:, None] == labels) & ~torch.eye(B, dtype=torch.bool, device=device)  # (B, B)
    partner = rank.masked_fill(~allowed, -1).argmax(1)  # (B,)
    mixed = (coin < probability) & allowed.any(1, keepdim=True)  # (B, 1)
    return torch.where(mixed, slerp(embedding, embedding[partner], t[:, 0]), embedding)


def linear_probe(tokens, labels, ridge=0.1):
    """How well a linear classifier reads labels off tokens: (N, D), (N,) int64 → accuracy on the second half of them,
    after a least-squares fit to the first half; ridge: the penalty that keeps the weights small."""
    half = len(labels) // 2
    tokens = (tokens - tokens[:half].mean(0)) / (tokens[:half].std(0) + 1e-6)
    tokens = F.pad(tokens, (0, 1), value=1.0).double()  # a constant, for the bias
    x, y = tokens[:half], F.one_hot(labels[:half], int(labels.max()) + 1).double()
    weight = torch.linalg.solve(x.T @ x + ridge * half * torch.eye(x.shape[1]), x.T @ y)
    return ((tokens[half:] @ weight).argmax(1) == labels[half:]).double().mean().item()


def train_on_tokens(model, cls, labels, steps=200):
    """Train fusion and head of a frozen CLIP on the first half of the CLS tokens, which stay as they are → accuracy on
    the second half."""
    half = len(labels) // 2

    def classify(cls):
        fused = model.fusion(cls, model.clip.visual.proj) if model.fusion else model.clip.visual.project(cls[:, -1])
        return model.classify(fused)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(half, (64,))
        loss = F.cross_entropy(classify(cls[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (classify(cls[half:]).argmax(1) == labels[half:]).double().mean().item()


def main():
    """What each level of the small CLIP knows about phantoms, and what a fusion learns to take from it."""
    import numpy as np

    from build import load_base
    from images import prefetch, preprocess
    from phantom import CLASSES, draw
    from prompts import ENTREP_PROMPTS

    def example(i):
        label, scope = CLASSES[i % 7], "AB"[i // 7 % 2]
        image, caption = draw(label, np.random.default_rng([7, i]), scope, size=(128, 128))
        return preprocess(image, 128), label, scope, caption.split(", ")[1]  # the finding, the first if there are two

    clip, tokenizer = load_base("phantom")
    order = np.random.default_rng(0).permutation(420).tolist()  # both halves hold all kinds
    (items,) = prefetch(example, [order], workers=2)
    pixels, labels, scopes, findings = zip(*items, strict=True)
    with torch.no_grad():
        cls = clip.visual(torch.stack(pixels))  # (N, 8, 128)
    classes = torch.tensor([CLASSES.index(label) for label in labels])
    scope_numbers = torch.tensor(["AB".index(scope) for scope in scopes])

    def probe_findings(tokens):  # within each site, as it has its own
        scores = []
        for site in ("nose", "ear", "vc", "throat"):
            rows = [i for i, label in enumerate(labels) if label.startswith(site)]
            names = sorted({findings[i] for i in rows})
            scores.append(linear_probe(tokens[rows], torch.tensor([names.index(findings[i]) for i in rows])))
        return sum(scores) / len(scores)

    print("accuracy of a linear probe   class (of 7)   finding (of 5)   scope (of 2)")
    for levels in [*((level,) for level in range(1, 9)), default_levels(8)]:
        tokens = cls[:, [level - 1 for level in levels]].flatten(1)
        row = linear_probe(tokens, classes), probe_findings(tokens), linear_probe(tokens, scope_numbers)
        name = f"block{'s' * (len(levels) > 1)} {', '.join(map(str, levels))}"
        print(f"{name:20} {row[0]:20.2f} {row[1]:16.2f} {row[2]:14.2f}")

    print("\naccuracy on 210 phantoms, mean of three trainings      class (of 7)   scope (of 2)")
    clip.requires_grad_(False)
    last = cls[:, -1:].expand_as(cls)  # block 8's token in place of each level's
    rows = (("head alone", "none", cls), ("concat", "concat", cls), ("concat, block 8 only", "concat", last))
    for name, mode, tokens in (*rows, ("slerp", "slerp", cls)):
        scores = []
        for seed in range(3):
            torch.manual_seed(seed)
            by_class, by_scope = (FusedCLIP(clip, count, mode) for count in (len(CLASSES), 2))
            by_class.set_head([tokenizer(ENTREP_PROMPTS[name]) for name in CLASSES])
            torch.nn.init.normal_(by_scope.head)  # the small CLIP has never read of scopes
            scores.append(
                [train_on_tokens(by_class, tokens, classes), train_on_tokens(by_scope, tokens, scope_numbers)]
            )
        means = torch.tensor(scores).mean(0)
        print(f"{name:48} {means[0]:18.3f} {means[1]:14.3f}")


if __name__ == "__main__":
    main()
