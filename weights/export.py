"""Write the CLIP of a run as base weights for further runs: python weights/export.py runs/NAME FOLDER

The folder gets model.safetensors, with adapters merged, by Hugging Face's tensor names, and its merges.txt. Fusion and
class head are no part of CLIP, so the run must be one of `train.py --fusion none`. weights/phantom was made so.
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from checkpoint import save_clip
from cli import Parser, file_path
from errors import UserError, run_script
from files import make_folder
from runs import find_run, load_run
from tokenizer import save_merges


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("run", type=file_path, help="a fine-tuned model's folder")
    parser.add_argument("folder", type=file_path, help="where to write the weights")
    parser.add_argument("--weights", help="where the run's base model is, should it have moved")
    args = parser.parse_args()
    if (args.folder / "model.safetensors").exists():
        raise UserError(f"{args.folder} already holds weights; choose another folder")
    model, tokenizer, _ = load_run(find_run(args.run), torch.device("cpu"), args.weights)
    if model.fusion is not None:
        raise UserError(f"{args.run} fuses levels, which no CLIP file can hold; export a run of train.py --fusion none")
    make_folder(args.folder)
    save_merges(tokenizer.ranks, args.folder / "merges.txt")
    save_clip(model.clip, args.folder / "model.safetensors")  # last: where it is, all is done
    print(f"{args.folder}: {(args.folder / 'model.safetensors').stat().st_size:,} bytes")


if __name__ == "__main__":
    run_script(main)
