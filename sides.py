"""Left and right in words: what mirroring an image does to its class and caption.

The mirror image of a left ear is a right one. So the classes left and right change places, and so do the words of a
caption; "5 o'clock" becomes "7 o'clock". What cannot be understood for certain is not guessed at: `mirror_label` and
`mirror_text` answer None, and the image is not mirrored. That costs a little variety; a wrong guess would teach a model
to confuse the sides.

Try changing this: take "droit" out of WORDS, and `main` mirrors "nez-droit" as itself, the mistake to be avoided.
"""

import unicodedata

import regex

# left, right, and what may follow: English, Vietnamese, German, French, Spanish, Portuguese, Italian, Latin, Russian,
# Chinese and Japanese. If several lines fit, the first counts.
WORDS = (
    ("left", "right", ""),
    ("trái", "phải", ""),
    ("link", "recht", "s|e[mnrs]?|sseitige?[mnrs]?"),
    ("gauche", "droite", "s?"),
    ("gauche", "droit", "s?"),
    ("izquierd", "derech", "[oa]s?"),
    ("esquerd", "direit", "[oa]s?"),
    ("sinistr", "destr", "[aeio]"),
    ("sinister", "dexter", ""),
    ("sinistr", "dextr", "[aeiou][ems]?"),
    ("лев", "прав", r"(?!ил|д)\p{L}{1,14}"),
    ("слева", "справа", ""),
    ("左", "右", ""),
)
SIDES = [(regex.compile(f"({left}|{right})({end})"), left, right) for left, right, end in WORDS]
# In names of classes only, as in a sentence "as" is mostly no left ear (auris sinistra), and "trai" may mean a boy.
ABBREVIATIONS = {"l": "r", "lt": "rt", "lft": "rgt", "lhs": "rhs", "os": "od", "as": "ad", "sx": "dx", "sn": "dx"}
ABBREVIATIONS |= {"sin": "dex", "li": "re", "izq": "der", "izda": "dcha", "izdo": "dcho", "esq": "dir", "trai": "phai"}
LETTERS = {"lr", "gd", "ed", "id", "sd", "tp"}  # LVF and RVF, oreille G and D, OE and OD, tai T and P
GLUE = r"left|right|links|rechts|linke[nrs]?|rechte[nrs]?|gauche|droite|izquierd[ao]|derech[ao]|trai|phai"
GLUED = regex.compile(rf"(?!upright)(?:(?:{GLUE})\p{{L}}{{2,}}|\p{{L}}{{2,}}(?:{GLUE}))")  # "leftear"
# The pieces of a name: LeftEar_2 → Left, Ear, 2.
PIECE = regex.compile(r"\p{Han}|\p{Lu}+(?=\p{Lu}\p{Ll})|\p{Lu}?\p{Ll}+|\p{Lu}+|[\p{Lo}--\p{Han}]+|\p{N}+", regex.V1)

LONGEST = 1000  # characters of a caption that is looked through
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
HOUR = rf"(?P<hour>\d{{1,2}}(?::[0-5]\d)?|{'|'.join(NUMBERS)})"
UNIT = r"\s*+-?\s*+(?:o[\s,-]?['’‘ʼ`´]?\s?clock|uhr|giờ)(?!\p{L})"
RANGE, CONJUNCTION = r"-|–|—|to|bis|đến", r"/|&|and|or|und|oder|và|hoặc"
GRADED = r"(?<!\b(?:grade|stage|type|level|class|score|size|grad|stadium|typ|độ)\s*)(?<![\p{L}\p{N}.:])"
JOIN = rf"(?P<join>{RANGE}|,\s*+(?:and|or|und|và)|,|{CONJUNCTION})"
CLOCK = regex.compile(rf"{GRADED}{HOUR}(?:(?:{UNIT})?\s*+{JOIN}\s*+{HOUR})*{UNIT}", regex.I)
# What may join two hours to a range in a way that is not known here.
BETWEEN = regex.compile(r"\b(?:to|through|thru|till|until|bis|đến|up|extending)\b|[-–—~→]", regex.I)
# A word that is no side ("right after surgery", "nothing left", "cần phải": must), a side or an hour in a form that is
# not known here ("L", "LVF", "rt.", "7 heures", "half past"), a time or its length ("um 7 Uhr", "2 giờ sau").
AFTER_LEFT = "the|an?|this|that|his|her|their|its?|him|them|us|alone|behind|over|open|out|off|untreated|untouched|to"
AFTER_LEFT += "|intact|in|inside|unchanged|unrepaired|with|by|for|without|as|after|before|when|because|handed"
AFTER_RIGHT = "after|before|away|now|then|there|here|behind|at (?:the|an?)|on|in|up|down|next|through|under|beneath"
AFTER_RIGHT += "|above|below|into|off|out|past|across|along|beside|beyond|over|where|when|as|angles?|handed|near"
AFTER_RIGHT += "|between|around|inside|to the"
BEFORE = "all|was|were|has|have|had|been|be|being|is|are|who|patient|not|nothing|quite|just|no|some|any|tissue"
BEFORE += "|remnants?"
UNCLEAR = regex.compile(
    rf"\bleft[\s-]+(?:{AFTER_LEFT})\b|\bright[\s-]+(?:{AFTER_RIGHT})\b|\b(?:{BEFORE})\s+(?:left|right)\b"
    r"|\b(?:cần|không|có)\s+phải\b|\bphải\s+(?:mổ|cắt|làm|điều|phẫu|theo|dùng|đặt|nhập|được)\b|\b(?:trai|phai)\b"
    r"|\bmuscles?\s+droit|\brecht\p{L}*\s+winkel"
    r"|\b(?-i:[LRTPGDI]|O[DSIGE]|A[DS]|(?!LEFT)[LR][A-Z]{1,3})\b|\b[lr]\b(?!['’])|\b(?:re|li|der|dir|sin|dex)\.(?!\p{L})"
    r"|\b(?:lt|rt|lft|rgt|lhs|rhs|sx|dx|izq|izda|izdo|izqdo|dcha|dcho|esq)\b"
    r"|\b(?:half|quarter|halb|viertel)\s+(?:past|to|vor|nach|\d)|\b(?:heures?|horas?|ore|uur|hrs?)\b"
    r"|\d\s*(?:h\b|h\d|час|点|點|时|時)|\bum\s+\d+\s*uhr|giờ\s+(?:sau|trước|qua)\b",
    regex.I,
)


def side(word, abbreviations=False):
    """A word → ("left" or "right", the word for the other side), or None. abbreviations: know those, too."""
    for pattern, left, right in SIDES:
        if match := pattern.fullmatch(word.lower()):
            if match[1] == left:
                return "left", right + match[2]
            return "right", left + match[2]
    if abbreviations:
        for left, right in ABBREVIATIONS.items():
            if word.lower() in (left, right):
                return ("left", right) if word.lower() == left else ("right", left)
    return None


def mirror_label(label, classes):
    """The class among `classes` that the mirror image belongs to: the label itself where it names no side, else the
    class that is called the same but for the side, in whatever words. None if there is none such, or if a side may be
    there that is not understood."""
    own = _pieces(label)
    other = tuple({"<left>": "<right>", "<right>": "<left>"}.get(piece, piece) for piece in own)
    if own == other:
        mirrored = mirror_text(label) if regex.search(UNIT, label, regex.I) else label
        doubtful = mirrored not in classes or any(_differ_by_a_letter(label, name) for name in classes)
        return None if doubtful else mirrored
    same = [name for name in classes if _pieces(name) == other]
    return same[0] if len(same) == 1 else None


def _split(label):
    """A class's name → its pieces, in small letters; full-width letters count as others do."""
    return [piece.lower() for piece in PIECE.findall(unicodedata.normalize("NFKC", label))]


def _pieces(label):
    """A class's name → its pieces, with <left> and <right> for the words that mean them."""
    pieces = []
    for piece in _split(label):
        for part in regex.split(f"({GLUE})", piece) if _glued(piece) else [piece]:
            found = side(part, abbreviations=True)
            pieces.append(f"<{found[0]}>" if found else part)
    return tuple(filter(None, pieces))


def _differ_by_a_letter(label, name):
    """Do two classes have the same name but for a first or last letter that may stand for a side: LVF and RVF?"""
    pairs = [(a, b) for a, b in zip(_split(label), _split(name), strict=False) if a != b]
    if len(_split(label)) != len(_split(name)) or len(pairs) != 1:
        return False
    a, b = pairs[0]
    ends = [(a[0], b[0])] * (a[1:] == b[1:]) + [(a[-1], b[-1])] * (a[:-1] == b[:-1])
    return any(x + y in LETTERS or y + x in LETTERS for x, y in ends)


def _glued(word):
    return not side(word) and GLUED.fullmatch(word.lower())


def mirror_text(text):
    """What a caption says of the mirrored image, in Unicode's composed form (NFC). None if a side or an hour may be
    there that is not understood."""
    text = unicodedata.normalize("NFC", text)
    if len(text) > LONGEST or UNCLEAR.search(text) or any(map(_glued, PIECE.findall(text))):
        return None
    hours = list(CLOCK.finditer(text))
    understood = "".join(match[0] for match in hours)
    for sign in ("clock|uhr|giờ", r"\d:\d\d"):
        if len(regex.findall(sign, understood, regex.I)) < len(regex.findall(sign, text, regex.I)):
            return None
    ends = [0, *(match.end() for match in hours)]
    for match, end in zip(hours, ends, strict=False):  # a range in two parts, of which each would be mirrored alone
        between = text[end : match.start()]
        if BETWEEN.search(between) and (end or regex.search(r"\d\W*\p{L}*\W*$", between)):
            return None
    if hours and regex.match(rf"\W*(?:{BETWEEN.pattern})\W*\d", text[ends[-1] :], regex.I):
        return None
    for match in reversed(hours):
        mirrored = _mirror_hours(match)
        if mirrored is None:
            return None
        text = text[: match.start()] + mirrored + text[match.end() :]
    return PIECE.sub(_swap, text)


def _swap(match):
    word, found = match[0], side(match[0])
    if not found:
        return word
    return found[1].upper() if word.isupper() else found[1].capitalize() if word[0].isupper() else found[1]


def _mirror_hours(match):
    """ "5 to 7 o'clock", "5, 6 and 8 o'clock" → the hours of the mirror image; None if they are none of a clock, or if
    it is doubtful whether a number before a comma is one of them. A range stays clockwise, so its ends change places.
    """
    joins = [join.lower() for join in match.captures("join")]
    mirrored = [_mirror_hour(hour) for hour in match.captures("hour")]
    if None in mirrored or (joins and set(joins) == {","}):
        return None
    if regex.search(r"\b(?:between|zwischen)\s*$", match.string[: match.start()], regex.I):
        joins = ["to" for _ in joins]
    first = 0
    for i in range(len(mirrored)):
        if i == len(joins) or not regex.fullmatch(RANGE, joins[i]):  # here a run of ranges ends
            mirrored[first : i + 1] = mirrored[first : i + 1][::-1]
            first = i + 1
    text, end = "", match.start()
    for (start, stop), hour in zip(match.spans("hour"), mirrored, strict=True):
        text += match.string[end:start] + hour
        end = stop
    return text + match.string[end : match.end()]


def _mirror_hour(hour):
    """ "5" → "7", "five" → "seven", "5:30" → "6:30"; None for what no clock face has."""
    if hour.lower() in NUMBERS:
        return NUMBERS[(10 - NUMBERS.index(hour.lower())) % 12]
    hours, _, minutes = hour.partition(":")
    if not 1 <= int(hours) <= 12:
        return None
    left = -(int(hours) * 60 + int(minutes or 0)) % 720
    return f"{left // 60 or 12}" + (f":{left % 60:02}" if minutes else "")


def mirror_classes(prompts):
    """{class: its prompts} → {class: the class of its mirror image, or None, if it must not be mirrored}. A class that
    names no side, but has prompts that do, is one of those."""
    mirrored = {name: mirror_label(name, prompts) for name in prompts}
    for name, texts in prompts.items():
        if mirrored[name] == name and any(mirror_text(text) != unicodedata.normalize("NFC", text) for text in texts):
            mirrored[name] = None
    return mirrored


def describe_flips(mirrored, captions=()):
    """{class: the class of its mirror image, or None} → lines that say which classes training mirrors, and how."""
    obscure = [caption for caption in captions if mirror_text(caption) is None]
    parts = {
        "mirrored, and swapped": [f"{a} ↔ {b}" for a, b in mirrored.items() if b and a < b],
        "mirrored": [a for a, b in mirrored.items() if a == b],
        "never mirrored, as they have no counterpart": [a for a, b in mirrored.items() if b is None],
        f"never mirrored, as a caption may name a side in unknown words, {len(obscure):,} images": obscure[:1],
    }
    return ["left and right:", *(f"  {how}: {', '.join(names)}" for how, names in parts.items() if names)]


def main():
    classes = ["LeftEar", "RightEar", "nose-left", "nez-gauche", "nez-droit", "throat"]
    for name in classes:
        print(f"class {name:10} → {mirror_label(name, classes)}")
    for text in (
        "the left eardrum, cone of light at 7 o'clock",
        "grade 2, from 5 to 8 o'clock",
        "Nasenloch rechts, 5:30 Uhr",
        "a polyp, right after surgery",
    ):
        print(f"{text!r} → {mirror_text(text)!r}")


if __name__ == "__main__":
    main()
