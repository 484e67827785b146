"""The embedded default, `python train.py`, over several seeds, and the same with naive flips; figures and seconds.

    python tests/benchmarks/phantom.py [--seeds 0 1 2 3 4] [--folder runs/benchmark]

All figures are of the 700 test phantoms, which nothing was chosen by. The laterality is the share of left and right
noses and ears that are recognized as such. Time is measured by train.py itself (validation included); leave the machine
alone meanwhile.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train.py"
SIDED = ("nose-right", "nose-left", "ear-right", "ear-left")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args()

    for flip in ("swap", "naive"):
        rows = []
        for seed in args.seeds:
            run = args.folder / f"{flip}-{seed}"
            if not (run / "metrics.json").exists():
                command = [sys.executable, TRAIN, "--flip", flip, "--seed", str(seed), "--run", run]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            row = json.loads((run / "metrics.json").read_text())
            row["laterality"] = statistics.mean(row["by_class"][name]["recall"] for name in SIDED)
            last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            row["laterality after the last step, on val"] = statistics.mean(
                last["by_class"][name]["recall"] for name in SIDED
            )
            rows.append({key: value for key, value in row.items() if isinstance(value, float)})
        print(f"--flip {flip}: mean over seeds {args.seeds}, and each")
        for key in rows[0]:
            values = [row[key] for row in rows]
            print(f"  {key:40} {statistics.mean(values):7.3f}   {'  '.join(f'{value:.3f}' for value in values)}")


if __name__ == "__main__":
    main()
