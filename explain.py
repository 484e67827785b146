"""Where a model looked, for a class or a text: python explain.py IMAGE --text "perforated eardrum" --out heat.png

Attention says which patches a token took its values from, but not whether these mattered for the answer. The gradient
of a score by an attention weight A says how the score would change if the weight grew. Weight times gradient is, to
first order, what the weight contributes: were it zero, the score would be less by so much. That is done for all blocks:

    relevance of a patch = Σ over blocks of the mean over heads of  A[CLS, patch] · ∂score/∂A[CLS, patch]

The score is the cosine of the image's fused embedding with that of the text, or with the vector of the class. So the
gradient has come through the adapters and through the fusion of levels: also the CLS tokens of earlier blocks, which go
into the embedding, are reached by it.

This is the method of Chefer, Gur & Wolf (ICCV 2021, arXiv 2103.15679, equations 5 and 6), in its simplest form. Theirs
sets negative products to zero before the mean, and multiplies the matrices of successive blocks, to follow a patch
through other patches. In tests/benchmarks/pointing.py neither made a difference that could be told from chance.

A map is no proof: it shows what the score hangs on, in a model that may be wrong. It has as many cells as the model has
patches.
"""

import contextlib

import torch
import torch.nn.functional as F
from PIL import Image

from build import load_run, prepare
from cli import Parser, add_machine_flags, file_path, find_device, typed
from encoding import encode_images, encode_texts
from errors import UserError, run_script, shown
from files import whole
from images import IMAGE_SUFFIXES, load_image, normalize, to_square
from pictures import TILE, explained, overlay, refuse_inputs
from runs import find_run


@contextlib.contextmanager
def kept_weights(attentions):
    """While the `with` block runs, each attention that computes appends its weights, (B, heads, L, L) float32, to the
    list that is given. Gradients can be asked for by them."""
    kept = []

    def attend(q, k, v):
        with torch.autocast(q.device.type, enabled=False):
            weights = (q.float() @ k.float().transpose(2, 3) / q.shape[-1] ** 0.5).softmax(3).requires_grad_()
            kept.append(weights)
            return weights @ v.float()

    for attention in attentions:
        attention.attend = attend
    try:
        yield kept
    finally:
        for attention in attentions:
            del attention.attend  # that of its class is seen again


def relevance(model, pixels, direction):
    """What each patch contributes to the cosine of the image's embedding with a direction.

    pixels: (B, 3, H, W), normalized; direction: (D,), or (B, D), one for each. Returns (B, rows, columns) float32, the
    greatest value 1, or 0 where nothing contributes."""
    visual = model.clip.visual
    with kept_weights([block.attn for block in visual.blocks]) as kept, torch.enable_grad():
        cosines = F.cosine_similarity(model.encode_image(pixels), direction.float().expand(len(pixels), -1))
        gradients = torch.autograd.grad(cosines.sum(), kept)
    shares = [(weights * gradient)[:, :, 0, 1:].mean(1) for weights, gradient in zip(kept, gradients, strict=True)]
    found = sum(shares).detach().clamp(min=0)  # (B, patches)
    found = found / found.amax(1, keepdim=True).clamp(min=1e-12)
    side = visual.image_size // visual.patch_embed.kernel_size[0]
    return found.view(-1, side, side)


def explain(model, files, direction, device, batch_size=16):
    """Image files; direction: (D,), or (N, D) → a list of (what the model sees of the image, a Pillow image, and the
    map, (rows, columns))."""
    prepare(model, "visual")
    size, how = model.clip.config.image_size, model.clip.config.preprocessing
    direction, pairs = direction.to(device).expand(len(files), -1), []
    for first in range(0, len(files), batch_size):
        squares = [to_square(load_image(file), size, how) for file in files[first : first + batch_size]]
        pixels = normalize(torch.stack([torch.from_numpy(square) for square in squares]).to(device), how)
        maps = relevance(model, pixels, direction[first : first + batch_size]).cpu()
        pairs += [(Image.fromarray(square), each) for square, each in zip(squares, maps, strict=True)]
    return pairs


def add_heat(cards, model, direction_of, device):
    """Cards of a contact sheet (pictures.py) → the same, each but the query's with its map as "heat". direction_of: a
    function from a card to what `explain` takes, (D,)."""
    some = [card for card in cards if not card.get("query")]
    if not some:
        return cards
    directions = torch.stack([direction_of(card) for card in some])
    pairs = iter(explain(model, [card["image"] for card in some], directions, device))
    dressed = []
    for card in cards:
        if not card.get("query"):
            square, heat = next(pairs)
            card = {**card, "heat": overlay(square.resize((TILE, TILE)), heat)}
        dressed.append(card)
    return dressed


def main():
    parser = Parser("Where a fine-tuned model looked")
    parser.add_argument("image", type=file_path)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", type=typed(str), help="what the model should have looked for")
    what.add_argument("--class", dest="label", type=typed(str), help="the same, a class; default: the one it predicts")
    parser.add_argument("--out", type=file_path, default="heat.png", help="the picture to write: the image and the map")
    parser.add_argument("--run", type=file_path, help="a fine-tuned model's folder; by default the newest in runs/")
    parser.add_argument("--weights", type=typed(str), help="where the run's base model is, if it has moved")
    add_machine_flags(parser)
    args = parser.parse_args()
    if args.out.suffix.lower() not in IMAGE_SUFFIXES or not args.out.parent.is_dir():
        raise UserError(
            f"--out cannot write {args.out}; give it a name that ends in .png or .jpg, in a folder that exists"
        )
    load_image(args.image)  # before anything takes long
    refuse_inputs(args.out, [args.image])
    device, run = find_device(args.device), find_run(args.run)
    model, tokenizer, metadata = load_run(run, device, args.weights)
    if args.label and args.label not in metadata.classes:
        raise UserError(f"{run} knows no class {args.label!r}; it has {', '.join(metadata.classes)}")
    embedding = encode_images(model, [args.image], device, 1, 0, None)  # (1, D)
    if args.text:
        name, direction = f"“{args.text}”", encode_texts(model, tokenizer, [args.text], device)[0]
    else:
        with torch.inference_mode():
            predicted = model.classify(embedding.to(device)).argmax().item()
        number = metadata.classes.index(args.label) if args.label else predicted
        name, direction = metadata.classes[number], model.head[number].detach().cpu()
    cosine = F.cosine_similarity(embedding, direction[None]).item()
    ((square, heat),) = explain(model, [args.image], direction, device)
    with whole(args.out) as temporary:
        picture = explained(square, heat, f"{name}, cosine {cosine:.3f}")
        picture.save(temporary, Image.registered_extensions()[args.out.suffix.lower()])
    print(f"{shown(name)}, cosine {cosine:.3f}: {shown(args.out)}")


if __name__ == "__main__":
    run_script(main)
