"""CLIP's tokenizer by hand: byte-level byte-pair encoding (BPE).

A text is cleaned, split into words, and every word is spelled in bytes: no text is ever "unknown". Then neighbours are
glued together, pair by pair, as a list of *merges* says. With CLIP's merges:

    tonsil  →  t o n s i l</w>  →  t on s i l</w>  →  t on si l</w>  →  ton si l</w>  →  ton sil</w>      (two ids)

`</w>` marks a word's end, so that "ear" and the start of "early" are different symbols. The merges were learned once,
from a large text: glue the pair that is most frequent in it, count again, and so on (`learn_merges`). To encode a word,
they are applied in the order in which they were learned, first come, first glued (`Tokenizer`). So frequent words end
as one symbol, rare ones as several.

Source: Sennrich et al. (arXiv 1508.07909); the behaviour matched is that of github.com/openai/CLIP,
clip/simple_tokenizer.py.

Try changing this: learn 0 merges in `main`: every word becomes a symbol for each letter. Learn from "thanh quản" too
(twice, as a pair that occurs once is not worth a symbol), and its ten symbols become two.
"""

import gzip
import html
import zlib
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch

from errors import UserError, reason
from files import write_text

START, END = "<|startoftext|>", "<|endoftext|>"
LONGEST_FILE = 2**24  # bytes; CLIP's merges have 524,619
LONGEST_TEXT, LONGEST_WORD = 20_000, 500  # in characters; what is beyond would be cut anyway, after minutes
CLIP_MERGES = 48894  # OpenAI's .txt.gz lists more merges than CLIP uses; 512 symbols + merges + 2 special = 49,408
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def byte_symbols():
    """A printable character for each of the 256 bytes, in the order of CLIP's vocabulary: printable Latin-1 characters
    stand for themselves, the other bytes borrow the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_SYMBOLS = byte_symbols()


def clean(text):
    """Mend broken Unicode, undo HTML escapes (twice: `&amp;amp;` occurs), fold white space, lower the case."""
    text = text[:LONGEST_TEXT].encode("utf-8", "replace").decode()  # half a character, as in names of files: ?
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def spell(word):
    """A word → its bytes' symbols, the last one marked as the word's end."""
    symbols = [BYTE_SYMBOLS[b] for b in word.encode("utf-8")]
    return (*symbols[:-1], symbols[-1] + "</w>")


def merge(symbols, pair):
    """Glue every occurrence of `pair`, left to right."""
    merged, i = [], 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


class Tokenizer:
    """`Tokenizer(path)(texts)`: str or list of str → (B, context_length) int64, [start, …, end, 0, 0, …].

    path: a merges.txt (a pair of symbols a line), OpenAI's bpe_simple_vocab_16e6.txt.gz, or a folder with one of them.
    Raises UserError where there is neither.
    """

    def __init__(self, path):
        path = Path(path)
        names = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz")
        candidates = [path / name for name in names] if path.is_dir() else [path]
        file = next((f for f in candidates if f.is_file()), None)
        if file is None:
            raise UserError(f"there is no {names[0]} in {path}; put the one that belongs to the weights there")
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as f:
                text = f.read(LONGEST_FILE + 1)
            if len(text) > LONGEST_FILE:
                raise ValueError(f"more than {LONGEST_FILE:,} bytes")
            lines = [line.split() for line in text.decode("utf-8").split("\n")[1:]]  # the first line is a version
        except (OSError, EOFError, zlib.error, ValueError) as problem:
            raise UserError(
                f"cannot read the merges {file} ({reason(problem)}); put those that belong to the weights there"
            ) from None
        merges = [tuple(pair) for pair in lines if len(pair) == 2][:CLIP_MERGES]

        base = list(BYTE_SYMBOLS.values())
        vocabulary = base + [s + "</w>" for s in base] + ["".join(pair) for pair in merges] + [START, END]
        self.ids = {symbol: i for i, symbol in enumerate(vocabulary)}
        if len(self.ids) < len(vocabulary):
            raise UserError(f"{file} makes a symbol twice; put the merges.txt that belongs to the weights there")
        self.symbols = vocabulary
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.encode_word = lru_cache(maxsize=2**16)(self._encode_word)  # words repeat: most are looked up, not merged

    def __len__(self):
        return len(self.symbols)

    def _encode_word(self, word):
        if word in (START, END):
            return [self.ids[word]]
        symbols = spell(word)
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            symbols = merge(symbols, best)
        return [self.ids[s] for s in symbols]

    def encode(self, text):
        """Text → list of ids, of any length, without start and end."""
        return [i for word in WORD.findall(clean(text)) for i in self.encode_word(word[:LONGEST_WORD])]

    def decode(self, ids):
        """Ids → text. Start, end and padding leave no trace; case and spacing are as cleaned for encoding."""
        symbols = [self.symbols[i] for i in ids]
        if END in symbols:  # what follows is padding
            symbols = symbols[: symbols.index(END)]
        text = "".join(s for s in symbols if s != START).replace("</w>", " ")
        byte = {symbol: b for b, symbol in BYTE_SYMBOLS.items()} | {" ": ord(" ")}
        return bytes(byte[c] for c in text).decode("utf-8", errors="replace").strip()

    def __call__(self, texts, context_length=77):
        """A text that is too long is cut, with its end token kept: that is where the model reads the text's feature."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.ids[START], *self.encode(text)[: context_length - 2], self.ids[END]]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def learn_merges(texts, count):
    """Learn up to `count` BPE merges from texts: glue the most frequent pair, count again. → list of symbol pairs.
    For models trained from scratch; a pair that occurs once is not worth a symbol."""
    words = Counter(spell(word) for text in texts for word in WORD.findall(clean(text)))
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for symbols, n in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)  # ties by spelling: the same every run
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = Counter({merge(symbols, best): n for symbols, n in words.items()})
    return merges


def save_merges(merges, file):
    """Write merges as `Tokenizer` reads them."""
    write_text(file, "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def main():
    import tempfile

    texts = ["a polyp on the left vocal fold", "a nasal polyp", "polyps of both vocal folds", "the left nasal cavity"]
    with tempfile.TemporaryDirectory() as folder:
        merges = learn_merges(texts, 30)
        save_merges(merges, Path(folder, "merges.txt"))
        tokenizer = Tokenizer(folder)
    print(f"{len(merges)} merges learned from {len(texts)} captions; the first: {', '.join(map('+'.join, merges[:8]))}")
    for text in ("a polyp", "Polyps &amp; NASAL   folds", "thanh quản"):
        ids = tokenizer.encode(text)
        print(f"{text!r} → {' '.join(tokenizer.symbols[i] for i in ids)} → {ids} → {tokenizer.decode(ids)!r}")
    print("as the model takes it:", tokenizer("a polyp", context_length=8).tolist())


if __name__ == "__main__":
    main()
