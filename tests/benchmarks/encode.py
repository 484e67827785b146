"""How fast images are encoded by ViT-B/16 on a CPU, beside transformers and beside bare matrix products.

    python tests/benchmarks/encode.py            # --batch 16 --repeats 5

All take turns in one process; random weights. “Of the products' rate”: the towers' floating-point operations a second,
divided by those of the linear layers' matrix products alone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers
from turns import machine, take_turns

from build import to_device
from cli import native_precision
from fusion import FusedCLIP
from model import CLIP, CLIPConfig
from settings import Settings

TOKENS, WIDTH, LAYERS = 197, 768, 12


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    pixels, rows = torch.randn(args.batch, 3, 224, 224), args.batch * TOKENS
    shapes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    inputs = {n: torch.randn(rows, n) for n in (WIDTH, 4 * WIDTH)}
    weights, outputs = [torch.randn(*shape) for shape in shapes], {n: torch.empty(rows, n) for n in inputs}

    def products():
        for _ in range(LAYERS):
            for weight in weights:
                torch.mm(inputs[len(weight)], weight, out=outputs[weight.shape[1]])

    config = transformers.CLIPConfig(vision_config={"patch_size": 16}, projection_dim=512)
    peer = transformers.CLIPModel(config).eval()
    ways = {"transformers, float32": lambda: peer.get_image_features(pixel_values=pixels)}
    for precision in dict.fromkeys((torch.float32, native_precision(torch.device("cpu")))):
        name = str(precision).removeprefix("torch.")
        model = FusedCLIP(CLIP(CLIPConfig()).initialize(), 2, "none").requires_grad_(False).eval()
        to_device(model, Settings(data="x", weights="x", steps=1, lr=1.0, precision=name), torch.device("cpu"))
        ways[f"ours, {name}"] = lambda model=model: model.encode_image(pixels)
    linear = 2 * rows * LAYERS * sum(a * b for a, b in shapes)
    all_of_it = linear + 4 * args.batch * LAYERS * TOKENS**2 * WIDTH + 2 * rows * 3 * 16 * 16 * WIDTH
    with torch.inference_mode():
        seconds = take_turns(ways | {"bare products, float32": products}, args.repeats)
    rate, peer_time = linear / seconds["bare products, float32"], seconds["transformers, float32"]
    print(f"batches of {args.batch}; {machine()}, transformers {transformers.__version__}")
    print("| | images/s | of transformers | of the products' rate |\n| --- | --- | --- | --- |")
    for name in ways:
        speed, share = args.batch / seconds[name], all_of_it / seconds[name] / rate
        print(f"| {name} | {speed:.2f} | {peer_time / seconds[name]:.2f}× | {share:.0%} |")


if __name__ == "__main__":
    main()
