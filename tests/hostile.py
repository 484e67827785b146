"""Damaged and hostile inputs, made at random: flags, images, manifests, JSON, weights, runs, merges and indexes.

`Hostile(fixtures).case(kind, seed)` gives one to a script, or to the function that reads it, and says how that ended.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ablate
import classify
import evaluate
import explain
import retrieve
import train
import trust
from build import load_base
from data import load_dataset
from errors import run_script
from images import FRAMES, Preprocessing, load_image, look, preprocess, to_square
from lora import add_lora
from peft_format import save_adapter
from pictures import thumbnail
from prompts import class_prompts
from settings import Settings
from splits import make_splits
from tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "weights"))

import download
import export
from export import to_open_clip, to_transformers

TEXTS = (
    "",
    " ",
    "nan",
    "inf",
    "-1",
    "0",
    "1e999",
    "-1e-999",
    "9" * 5000,
    "٣",
    "\udcff",
    "../x",
    "/dev/null",
    "/dev/zero",
)
TEXTS += ("a" * 5000, "-", "--", "1,2,,3", ",", "1/0", "0/5", "6/5", "1/5", "scratch", "cuda:99", "meta", "cpu:7", "[]")
TEXTS += (
    "{}",
    "a\nb",
    "\x1b[31mred",
    "nowhere/x",
    "1_0",
    "0x10",
    "½",
    "True",
    "None",
    "q,q",
    "left",
    "http://a.b",
    "x.png",
)
VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    1e308,
    -0.5,
    10**30,
    10**400,
    "",
    "nan",
    "\ud800",
    "../..",
    "/etc/passwd",
    "/dev/zero",
)
VALUES += ("x" * 100_000, [], {}, [[]], [None], ["a", "a"], {"a": 1}, [1] * 1000, "phantom", "scratch", 3.5, "C:\\x")
NUMBERS = (b"0", b"-1", b"4294967296", b"99999999999999999999", b"1e9", b"NaN", b"null", b"[]", b'"')


def mutate(content, rng, among=None):
    """Bytes → other bytes; among: only the first so many are changed."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        size = min(len(content), among or len(content))
        at = rng.randrange(size + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, size // 3))
        what = rng.randrange(7)
        if what == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            content[at : at + length] = rng.randbytes(length)
        elif what == 2:
            del content[at : at + length]
        elif what == 3:
            content[at:at] = content[rng.randrange(size + 1) :][:length]
        elif what == 4:
            content[at : at + length] = rng.choice((b"\0", b"\xff", b"\n", b",", b'"', b";", b"{", b"]")) * length
        elif what == 5:
            content[at : at + rng.randrange(4)] = rng.choice(NUMBERS)
        elif what == 6 and rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def mutate_json(value, rng):
    """A JSON value → another one, different at one place or at a few."""
    if rng.random() < 0.02:
        return nested(rng.choice((3, 100)))
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, value = rng.choice(list(value)), dict(value)
        what = rng.random()
        if what < 0.05:
            del value[key]
        elif what < 0.1:
            value[rng.choice(("", "a", "\ud800", key + "x", key.upper()))] = value.pop(key)
        else:
            value[key] = mutate_json(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.9:
        at, value = rng.randrange(len(value)), list(value)
        what = rng.random()
        if what < 0.1:
            del value[at]
        elif what < 0.2:
            value.insert(at, rng.choice(value))
        else:
            value[at] = mutate_json(value[at], rng)
        return value
    return rng.choice(VALUES)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def odd_json(content, rng):
    """JSON text → other text, most often valid."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = mutate_json(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = mutate(text, rng)
    return b"[" * 100_000 if rng.random() < 0.005 else text


class Hostile:
    """fixtures: a folder for what is made here once. pictures, base, run: as tests/conftest.py has them."""

    KINDS = ("flags", "images", "manifest", "entrep", "prompts", "weights", "configs", "merges", "metadata", "resume")
    KINDS += ("index", "queries", "report")

    def __init__(self, fixtures, pictures, base, run):
        self.pictures, self.base, self.run = Path(pictures), Path(base), Path(run)
        self.drawn, self.place = list(self.draw()), Path(fixtures)
        self.number = 0
        trust.NAMED = self.place / "named-paths.json"
        trust.NAMED.write_text(json.dumps([str(base), str(pictures), f"{pictures}/manifest.csv"]))
        download.time = type(
            "Clock", (), {"sleep": staticmethod(lambda s: None), "monotonic": staticmethod(lambda: 0.0)}
        )

    def draw(self):
        """Yield (suffix, content) of small images of every kind that the formats know."""
        generator = np.random.default_rng(0)
        rgb = Image.fromarray(generator.integers(0, 256, (33, 47, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        rgba, grey16 = rgb.convert("RGBA"), Image.fromarray(generator.integers(0, 65536, (9, 9)).astype(np.uint16))
        kinds = [("jpg", rgb, {"exif": exif}), ("jpg", rgb.convert("CMYK"), {}), ("jpg", rgb, {"progressive": True})]
        kinds += [
            ("png", image, {}) for image in (rgb, rgba, rgb.convert("P"), rgb.convert("1"), rgb.convert("LA"), grey16)
        ]
        kinds += [("bmp", rgb, {}), ("gif", rgb, {"save_all": True, "append_images": [rgb, rgb]})]
        kinds += [("tif", image, {"compression": how}) for image in (rgb, grey16, rgba) for how in (None, "tiff_lzw")]
        kinds += [
            ("tif", Image.fromarray(generator.random((9, 9), np.float32)), {}),
            ("png", Image.new("L", (1, 5000)), {}),
        ]
        kinds += [("webp", rgb, {}), ("webp", rgba, {"save_all": True, "append_images": [rgba], "lossless": True})]
        for suffix, image, options in kinds:
            file = io.BytesIO()
            image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
            yield suffix, file.getvalue()

    def case(self, kind, seed):
        """→ exit status, and what went to standard error: an exception that is no mistake of the user's comes out."""
        rng = random.Random(f"{kind} {seed}")
        self.number += 1
        folder = self.place / f"{kind}-{self.number}"
        folder.mkdir()
        before, arguments, output, errors, status = os.getcwd(), sys.argv, io.StringIO(), io.StringIO(), 0
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                try:
                    getattr(self, kind)(rng, folder)
                except SystemExit as end:
                    status = end.code
        finally:
            os.chdir(before)
            sys.argv = arguments
            shutil.rmtree(folder)
        return status, errors.getvalue()

    def script(self, module, *arguments):
        sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
        run_script(module.main)

    def flags(self, rng, folder):
        training = ["--data", self.pictures / "manifest.csv", "--weights", self.base, "--steps", 1]
        module, given = rng.choice(
            [
                (train, [*training, "--run", "r"]),
                (classify, ["--run", self.run, self.pictures / "images/half-left/0.png"]),
                (retrieve, ["--run", self.run, "--data", self.pictures / "images/half-left", "--text", "red"]),
                (evaluate, ["--run", self.run, "--data", self.pictures / "images"]),
                (explain, ["--run", self.run, self.pictures / "images/half-left/0.png"]),
                (export, [self.run, folder / "out"]),
                (ablate, [*training, "--vary", "slerp=0", "--seeds", 0, "--folder", folder / "ablation"]),
                (download, ["--folder", folder / "weights", "--endpoint", "http://127.0.0.1:9"]),
            ]
        )
        help_text = io.StringIO()
        with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
            sys.argv = [module.__name__, "--help"]
            module.main()
        known = sorted({word for word in help_text.getvalue().replace(",", " ").split() if word.startswith("--")})
        given += ["--device", "cpu", "--workers", 0] if module not in (download, export) else []
        for _ in range(rng.choice((1, 1, 2))):
            flag = rng.choice([f for f in known if f not in ("--help", "--steps", "--compile")] + ["--unknown"])
            given += rng.choice([[flag, rng.choice(TEXTS)], [f"{flag}={rng.choice(TEXTS)}"], [flag]])
        self.script(module, *given)

    def images(self, rng, folder):
        suffix, content = rng.choice(self.drawn)
        file = folder / f"x.{suffix}"
        file.write_bytes(mutate(content, rng, rng.choice((None, 64, 256))))

        def read():
            image = load_image(file)
            to_square(image, 32, Preprocessing(rng.choice(FRAMES)))
            look(image)
            thumbnail(file)

        run_script(read)

    def manifest(self, rng, folder):
        text = (self.pictures / "manifest.csv").read_bytes()
        text = text.replace(b"images/", f"{self.pictures}/images/".encode())
        suffix = rng.choice((".csv", ".csv", ".jsonl"))
        if suffix == ".jsonl":
            header, *rows = (line.split(",") for line in text.decode().replace(", ", " ").replace('"', "").splitlines())
            lines = [json.dumps(dict(zip(header, row, strict=True))).encode() for row in rows]
            at = rng.randrange(len(lines))
            lines[at] = odd_json(lines[at], rng)
            text = b"\n".join(lines)
        else:
            text = text.replace(b",", rng.choice((b",", b",", b";", b"\t")))
        file = folder / f"m{suffix}"
        file.write_bytes(mutate(text, rng) if rng.random() < 0.7 else text)
        how = rng.choice(("auto", "random", "group", "manifest"))
        settings = Settings(data=str(file), weights="phantom", steps=1, lr=1e-3, split=how, skip_bad=rng.random() < 0.5)
        run_script(lambda: print(make_splits(settings, 0)[1]))

    def entrep(self, rng, folder):
        files = {"train/cls.json": {"a.png": "nose-right", "b.png": 6}, "train/t2i.json": {"a polyp": "a.png"}}
        entry = {"Path": "c.png", "Classification": "ear-left", "Description": "tai trái", "DescriptionEN": "left ear"}
        files["public/data.json"] = [entry, {**entry, "Path": "d.png"}]
        for name in ("train/imgs/a.png", "train/imgs/b.png", "public/images/c.png", "public/images/D.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        chosen = rng.choice(list(files))
        for name, content in files.items():
            text = json.dumps(content).encode()
            (folder / name).write_bytes(odd_json(text, rng) if name == chosen else text)
        run_script(lambda: load_dataset(folder))

    def prompts(self, rng, folder):
        file = folder / "prompts.json"
        file.write_bytes(odd_json(b'{"a": ["one", "two"], "b": ["three"]}', rng))
        tokenizer = Tokenizer(self.base)
        run_script(lambda: [tokenizer(texts, 77) for texts in class_prompts(["a", "b"], file).values()])

    def weights(self, rng, folder):
        content = (self.base / "model.safetensors").read_bytes()
        size, file = 8 + int.from_bytes(content[:8], "little"), folder / "model.safetensors"
        what = rng.random()
        if what < 0.5:
            save_file(self.odd_tensors(load_file(self.base / "model.safetensors"), rng), file)
            content = file.read_bytes()
        elif what < 0.8:
            header = odd_json(content[8:size], rng)
            content = len(header).to_bytes(8, "little") + header + content[size:]
        else:
            content = mutate(content, rng, rng.choice((8, size, None)))
        file.write_bytes(content)
        shutil.copy(self.base / "merges.txt", folder)
        run_script(lambda: load_base(str(folder)))

    def odd_tensors(self, tensors, rng):
        """One or two tensors of another shape, type, name or value, or none of that name at all."""
        for name in rng.sample(sorted(tensors), rng.choice((1, 1, 2))):
            tensor = tensors.pop(name)
            shape = [rng.choice((size, size, 0, 1, 2, size + 1, 2 * size)) for size in tensor.shape]
            dtype = rng.choice((torch.int64, torch.bool, torch.bfloat16, torch.float64, torch.float8_e5m2, torch.uint8))
            spoilt = tensor.clone()
            spoilt.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), 6e4))
            odd = [torch.zeros(shape), tensor.to(dtype), spoilt, tensor.flatten(), tensor[None], tensor.sum()]
            renamed = name.replace(".0.", f".{rng.choice((1, 7, 999_999_999))}.") + rng.choice(("", "x"))
            tensors |= rng.choice([{}, {renamed: tensor}, *({name: changed} for changed in odd)])
        return tensors

    def configs(self, rng, folder):
        """What stands beside the weights: configurations, or an adapter."""
        for name in ("model.safetensors", "merges.txt"):
            shutil.copy(self.base / name, folder)
        config, pixels = to_transformers(load_base(str(self.base))[0].config)
        files = {"config.json": config, "preprocessor_config.json": pixels}
        if rng.random() < 0.4:
            files = {"open_clip_config.json": to_open_clip(load_base(str(self.base))[0].config)}
        elif rng.random() < 0.4:
            settings = Settings(data="x", weights="x", steps=1, lr=1.0, lora_rank=2)
            clip = load_base(str(self.base))[0]
            add_lora(clip, 2)
            save_adapter(clip, settings, folder, "x", "0")
            files = {"adapter_config.json": json.loads((folder / "adapter_config.json").read_text())}
            if rng.random() < 0.5:
                tensors = load_file(folder / "adapter_model.safetensors")
                save_file(self.odd_tensors(tensors, rng), folder / "adapter_model.safetensors")
        chosen = rng.choice(list(files))
        for name, content in files.items():
            text = json.dumps(content).encode()
            (folder / name).write_bytes(odd_json(text, rng) if name == chosen else text)

        def use():
            clip, _ = load_base(str(folder))
            image = Image.new("RGB", (rng.randrange(1, 99), rng.randrange(1, 99)))
            clip.encode_image(preprocess(image, clip.config.image_size, clip.config.preprocessing)[None])

        run_script(use)

    def queries(self, rng, folder):
        text = "a.png\n0.png\n" if rng.random() < 0.5 else 'a shape, "red"\n"quoted, too"\nanother\n'
        (folder / "q.csv").write_bytes(mutate(text.encode(), rng))
        tool = rng.choice((classify, retrieve))
        flags = ["--run", self.run, "--data", self.pictures / "images/half-left", "--queries", "q.csv", "--workers", 0]
        self.script(tool, *flags)

    def merges(self, rng, folder):
        shutil.copy(self.base / "model.safetensors", folder)
        (folder / "merges.txt").write_bytes(mutate((self.base / "merges.txt").read_bytes(), rng))

        def read():
            _, tokenizer = load_base(str(folder))
            tokenizer("red and green shapes")

        run_script(read)

    def odd_file(self, rng, file):
        """Other metadata, or in one of five cases some other bytes."""
        if rng.random() < 0.8:
            with safe_open(file, "pt") as f:
                info = f.metadata()["info"].encode()
            text = odd_json(info, rng).decode("utf-8", "replace")
            save_file(load_file(file), file, metadata={"info": text} if rng.random() < 0.98 else None)
        else:
            file.write_bytes(mutate(file.read_bytes(), rng, rng.choice((8, 2000, None))))

    def metadata(self, rng, folder):
        shutil.copytree(self.run, folder / "run")
        self.odd_file(rng, folder / "run/adapter.safetensors")
        self.script(classify, "--run", "run", self.pictures / "images/half-left/0.png", "--workers", 0)

    def resume(self, rng, folder):
        shutil.copytree(self.run, folder / "run")
        self.odd_file(rng, folder / "run/last.safetensors")
        for name in ("split.csv", "metrics.jsonl", "metrics.json"):
            file = folder / "run" / name
            if rng.random() < 0.2:
                file.write_bytes(mutate(file.read_bytes(), rng))
        if rng.random() < 0.8:
            (folder / "run/metrics.json").unlink()
        self.script(train, "--resume", "--run", "run", "--workers", 0)

    def index(self, rng, folder):
        shutil.copytree(self.run, folder / "run")
        flags = ["--run", "run", "--data", self.pictures / "images/half-left", "--text", "red", "--workers", 0]
        self.script(retrieve, *flags)
        lines, (rows,) = folder / "run/index.jsonl", (folder / "run").glob("*.f16")
        if rng.random() < 0.8:  # some of its lines, and odd ones
            content = lines.read_bytes().splitlines()
            for place in rng.sample(range(len(content)), rng.choice((1, 1, 3))):
                content[place] = odd_json(content[place], rng) if rng.random() < 0.8 else rng.choice(content)
            lines.write_bytes(b"".join(line + b"\n" for line in content))
        else:
            file = rng.choice((lines, rows))
            file.write_bytes(mutate(file.read_bytes(), rng, rng.choice((8, 2000, None))))
        self.script(retrieve, *flags)

    def report(self, rng, folder):
        """What a finished run leaves for its readers, damaged."""
        shutil.copytree(self.run, folder / "run")
        file = folder / "run" / rng.choice(("calibration.safetensors", "metrics.json", "metrics.jsonl", "overview.txt"))
        content = file.read_bytes()
        if file.suffix.startswith(".json") and rng.random() < 0.8:
            lines = content.splitlines() if file.suffix == ".jsonl" else [content]
            lines[rng.randrange(len(lines))] = odd_json(rng.choice(lines), rng)
            file.write_bytes(b"\n".join(lines))
        else:
            file.write_bytes(mutate(content, rng, rng.choice((8, 2000, None))))
        flags = ["--run", "run", "--data", self.pictures / "images", "--workers", 0, "--device", "cpu"]
        self.script(evaluate, *flags, "--report", "report.html")
        self.script(retrieve, *flags, "--text", "red")
        self.script(classify, *flags[:2], self.pictures / "images/half-left/0.png", "--workers", 0, "--device", "cpu")
