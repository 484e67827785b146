"""Left and right in words: what mirroring an image does to its class and caption.

The mirror image of a left ear is a right one. So the classes left and right change places, and so do the words of a
caption; "5 o'clock" becomes "7 o'clock". What cannot be understood for certain is not guessed at: `mirror_label` and
`mirror_text` answer None, and the image is not mirrored. That costs a little variety, a wrong guess would teach a model
to confuse the sides.

Try changing this: take "droit" out of WORDS, and "oreille-droit" is flipped to itself, the mistake to be avoided.
"""

import unicodedata

import regex

# left, right, and what may follow: English, Vietnamese (also without its accents), German and Dutch, French, Spanish,
# Portuguese, Italian, Latin, Russian, Chinese and Japanese. Of several lines that fit the first one counts.
WORDS = (
    ("left", "right", ""),
    ("trái", "phải", ""),
    ("trai", "phai", ""),
    ("link", "recht", "s|e[mnrs]?|sseitige?[mnrs]?"),
    ("gauche", "droite", "s?"),
    ("gauche", "droit", "s?"),
    ("izquierd", "derech", "[oa]s?"),
    ("esquerd", "direit", "[oa]s?"),
    ("sinistr", "destr", "[aeio]"),
    ("sinister", "dexter", ""),
    ("sinistr", "dextr", "[aeiou][ems]?"),
    ("лев", "прав", r"\p{L}{1,3}"),
    ("左", "右", ""),
)
SIDES = [(regex.compile(f"({left}|{right})({end})"), left, right) for left, right, end in WORDS]
# In names of classes only, as in a sentence "as" is mostly no left ear (auris sinistra).
ABBREVIATIONS = {"l": "r", "lt": "rt", "os": "od", "as": "ad", "sx": "dx", "sin": "dex", "li": "re"}
ABBREVIATIONS |= {"izq": "der", "esq": "dir"}
GLUED = regex.compile(r"(left|right|links|rechts)\p{L}{3,}|\p{L}{3,}(left|right)")  # "leftear"
# The pieces of a name: LeftEar_2 → Left, Ear, 2.
PIECE = regex.compile(r"\p{Han}|\p{Lu}+(?=\p{Lu}\p{Ll})|\p{Lu}?\p{Ll}+|\p{Lu}+|[\p{Lo}--\p{Han}]+|\p{N}+", regex.V1)

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
HOUR = rf"(?P<hour>\d{{1,2}}(?::[0-5]\d)?|{'|'.join(NUMBERS)})"
UNIT = r"\s*-?\s*(?:o\s?['’`´]?\s?clock|uhr|giờ)(?!\p{L})"
RANGE, CONJUNCTION = r"-|–|—|to|bis|đến", r"/|&|and|or|und|oder|và|hoặc"
GRADED = r"(?<!\b(?:grade|stage|type|level|class|score|size|grad|stadium|typ|độ)\s*)(?<![\p{L}\p{N}.:])"
CLOCK = regex.compile(
    rf"{GRADED}{HOUR}(?:(?:{UNIT})?\s*(?P<join>{RANGE}|,\s*(?:and|or|und|và)|,|{CONJUNCTION})\s*{HOUR})*{UNIT}", regex.I
)
# A word that is no side ("right after surgery", "nothing left", "cần phải": must), a side or an hour in a form that is
# not known here ("L", "7 heures", "half past"), a time or its length ("um 7 Uhr", "2 giờ sau": two hours later).
AFTER_LEFT = "the|an?|this|that|his|her|their|its?|him|them|us|alone|behind|over|open|out|off|untreated|untouched"
AFTER_LEFT += "|intact|in (?:place|situ)|unrepaired|by|for|without|as|after|before|when|because|handed"
AFTER_RIGHT = (
    "after|before|away|now|then|there|here|behind|at (?:the|an?)|on|in|up|down|next|through|under|beneath|above|below"
)
AFTER_RIGHT += "|into|off|out|past|across|along|beside|beyond|over|where|when|as|angles?|handed"
UNCLEAR = regex.compile(
    rf"\bleft[\s-]+(?:{AFTER_LEFT})\b|\bright[\s-]+(?:{AFTER_RIGHT})\b"
    r"|\b(?:all|was|were|has|have|had|been|be|being|is|are|who|patient|not|nothing|quite)\s+(?:left|right)\b"
    r"|\b(?:cần|không|có)\s+phải\b|\b(?-i:[LR]|OD|OS|AD|AS|LT|RT)\b|\b(?:half|quarter|halb|viertel)\s+(?:past|to|vor|nach|\d)"
    r"|\d\s*(?:h|heures?|horas?|ore|uur|часов)\b|\bum\s+\d+\s*uhr|giờ\s+(?:sau|trước|qua)\b",
    regex.I,
)


def side(word, abbreviations=False):
    """A word → ("left" or "right", what stands for the other side), or None."""
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
    class that is called the same but for the side, in whatever words. None if there is none such."""
    own = _pieces(label)
    other = tuple({"<left>": "<right>", "<right>": "<left>"}.get(piece, piece) for piece in own)
    if own == other:
        return label
    same = [name for name in classes if _pieces(name) == other]
    return same[0] if len(same) == 1 else None


def _pieces(label):
    """A class's name → its pieces in small letters, with <left> and <right> for the words that mean them."""
    pieces = []
    for piece in PIECE.findall(unicodedata.normalize("NFC", label)):
        piece = piece.lower()
        for part in regex.split("(left|right|links|rechts)", piece) if _glued(piece) else [piece]:
            found = side(part, abbreviations=True)
            pieces.append(f"<{found[0]}>" if found else part)
    return tuple(filter(None, pieces))


def _glued(word):
    return not side(word) and GLUED.fullmatch(word.lower())


def mirror_text(text):
    """What a caption says of the mirrored image, in Unicode's composed form (NFC). None if a side or an hour may be
    there that is not understood."""
    text = unicodedata.normalize("NFC", text)
    hours = list(CLOCK.finditer(text))
    units = sum(len(regex.findall(UNIT, match[0], regex.I)) for match in hours)
    if UNCLEAR.search(text) or units < len(regex.findall(UNIT, text, regex.I)):
        return None
    if any(map(_glued, PIECE.findall(text))):
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


def describe_flips(classes):
    """→ lines that say which classes training mirrors, and how."""
    mirrored = {name: mirror_label(name, classes) for name in classes}
    swapped = [f"{a} ↔ {b}" for a, b in mirrored.items() if b and a < b]
    parts = {
        "mirrored, and swapped": swapped,
        "mirrored": [a for a, b in mirrored.items() if a == b],
        "never mirrored, as no class is called like their mirror image": [a for a, b in mirrored.items() if b is None],
    }
    return [f"  {how}: {', '.join(names)}" for how, names in parts.items() if names]


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
