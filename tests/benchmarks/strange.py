"""How well classify.py tells images that are unlike a run's training images: held-out ones against those of a folder.

    python tests/benchmarks/strange.py RUN FOLDER

As AUROC, the chance that a held-out image scores higher than a strange one; and how many of each are called unlike the
training images. Beside it: the probability of the class, which is what one would look at otherwise.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from sklearn.metrics import roc_auc_score

from build import load_run
from calibration import CALIBRATION, UNLIKE, Calibration
from encoding import encode_images
from images import find_images
from split_file import read_split
from splits import scored_split

CPU = torch.device("cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    model, _, _ = load_run(args.run, CPU)
    splits = read_split(args.run)
    calibration = Calibration.load(args.run / CALIBRATION, model.head.shape[1])
    found = {}
    for name, files in (
        ("held out", [sample.image for sample in splits[scored_split(splits)]]),
        ("strange", find_images(args.folder)),
    ):
        embeddings = encode_images(model, files, CPU, 32, 2)
        with torch.no_grad():
            sure = calibration.probabilities(model.classify(embeddings)).amax(1)
        found[name] = calibration.familiarity(embeddings), sure
        unlike = (found[name][0] < UNLIKE).double().mean()
        print(f"{name}: {len(files)} images, {unlike:.2f} of them called unlike, mean probability {sure.mean():.2f}")
    labels = [1] * len(found["held out"][0]) + [0] * len(found["strange"][0])
    for which, name in enumerate(("familiarity", "probability")):
        values = torch.cat([found["held out"][which], found["strange"][which]])
        print(f"AUROC of {name}: {roc_auc_score(labels, values):.3f}")


if __name__ == "__main__":
    main()
