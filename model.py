"""CLIP by hand: a Vision Transformer and a text transformer that share one embedding space.

    image (3, 224, 224) ─ patches ─ [CLS] + 196 tokens ─ 12 blocks ─ CLS token ─ LayerNorm ─ projection ─┐
                                                                                                  (512) cosine
    text, ≤ 77 BPE tokens ───────── embeddings ───────── 12 blocks ─ end token ─ LayerNorm ─ projection ─┘

Each half is a *tower*. It turns its input into *tokens*, vectors of one width: an image is cut into patches of 16 × 16
pixels, a text into pieces of words (tokenizer.py). In the blocks of the transformer the tokens exchange information. In
the end one token speaks for the whole input: for an image it is an extra one, the *CLS token* ("class token", a learned
vector put before the patches), for a text its end token. A projection maps each to the same space: the *embedding*.

CLIP was trained on 400 million pairs of an image and its caption. For a batch of N pairs it computes the cosines
between all N images and all N texts, multiplies them by a learned scale s (up to 100; 1/s is the *temperature*), and
asks each image to pick its own text among the N by a softmax, and each text its own image: the *contrastive loss*
(kernels/reference.py). So an image comes to lie near the texts that describe it. That gives a classifier without any
training on the classes: compare an image with a sentence for each class and take the nearest. It is called
*zero-shot*, and `python model.py` does it.

The numbers above are ViT-B/16's; `checkpoint.py` reads them off the shapes of any OpenAI-style CLIP ViT checkpoint, and
`clip_config.py` reads what shapes do not show.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020); the
behaviour matched is that of github.com/openai/CLIP.

Try changing this: draw the phantoms as scope "B" sees them, which these weights have never met; closed vocal cords are
then taken for an ear. Swap left and right in the prompts: noses and ears change places. Let `quick_gelu` return
`F.gelu(x)`: the cosines move by up to 0.02.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from images import OPENAI, Preprocessing


@dataclass(frozen=True)
class CLIPConfig:
    """The architecture; the defaults are CLIP ViT-B/16 (149,620,737 parameters), as OpenAI trained it."""

    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12
    # What the shapes of the weights don't show. The number of heads is width / head width.
    vision_head_width: int = 64
    text_head_width: int = 64
    activation: str = "quick_gelu"  # or "gelu"
    norm_eps: float = 1e-5
    preprocessing: Preprocessing = OPENAI  # of the images


class Attention(nn.Module):
    """Multi-head self-attention: every token compares its query q with the keys k of all tokens, and takes the mean of
    their values v, weighted by the softmax of q·k / √64. This happens in width / 64 *heads*, each in 64 dimensions, the
    head width.

    causal: a token sees only itself and those before it. CLIP's text tower is so, as language models are; it costs
    little, as the token that is read stands last. q, k and v have a projection each, where OpenAI's code has one matrix
    for all three: lora.py says why.
    """

    def __init__(self, width, head_width, causal):
        super().__init__()
        self.head_width, self.causal = head_width, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        B, L, C = x.shape
        q, k, v = (
            proj(x).view(B, L, C // self.head_width, self.head_width).transpose(1, 2)  # (B, heads, L, 64)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attend(q, k, v).transpose(1, 2).reshape(B, L, C))

    def attend(self, q, k, v):
        """(B, heads, L, 64) each → the same shape. explain.py puts another in its place, one that keeps the weights."""
        narrow = q.dtype in (torch.bfloat16, torch.float16)
        if narrow and q.is_cpu:  # where PyTorch's attention gains nothing from 16 bits, and its backward loses
            with torch.autocast("cpu", enabled=False):
                return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=self.causal)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class MLP(nn.Module):
    """Two linear layers that treat every token by itself."""

    def __init__(self, width, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.activation = {"quick_gelu": quick_gelu, "gelu": F.gelu}[activation]
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


def quick_gelu(x):
    """GELU is x·Φ(x), with Φ the normal distribution function; sigmoid(1.702 x) is within 0.01 of Φ, and cheaper. A
    model needs the one it was trained with: OpenAI's this one, most later ones the exact GELU.

    PyTorch has x·sigmoid(x) in one piece, as `silu`. Without gradients it may overwrite its input, which saves memory
    and, as new memory is slow, half of the time."""
    return F.silu(1.702 * x, inplace=not torch.is_grad_enabled()).mul_(1 / 1.702)


class Block(nn.Module):
    """A transformer block. x is the *residual stream*: attention and MLP only add to it, nothing replaces it. Both read
    a normalized copy of it (*pre-norm*), so from the first block to the last nothing but additions happens to it."""

    def __init__(self, width, head_width, causal, activation, eps):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, head_width, causal)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, activation)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """(B, 3, H, W) → (B, layers, width): the CLS token as every block leaves it. CLIP itself uses the last one only;
    `fusion.py` uses several."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, size, patch, eps = config.vision_width, config.image_size, config.patch_size, config.norm_eps
        self.image_size = size
        # A convolution whose stride is its size: one linear layer for every patch, 3·16·16 numbers → width.
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        # Attention does not know the order of its tokens, so a learned vector for each place is added to them.
        self.position_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width, eps)
        block = (width, config.vision_head_width, False, config.activation, eps)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(config.vision_layers))
        self.ln_post = nn.LayerNorm(width, eps)
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
        empty = torch.empty(config.vocab_size, width)
        # nn.Embedding draws random numbers. On the meta device, where checkpoint.py builds models whose numbers come
        # from a file, that would import PyTorch's compiler, which takes over a second.
        self.token_embedding = (
            nn.Embedding.from_pretrained(empty, freeze=False) if empty.is_meta else nn.Embedding(*empty.shape)
        )
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, width))
        block = (width, config.text_head_width, True, config.activation, config.norm_eps)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(config.text_layers))
        self.ln_final = nn.LayerNorm(width, config.norm_eps)
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
        blocks to PyTorch's defaults; here both towers get the same). Returns self.

        With a standard deviation of width^-½ a sum over `width` inputs is about as large as each of them.
        """
        for tower in (self.visual, self.text):
            width, layers = tower.proj.in_features, len(tower.blocks)
            for block in tower.blocks:
                for name, linear in block.named_modules():
                    if isinstance(linear, nn.Linear):
                        std = width**-0.5
                        if name == "mlp.fc1":
                            std *= 2**-0.5  # CLIP's choice; it gives no reason
                        elif name in ("attn.out_proj", "mlp.fc2"):  # 2·layers of them add to the residual stream
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
    """Zero-shot classification with the small CLIP of weights/phantom: an image and a prompt of each class."""
    import numpy as np

    from build import load_base
    from images import preprocess
    from phantom import draw
    from prompts import ENTREP_PROMPTS

    count = sum(p.numel() for p in CLIP(CLIPConfig()).parameters())
    print(f"CLIP ViT-B/16 has {count:,} parameters; the one used here is smaller")
    clip, tokenizer = load_base("phantom")
    images = [draw(name, np.random.default_rng(0), scope="A")[0] for name in ENTREP_PROMPTS]
    pixels = torch.stack([preprocess(image, clip.config.image_size) for image in images])
    tokens = tokenizer([prompts[0] for prompts in ENTREP_PROMPTS.values()])
    with torch.no_grad():
        x = F.normalize(clip.encode_image(pixels), dim=1)
        y = F.normalize(clip.encode_text(tokens), dim=1)
        cosines = x @ y.T
        scaled = clip.logit_scale.exp() * cosines
        tables = {"cosine": cosines, f"times s = {clip.logit_scale.exp():.1f}": scaled, "softmax": scaled.softmax(1)}
    print(f"pixels {tuple(pixels.shape)} → CLS tokens after every block {tuple(clip.visual(pixels).shape)}")
    print(f"       → embeddings {tuple(x.shape)};  tokens {tuple(tokens.shape)} → embeddings {tuple(y.shape)}")
    for title, table in tables.items():
        print(f"\n{title:14}  a prompt in each column; a row for an image of the class")
        for name, row in zip(ENTREP_PROMPTS, table.tolist(), strict=True):
            print(f"{name:14}", " ".join(f"{value:6.2f}" for value in row))
    gap = (F.normalize(clip.encode_text(tokens[:, : tokens.argmax(1).max() + 1]), dim=1) - y).abs().max()
    print(f"\nwithout the padding behind the end tokens the texts move by {gap:.0e}: cut it, it is free")


if __name__ == "__main__":
    main()
