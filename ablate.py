"""What each part of the method brings on your data: python ablate.py --data path

The rows are cumulative, each adds one part to the row above it:

    zero-shot           the base model as it is: images are compared with the class prompts
    + LoRA              adapters and the class head, trained by classification alone
    + multi-level CLS   the CLS tokens of several levels are fused
    + slerp             embeddings are mixed along great circles
    + contrastive       the contrastive loss with class prompts and captions: all of the method

Every row is trained with several seeds, which also draw the split: mean ± standard deviation of the held-out figures.
With --folds n, it is trained once for each of n parts of the data, which are held out in turn (cross-validation).
All other flags are train.py's. Finished runs are kept in --folder, so that an interrupted ablation goes on.

Source: arXiv 2509.00752 for the parts. Where a part does not help on some data, the table says so.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from cli import Parser, positive_int
from errors import UserError, run_script

PARTS = {  # row: what is still switched off
    "+ LoRA": ["--fusion", "none", "--slerp", "0", "--contrastive", "0"],
    "+ multi-level CLS": ["--slerp", "0", "--contrastive", "0"],
    "+ slerp": ["--contrastive", "0"],
    "+ contrastive": [],
}
FIGURES = {  # key in metrics.json: column
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "i2i_recall@1": "image→image R@1",
    "i2i_mrr": "MRR",
    "t2i_recall@1": "text→image R@1",
    "t2i_mrr": "MRR",
    "t2i_caption_recall@1": "same caption R@1",
    "t2i_caption_mrr": "MRR",
}


def train(run, flags):
    """Train a run, unless it is there already → its metrics.json."""
    metrics = run / "metrics.json"
    if not metrics.exists():
        if (run / "last.safetensors").exists():
            flags = ["--resume"]
        command = [sys.executable, Path(__file__).with_name("train.py"), *flags, "--run", run]
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            raise UserError(result.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return json.loads(metrics.read_text())


def summarize(results):
    """[metrics, …] of the repeats → {figure: {"mean", "spread", "values"}}, of those figures that every repeat has."""
    summary = {}
    for key in FIGURES:
        values = [result.get(key) for result in results]
        if None not in values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            summary[key] = {"mean": statistics.mean(values), "spread": spread, "values": values}
    return summary


def markdown(rows):
    """{row: summary} → a Markdown table, without the columns that have no figures."""
    keys = [key for key in FIGURES if any(key in row for row in rows.values())]
    lines = [["", *(FIGURES[key] for key in keys)], ["---"] * (1 + len(keys))]
    for name, row in rows.items():
        cells = [f"{row[key]['mean']:.3f} ± {row[key]['spread']:.3f}" if key in row else "–" for key in keys]
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.epilog = "All other flags are train.py's, --data and --weights among them, but not --run and --resume."
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="every row is trained once with each of these seeds"
    )
    parser.add_argument(
        "--folds", type=positive_int, help="instead of the seeds: hold out each of so many parts in turn"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"), help="where runs and tables are written")
    args, flags = parser.parse_known_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    settings = args.folder / "flags.json"
    begun = settings.exists() and any(args.folder.glob("*/metrics.json"))
    if begun and json.loads(settings.read_text()) != flags:
        raise UserError(f"{args.folder} holds an ablation with other flags; choose another --folder")
    settings.write_text(json.dumps(flags))

    repeats = {str(seed): ["--seed", str(seed)] for seed in args.seeds}
    if args.folds:
        repeats = {f"fold-{k}": ["--fold", f"{k}/{args.folds}"] for k in range(1, args.folds + 1)}
    results = {name: [] for name in ["zero-shot", *PARTS]}
    for repeat, its_flags in repeats.items():
        for name, off in PARTS.items():
            print(f"{' '.join(its_flags)}: {name}", file=sys.stderr, flush=True)
            run = args.folder / f"{name.strip('+ ').replace(' ', '-')}-{repeat}"
            results[name].append(train(run, [*flags, *off, *its_flags]))
        prefix = "zero_shot_"
        untrained = {k.removeprefix(prefix): v for k, v in results["+ LoRA"][-1].items() if k.startswith(prefix)}
        results["zero-shot"].append(untrained)
    rows = {name: summarize(of_row) for name, of_row in results.items()}
    table = markdown(rows)
    (args.folder / "ablation.json").write_text(
        json.dumps({"repeats": list(repeats), "flags": flags, "rows": rows}, indent=2)
    )
    (args.folder / "ablation.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    run_script(main)
