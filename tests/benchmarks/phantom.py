"""The embedded default, `python train.py`, over several seeds, and the same with naive flips; figures and seconds.

    python tests/benchmarks/phantom.py [--seeds 0 1 2] [--folder runs/benchmark]

Beside the held-out split, whose best epoch is the one kept, every model meets 350 fresh phantoms of scope B that
nothing was chosen by. The laterality is the share of left and right noses and ears that are recognized as such. Time
is measured by train.py itself (validation included); leave the machine alone meanwhile.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import load_dataset
from metrics import accuracy, confusion_matrix
from phantom import write_dataset
from runs import encode_images, load_run

TRAIN = Path(__file__).parents[2] / "train.py"
SIDED = ("nose-right", "nose-left", "ear-right", "ear-left")


def fresh_accuracy(run, samples):
    """→ accuracy and laterality of a run on images it has never met."""
    model, _, metadata = load_run(run, torch.device("cpu"))
    with torch.inference_mode():
        features = encode_images(model, [s.image for s in samples], torch.device("cpu"), 32, 2)
        predictions = model.classify(features).argmax(1)
    labels = torch.tensor([metadata.classes.index(s.label) for s in samples])
    confusion = confusion_matrix(labels, predictions, len(metadata.classes))
    sided = [metadata.classes.index(name) for name in SIDED]
    return accuracy(confusion), (confusion.diagonal()[sided].sum() / confusion[sided].sum()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args()

    fresh = args.folder / "fresh"
    if not fresh.exists():
        write_dataset(fresh, count=350, scope="B", seed=1)
    samples = load_dataset(fresh)
    for flip in ("swap", "naive"):
        rows = []
        for seed in args.seeds:
            run = args.folder / f"{flip}-{seed}"
            if not (run / "metrics.json").exists():
                command = [sys.executable, TRAIN, "--flip", flip, "--seed", str(seed), "--run", run]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            row = json.loads((run / "metrics.json").read_text())
            row["laterality"] = statistics.mean(row["by_class"][name]["recall"] for name in SIDED)
            row["fresh_accuracy"], row["fresh_laterality"] = fresh_accuracy(run, samples)
            rows.append({key: value for key, value in row.items() if isinstance(value, float)})
        print(f"--flip {flip}: mean over seeds {args.seeds}, and each")
        for key in rows[0]:
            values = [row[key] for row in rows]
            print(f"  {key:32} {statistics.mean(values):7.3f}   {'  '.join(f'{value:.3f}' for value in values)}")


if __name__ == "__main__":
    main()
