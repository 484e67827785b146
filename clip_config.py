"""What the files beside a checkpoint say of its model, which the shapes of its tensors don't show.

Models of the same shapes differ: OpenAI's have QuickGELU, most later ones GELU; heads are 64 or 80 wide; pixels have
another mean, or the picture is squashed. Loaded as another, a model still gives embeddings, only worse ones. So what is
said is used, and what our model can't do is an error that names it.

    config.json, preprocessor_config.json     Hugging Face's, beside its model.safetensors
    open_clip_config.json                     open_clip's, beside its open_clip_model.safetensors

Source: the documented formats of transformers' CLIPConfig and CLIPImageProcessor, and of open_clip's model and
preprocessing configurations.
"""

import sys
from dataclasses import replace
from functools import cache

from errors import UserError, shown
from files import read_json
from images import OPENAI, Preprocessing

WIDE = 1280  # from this width on, models of the same shapes have heads of 64 or of 80
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Described:
    """A JSON file's object, or a part of it, whose errors name the file and the key."""

    def __init__(self, file, values, path=""):
        if not isinstance(values, dict):
            raise UserError(f"{file} has no JSON object{path and ' in ' + path[:-1]}; get it again")
        self.file, self.values, self.path = file, values, path

    def part(self, name):
        """→ the part of that name."""
        found = self.values.get(name)
        return Described(self.file, {} if found is None else found, f"{self.path}{name}.")

    def get(self, name, default=None):
        value = self.values.get(name)
        return default if value is None else value

    def refuse(self, name, why="which our model cannot represent; use another checkpoint"):
        key = f"{self.path}{name}"
        said = f"says {key} = {self.values[name]}" if name in self.values else f"leaves out {key}"
        raise UserError(f"{self.file} {shown(said[:200])}, {why}")

    def expect(self, name, *accepted):
        """What is said must be one of those accepted; nothing may be said, too."""
        if self.get(name) is not None and self.values[name] not in accepted:
            self.refuse(name)

    def number(self, name, default, kind=int):
        value = self.get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, kind))
            or not (1 if kind is int else 0) <= value < 1e6
        ):
            self.refuse(name, "which is no number that fits; get the file again")
        return value

    def colours(self, name, default):
        value = self.get(name, default)
        numbers = isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) and abs(v) < 1e6 for v in value)
        if not numbers or len(value) != 3 or (name.endswith("std") and min(value) <= 0):
            self.refuse(name, "which are no three numbers that fit; get the file again")
        return tuple(map(float, value))

    def agree(self, **numbers):
        """What is said must be what the tensors' shapes say."""
        for name, expected in numbers.items():
            if self.get(name) not in (None, expected, [expected, expected]):
                self.refuse(name, f"but the weights have {expected}; the file belongs to other weights")


def complete(config, folder, openai_names, file):
    """A CLIPConfig read off the tensors' shapes → the same, with what the files in the folder say. openai_names:
    whether the tensors have OpenAI's names, as open_clip's do. Raises UserError where our model can't represent it."""
    theirs = folder / "open_clip_config.json", folder / "config.json"
    pixels = folder / "preprocessor_config.json"
    if theirs[0].is_file() and (openai_names or not theirs[1].is_file()):
        return from_open_clip(config, theirs[0])
    if theirs[1].is_file() and not (openai_names and "architecture" in _read(theirs[1])):  # the latter is timm's
        config = from_transformers(config, theirs[1])
        if pixels.is_file():
            return replace(config, preprocessing=from_processor(config, Described(pixels, read_json(pixels))))
        newer = pixels.with_name("processor_config.json")
        if newer.is_file():
            found = Described(newer, read_json(newer)).part("image_processor")
            return replace(config, preprocessing=from_processor(config, found))
        _note(f"there is no {pixels}; images are prepared as for OpenAI's models")
        return config
    if config.vision_width >= WIDE or config.vision_width % 64 or config.text_width % 64:
        raise UserError(
            f"there is neither config.json nor open_clip_config.json beside {file}, and the widths "
            f"{config.vision_width} and {config.text_width} don't tell how many heads it has; put the one that belongs "
            "to it there"
        )
    _note(
        f"there is no config.json or open_clip_config.json beside {file}; it is taken for a model like OpenAI's: "
        "QuickGELU, heads 64 wide, CLIP's mean and deviation"
    )
    return config


@cache
def _note(text):
    """Print it, once: a training opens its base model twice."""
    print(shown(f"note: {text}"), file=sys.stderr)


def _read(file):
    return Described(file, read_json(file)).values


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face


def from_transformers(config, file):
    """transformers' CLIPConfig, with its defaults for what is left out."""
    stored = Described(file, read_json(file))
    if stored.get("model_type") != "clip":
        raise UserError(f"{file} describes no CLIP, its model_type is {stored.get('model_type')!r}; use another model")
    # Old files have both, and then the latter counts.
    vision, text = (stored.part(n if stored.get(n) else n[:-5]) for n in ("vision_config_dict", "text_config_dict"))
    stored.agree(projection_dim=config.embed_dim)
    vision.agree(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    text.agree(
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
    )
    vision.expect("num_channels", 3)
    # The end token is the one with the highest id; 2 is what files say that were written before anyone looked.
    text.expect("eos_token_id", 2, config.vocab_size - 1)
    widths = []
    for tower, width, usual in ((vision, config.vision_width, 12), (text, config.text_width, 8)):
        tower.expect("hidden_act", "quick_gelu", "gelu")
        heads = tower.number("num_attention_heads", usual)
        if width % heads:
            tower.refuse("num_attention_heads", f"which does not divide the width {width}; get the file again")
        widths.append(width // heads)
    same = {}
    for name, default in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)):
        same[name] = text.get(name, default)
        if vision.get(name, default) != same[name]:
            vision.refuse(name, f"but {text.path}{name} = {same[name]}; our towers have the same one")
    return replace(
        config,
        vision_head_width=widths[0],
        text_head_width=widths[1],
        activation=same["hidden_act"],
        norm_eps=text.number("layer_norm_eps", 1e-5, float),
    )


def from_processor(config, stored):
    """transformers' CLIPImageProcessor, as Described → Preprocessing."""
    size = config.image_size
    for name in ("image_processor_type", "feature_extractor_type"):
        stored.expect(
            name, "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"
        )
    for name in ("do_resize", "do_rescale", "do_normalize"):
        stored.expect(name, True)
    stored.expect("rescale_factor", 1 / 255)
    stored.expect("resample", *RESAMPLE)
    square = {"height": size, "width": size}
    crop = stored.get("do_center_crop", True)
    stored.expect("crop_size", size, square)
    stored.expect("size", *((size, {"shortest_edge": size}) if crop else ()), square)
    frame = "squash" if stored.get("size", size) == square else "crop"
    return Preprocessing(
        frame,
        RESAMPLE[stored.get("resample", 3)],
        stored.colours("image_mean", OPENAI.mean),
        stored.colours("image_std", OPENAI.std),
    )


# ---------------------------------------------------------------------------------------------------------------------
# open_clip

RESIZE_MODES = {"shortest": "crop", "squash": "squash", "longest": "pad"}
# Keys of the towers that are read, or say nothing of a model like ours; the others must be off, or have these values.
READ = {"image_size", "patch_size", "width", "layers", "head_width", "heads", "mlp_ratio", "norm_kwargs"}
READ |= {"context_length", "vocab_size", "patch_dropout", "output_tokens", "eos_id", "attn_pooler_queries"}
READ |= {"attn_pooler_heads", "timm_pool", "timm_proj", "hf_proj_type", "hf_pooler_type", "hf_model_pretrained"}
NEUTRAL = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
NEUTRAL |= {"block_type": ("default",)}


def from_open_clip(config, file):
    """open_clip's open_clip_config.json."""
    whole = Described(file, read_json(file))
    if "model_cfg" not in whole.values:
        raise UserError(f"{file} has no model_cfg; get the one that belongs to the weights")
    model, pixels = whole.part("model_cfg"), whole.part("preprocess_cfg")
    vision, text = model.part("vision_cfg"), model.part("text_cfg")
    model.agree(embed_dim=config.embed_dim)
    vision.agree(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.vision_width,
        layers=config.vision_layers,
    )
    text.agree(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.text_width,
        layers=config.text_layers,
    )
    for part in (vision, text):
        for name in part.values.keys() - READ:
            part.expect(name, *NEUTRAL.get(name, (False, 0, {})))
        part.expect("mlp_ratio", 4)
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
    for name in model.values.keys() - known:
        model.expect(name, False)
    model.expect("custom_text", False)
    model.expect("quick_gelu", True, False)
    width, heads = config.text_width, text.number("heads", 8)
    if width % heads:
        text.refuse("heads", f"which does not divide the width {width}; get the file again")
    head_width = vision.number("head_width", 64)
    if config.vision_width % head_width:
        vision.refuse("head_width", f"which does not divide the width {config.vision_width}; get the file again")
    eps = [part.part("norm_kwargs").number("eps", 1e-5, float) for part in (vision, text)]
    if eps[0] != eps[1]:
        vision.refuse("norm_kwargs", "but the text tower has another one; our towers have the same one")
    return replace(
        config,
        vision_head_width=head_width,
        text_head_width=width // heads,
        activation="quick_gelu" if model.get("quick_gelu", False) else "gelu",
        norm_eps=eps[0],
        preprocessing=_open_clip_pixels(pixels, config.image_size),
    )


def _open_clip_pixels(pixels, size):
    for name in pixels.values.keys() - {"mean", "std", "interpolation", "resize_mode", "size", "mode", "fill_color"}:
        pixels.expect(name)
    pixels.expect("mode", "RGB")
    pixels.expect("fill_color", 0)
    pixels.expect("size", size, [size, size], [3, size, size])
    pixels.expect("interpolation", "bicubic", "bilinear")
    pixels.expect("resize_mode", *RESIZE_MODES)
    return Preprocessing(
        RESIZE_MODES[pixels.get("resize_mode", "shortest")],
        pixels.get("interpolation", "bicubic"),
        pixels.colours("mean", OPENAI.mean),
        pixels.colours("std", OPENAI.std),
    )
