"""Two choices that are no settings: slerp towards a text in place of an image, and a temperature for each loss.

    python phantom.py runs/development --seed 5
    python tests/benchmarks/other_losses.py --data runs/development --weights phantom --lr 2e-3 --steps 100 \
        --seeds 10 11 12 13 14 --shots 8 --folder runs/losses-8

Takes the flags of ablate.py, and prints such a table.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import ablate
import build
import train
from augment import augment
from cli import find_device
from fusion import FusedCLIP
from images import normalize
from kernels import contrastive_loss, slerp
from settings import Settings


def loss_with_text_partners(model, tokenizer, items, metadata, device, seed):
    """As train.joint_loss, but an image's embedding is mixed with that of the prompt which was drawn for it."""
    images, views, labels, prompts, captions = zip(*items, strict=True)
    drawn = list(dict.fromkeys(zip(labels, prompts, strict=True)))
    captioned = [row for row, caption in enumerate(captions) if caption]
    distinct = list(dict.fromkeys(captions[row] for row in captioned))
    z = model.encode_image(normalize(augment(images, views, model.clip.config.image_size)))
    tokens = tokenizer([text for _, text in drawn] + distinct, model.clip.config.context_length)
    of_prompts, of_captions = model.encode_text(tokens[:, : tokens.argmax(1).max() + 1]).split(
        [len(drawn), len(distinct)]
    )
    own_prompt = torch.tensor([drawn.index(pair) for pair in zip(labels, prompts, strict=True)])
    coin, t = torch.rand(len(z), 2).unbind(1)
    mix = (coin < metadata.settings.slerp)[:, None]
    mixed = torch.where(mix, slerp(z, of_prompts[own_prompt], t), z)

    targets = torch.tensor([metadata.classes.index(label) for label in labels])
    of_class = torch.tensor([metadata.classes.index(label) for label, _ in drawn])
    own_caption = torch.tensor([distinct.index(captions[row]) for row in captioned])
    terms = [contrastive_loss(mixed, of_prompts, model.scale, targets, of_class)]
    terms.append(contrastive_loss(z[captioned], of_captions, model.scale, own_caption, torch.arange(len(distinct))))
    return F.cross_entropy(model.classify(mixed), targets) + metadata.settings.contrastive * torch.stack(terms).mean()


class TwoTemperatures(FusedCLIP):
    """The classifier has a scale of its own, which starts at CLIP's; `scale` is left to the contrastive loss."""

    def __init__(self, clip, *arguments):
        super().__init__(clip, *arguments)
        self.class_scale = torch.nn.Parameter(clip.logit_scale.detach().clone())

    def classify(self, embedding):
        cosines = F.normalize(embedding, dim=1) @ F.normalize(self.head, dim=1).T
        return self.class_scale.exp().clamp(max=100) * cosines


CHOICES = {
    "all": patch.object(train, "joint_loss", train.joint_loss),
    "slerp towards a prompt": patch.object(train, "joint_loss", loss_with_text_partners),
    "two temperatures": patch.object(build, "FusedCLIP", TwoTemperatures),
}


def main():
    _, args = ablate.parse_arguments()
    repeats = {str(seed): {"seed": seed} for seed in args.seeds}
    settings = Settings.from_flags(args, find_device(args.device))
    trainings = ablate.Trainings(settings, repeats, args, len(CHOICES) * len(repeats))
    (shots,) = args.shots or (None,)
    results = {}
    for name, other in CHOICES.items():
        with other:
            results[name] = trainings.run(ablate.Row(ablate.Variant(name, {})), shots)
    against = {name: None if name == "all" else "all" for name in results}
    summary = ablate.summarize({name: (own, results.get(against[name])) for name, own in results.items()})
    print(ablate.markdown(summary, against, f"{len(repeats)} seeds"), end="")


if __name__ == "__main__":
    main()
