"""The settings of a training run: their meaning, types, ranges and defaults, in one place.

Each field of `Settings` is a flag of train.py. Values are checked alike, whether they come from a command line or from
a run's file.
"""

import math
from argparse import Namespace
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from checkpoint import NAMES, base_folder
from cli import find_precision, name_of, typed
from errors import UserError
from fusion import MODES
from images import FRAMES
from lora import PROJECTIONS, TOWERS

# Peak learning rate and steps by what is trained: adapters on good features, all of a good model, all of a new one;
# adapters of the small model (weights/phantom) on phantoms.
DEFAULTS = {"adapters": (5e-4, 400), "full": (1e-5, 400), "scratch": (1e-3, 1000), "phantom": (2e-3, 200)}


def setting(kind, help, default=MISSING, low=-math.inf, high=math.inf, choices=None, listed=False):
    """A field of `Settings`. kind: bool, int, float or str; listed: a tuple of them, a flag with commas; low and high:
    the range, both included."""
    expected = {"kind": kind, "low": low, "high": high, "choices": choices, "listed": listed}
    return field(default=default, metadata={"help": help, "expected": expected})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides a training, beside the images and the prompts. Kept in the run's metadata. Raises UserError
    where a value is of the wrong type or out of its range."""

    data: str = setting(str, "folder with a sub-folder for each class, manifest, ENTRep folder, or phantom", "phantom")
    weights: str = setting(
        str,
        f"base model: {', '.join(NAMES)}, scratch (a new small model), or a path to CLIP weights, to a PEFT adapter or "
        "to a run, which is trained further; default: phantom for --data phantom, else clip-vit-b-16",
    )
    split: str = setting(
        str,
        "auto: by the manifest's split column, else its groups, else at random",
        "auto",
        choices=("auto", "random", "group", "manifest"),
    )
    fold: str | None = setting(
        str,
        "hold out part k of n instead of a fifth, like 1/5, for cross-validation; not with the manifest's split",
        None,
    )
    duplicates: str = setting(
        str,
        "together: keep copies of a picture, also resized or compressed ones, on one side of the split; ignore: don't "
        "look for them",
        "together",
        choices=("together", "ignore"),
    )
    skip_bad: bool = setting(
        bool, "leave out images that cannot be read; without it, one such image stops the training", False
    )
    seed: int = setting(int, "fixes the split and everything random", 0, low=0, high=2**31 - 1)
    batch_size: int = setting(int, "images in a step, at most", 32, low=1, high=2**16)
    steps: int = setting(
        int,
        "batches to train on, however many images there are; default: 400, from scratch 1000, on phantoms 200",
        low=1,
        high=10**9,
    )
    lr: float = setting(
        float,
        "peak learning rate; default: 5e-4 for adapters (2e-3 on phantoms), 1e-5 with --full, 1e-3 from scratch",
        low=0,
        high=1000,
    )
    weight_decay: float = setting(float, "AdamW's, on matrices", 0.05, low=0, high=1000)
    warmup: float = setting(
        float, "share of the steps over which the learning rate rises to its peak", 0.1, low=0, high=1
    )
    precision: str = setting(
        str,
        "what the towers multiply matrices in; auto: what the device does fastest, kept with the run; the loss is "
        "always computed in float32",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    flip: str = setting(
        str,
        "swap: mirror images, and swap left and right in their texts; none: don't mirror; naive: mirror, but leave the "
        "texts as they are, which is wrong",
        "swap",
        choices=("swap", "none", "naive"),
    )

    frame: str | None = setting(
        str,
        "how a picture becomes a square. crop: its middle; pad: all of it, with bars; squash: all of it, out of "
        "proportion; field: the scope's bright field, padded; default: as the base model was trained, mostly crop",
        None,
        choices=FRAMES,
    )

    # From here on the method; `add_settings` puts these flags in a group of their own.
    fusion: str = setting(str, "how levels are fused, see fusion.py", "concat", choices=(*MODES, "none"))
    levels: tuple[int, ...] | None = setting(
        int,
        "blocks whose CLS tokens are fused; default: those at the quarters of the depth",
        None,
        low=1,
        high=1000,
        listed=True,
    )
    slerp: float = setting(float, "probability of mixing an embedding with another of its class", 0.5, low=0, high=1)
    contrastive: float = setting(float, "weight λ of the contrastive loss", 0.5, low=0, high=1000)
    full: bool = setting(bool, "train every weight instead of adapters; always so from scratch", False)
    lora_rank: int = setting(int, "dimensions of each adapter; 0: no adapters", 8, low=0, high=4096)
    lora_alpha: float = setting(float, "the adapters' output is scaled by alpha / rank", 16.0, low=0, high=1e6)
    lora_dropout: float = setting(float, "share of the adapters' inputs that is zeroed", 0.0, low=0, high=1)
    lora_projections: tuple[str, ...] = setting(
        str, f"of {', '.join(PROJECTIONS)}", ("q", "k", "v", "out"), choices=tuple(PROJECTIONS), listed=True
    )
    lora_blocks: tuple[int, ...] | None = setting(
        int, "block numbers from 1 on; default: all", None, low=1, high=1000, listed=True
    )
    lora_towers: tuple[str, ...] = setting(str, f"of {', '.join(TOWERS)}", TOWERS, choices=TOWERS, listed=True)

    def __post_init__(self):
        for f in fields(self):
            value, expected = getattr(self, f.name), f.metadata["expected"]
            if value is None and f.default is None:
                continue
            items = value if expected["listed"] else (value,)
            fits = isinstance(items, tuple) and items and all(_fits(item, **expected) for item in items)
            if not fits or len(set(items)) < len(items):
                given = ",".join(map(str, value)) if isinstance(value, tuple) and value else repr(value)
                raise UserError(f"{_flag(f)} should be {_describe(**expected)}, not {given[:200]}")

    @classmethod
    def from_flags(cls, args, device):
        """The parsed flags, with paths made absolute and what was left out filled in. Raises UserError where the device
        does not know the precision."""
        given = {f.name: getattr(args, f.name) for f in fields(cls)}
        data = args.data if args.data == "phantom" else str(Path(args.data).resolve())
        weights = args.weights or ("phantom" if data == "phantom" else "clip-vit-b-16")
        scratch, full = weights == "scratch", args.full or weights == "scratch"
        small = data == weights == "phantom"
        lr, steps = DEFAULTS["scratch" if scratch else "full" if full else "phantom" if small else "adapters"]
        if not scratch and base_folder(weights) == Path(weights):  # a path, not a name
            weights = str(Path(weights).resolve())
        native, precision = (name_of(find_precision(name, device)) for name in ("auto", args.precision))
        if args.precision not in ("auto", precision):
            raise UserError(f"--precision {args.precision}: {device} computes in {native} here; leave it out")
        given |= {"data": data, "weights": weights, "full": full, "precision": precision}
        given |= {"lr": lr} if args.lr is None else {}
        given |= {"steps": steps} if args.steps is None else {}
        return cls(**given)


def add_settings(parser):
    """Add a flag for each field of `Settings`, in two groups. One without a default gives None where it is left out."""
    add = parser.add_argument_group("training").add_argument
    for f in fields(Settings):
        if f.name == "fusion":
            add = parser.add_argument_group("method").add_argument
        expected, default = f.metadata["expected"], None if f.default is MISSING else f.default
        options, read = {"help": f.metadata["help"], "default": default}, typed(expected["kind"])
        if expected["kind"] is bool:
            options["action"] = "store_true"
        elif expected["listed"]:

            def listed(text, read=read):
                return tuple(read(item) for item in text.split(","))

            options |= {"type": listed, "default": default and ",".join(default), "metavar": "A,B,…"}
        else:
            options |= {"type": read, "choices": expected["choices"]}
        add(_flag(f), **options)


def given_settings(parser):
    """→ {name: value} of the settings that stand on the command line, be it with their defaults."""
    blank = Namespace(**{f.name: None for f in fields(Settings)})  # argparse fills in defaults where nothing stands yet
    args = parser.parse_args(namespace=blank)
    given = {f.name: getattr(args, f.name) for f in fields(Settings)}
    return {name: value for name, value in given.items() if value is not None}


def refuse_idle(given, settings):
    """Raise UserError where a flag that was given does nothing beside another one."""
    if settings.full or not settings.lora_rank:
        why = "--lora-rank 0" if not settings.lora_rank else "--full" if "full" in given else "--weights scratch"
        idle = [name for name in given if name.startswith("lora_") and (name != "lora_rank" or settings.lora_rank)]
        _refuse(idle, why)
    if settings.fusion == "none":
        _refuse([name for name in given if name == "levels"], "--fusion none")


def _refuse(idle, why):
    if idle:
        raise UserError(f"--{idle[0].replace('_', '-')} has no effect with {why}; leave one of them out")


def _flag(f):
    return "--" + f.name.replace("_", "-")


def _fits(item, kind, low, high, choices, **_):
    if isinstance(item, bool) or kind is bool:
        return isinstance(item, bool) and kind is bool
    if kind is str:
        return isinstance(item, str) and item.strip() != "" and (choices is None or item in choices)
    return isinstance(item, (int, float) if kind is float else int) and low <= item <= high


def _describe(kind, low, high, choices, listed):
    noun = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    if choices:
        noun = f"one of {', '.join(choices)}"
    elif high < math.inf:
        noun += f" from {low:,} to {high:,}"
    return f"{noun}; or several, each once, with commas between them" if listed else noun
