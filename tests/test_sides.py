"""sides.py: what mirroring an image does to its class and caption, cases by hand."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sides import describe_flips, mirror_classes, mirror_label, mirror_text

# ---------------------------------------------------------------------------------------------------------------------
# Classes


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("ear-left", "ear-right"),
        ("LeftEar", "RightEar"),
        ("leftear", "rightear"),
        ("earLeft2", "earRight2"),
        ("EAR_L", "EAR_R"),
        ("ear l", "ear r"),
        ("AS", "AD"),
        ("Eye OS", "Eye OD"),
        ("Ohr links", "Ohr rechts"),
        ("linkes Ohr", "rechtes Ohr"),
        ("oreille-gauche", "oreille-droite"),
        ("nez_gauche", "nez_droit"),
        ("oído izquierdo", "oído derecho"),
        ("orecchio sinistro", "orecchio destro"),
        ("ouvido esquerdo", "ouvido direito"),
        ("auris sinistra", "auris dextra"),
        ("левое ухо", "правое ухо"),
        ("左耳", "右耳"),
        ("tai trái", "tai phải"),
        ("tai-trai", "tai-phai"),
        ("taitrai", "taiphai"),
        ("tmleft", "tmright"),
        ("ohrlinks", "ohrrechts"),
        ("linkesohr", "rechtesohr"),
        ("oreillegauche", "oreilledroite"),
        ("oído izdo", "oído dcho"),
        ("orecchio sn", "orecchio dx"),
        ("полип слева", "полип справа"),
        ("левосторонний", "правосторонний"),
        ("ear lhs", "ear rhs"),
        ("ｌｅｆｔ ear", "ｒｉｇｈｔ ear"),
        ("at 5 o'clock", "at 7 o'clock"),
        (unicodedata.normalize("NFD", "mũi trái"), "mũi phải"),
    ],
)
def test_the_classes_of_the_two_sides_change_places(left, right):
    classes = [left, right, "throat", "vc-open"]
    assert mirror_label(left, classes) == right and mirror_label(right, classes) == left
    assert mirror_label("throat", classes) == "throat"
    assert mirror_label(left, [left, "throat"]) is None  # no class for its mirror image


@pytest.mark.parametrize(
    "name", ["throat", "vc-open", "bright", "upright", "cleft palate", "polyp 2", "Größe", "grade-d"]
)
def test_a_class_without_a_side_is_its_own_mirror_image(name):
    assert mirror_label(name, [name]) == name


@pytest.mark.parametrize(
    "names",
    [
        "LE RE",
        "OI OD",
        "OG OD",
        "OE OD",
        "LA RA",
        "LVF RVF",
        "EARL EARR",
        "lear rear",
        "tai-T tai-P",
        "oreille-G oreille-D",
    ],
)
def test_classes_that_may_name_a_side_by_a_letter_are_not_mirrored(names):
    classes = names.split()
    assert [mirror_label(name, classes) for name in classes] in ([None, None], classes[::-1])
    assert mirror_label("throat", [*classes, "throat"]) == "throat"


def test_of_two_classes_that_could_be_meant_neither_is():
    assert mirror_label("ear-left", ["ear-left", "ear-right", "Ear Right"]) is None


def test_the_user_is_told_which_classes_flip():
    names = ["ear-left", "ear-right", "nose-left", "throat", "E1"]
    prompts = {name: [f"a view of {name.replace('-', ' ')}"] for name in names} | {"E1": ["a left ear"]}
    lines = "\n".join(describe_flips(mirror_classes(prompts)))
    assert "ear-left ↔ ear-right" in lines and "mirrored: throat" in lines
    assert "never mirrored" in lines and lines.endswith("nose-left, E1")


# ---------------------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("LEFT vocal fold", "RIGHT vocal fold"),
        ("Right ear, left side.", "Left ear, right side."),
        ("left/right", "right/left"),
        ("the right's", "the left's"),
        ("left-sided cyst, seen from the right", "right-sided cyst, seen from the left"),
        ("Gehörgang rechts, linkes Ohr", "Gehörgang links, rechtes Ohr"),
        ("tai trái", "tai phải"),
        ("Phải và TRÁI", "Trái và PHẢI"),
        ("at 7 o'clock", "at 5 o'clock"),
        ("at 10 o’clock and 2o'clock", "at 2 o’clock and 10o'clock"),
        ("12 o'clock", "12 o'clock"),
        ("6 o'clock", "6 o'clock"),
        ("11 o'clock", "1 o'clock"),
        ("left at 3 o'clock", "right at 9 o'clock"),
        ("seven o'clock", "five o'clock"),
        ("5:30 o'clock", "6:30 o'clock"),
        ("12:15 o'clock", "11:45 o'clock"),
        ("bei 7 Uhr", "bei 5 Uhr"),
        ("vị trí 7 giờ", "vị trí 5 giờ"),
        ("7-o'clock position", "5-o'clock position"),
        ("5, 6 and 8 o'clock", "7, 6 and 4 o'clock"),
        ("grade 2, 7 o'clock", "grade 2, 5 o'clock"),
        ("grade 2, 7 and 8 o'clock", "grade 2, 5 and 4 o'clock"),
        # Ranges stay clockwise.
        ("perforated from 1 to 4 o'clock, 2 mm", "perforated from 8 to 11 o'clock, 2 mm"),
        ("between 11 and 2 O'Clock", "between 10 and 1 O'Clock"),
        ("7-9 and 2 o'clock", "3-5 and 10 o'clock"),
        ("from 1 o'clock to 4 o'clock", "from 8 o'clock to 11 o'clock"),
    ],
)
def test_left_right_and_hours_are_mirrored(text, mirrored):
    assert mirror_text(text) == mirrored
    assert mirror_text(mirrored) == text


def test_decomposed_letters_are_understood():
    assert mirror_text(unicodedata.normalize("NFD", "tai trái, 7 giờ")) == "tai phải, 5 giờ"


@pytest.mark.parametrize(
    "text",
    ["bright", "upright cleft", "throat", "", "7 mm", "half of the eardrum", "rıght RİGHT", "grade 2"],
)
def test_other_words_are_left_alone(text):
    assert mirror_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "right after surgery",
        "the patient left the room",
        "the tube was left in place",
        "nothing left",
        "left over",
        "leftover wax",
        "a right-handed surgeon",
        "cần phải mổ",
        "L ear",
        "polyp (R)",
        "OD",
        "13 o'clock",
        "half past five o'clock",
        "halb 7 Uhr",
        "um 7 Uhr",
        "à 7 heures",
        "a las 7 horas",
        "2 giờ sau mổ",
        "sieben Uhr",
        "5, 7 o'clock",  # is the 5 an hour?
        "5 clocks",
        "Lt. TM normal",
        "rt ear",
        "Polyp re. Stimmlippe",
        "orecchio sx",
        "oído izq.",
        "l ear",
        "LVF polyp",
        "tai T",
        "oreille G",
        "linkerhand",
        "bé trai",
        "phải mổ",
        "muscle droit interne",
        "rechter Winkel",
        "grommet left in",
        "left with a tube",
        "some tissue left",
        "right to the annulus",
        "just right",
        "1 through 4 o'clock",
        "1 o'clock through 4 o'clock",
        "5 o'clock to 7",
        "from the 1 o'clock to the 4 o'clock position",
        "von 1 Uhr bis ca. 4 Uhr",
        "clock position 7",
        "clockwise",
        "7:00 position",
        "à sept heures",
        "7h30",
        "3 hrs",
        "7点",
        "left " * 300,
    ],
)
def test_what_is_not_understood_is_not_guessed_at(text):
    assert mirror_text(text) is None


words = st.sampled_from(["left", "Left", "LEFT", "right", "Right", "trái", "Trái", "TRÁI", "phải", "PHẢI"])
hours = st.integers(1, 12).map("{} o'clock".format)
others = st.sampled_from([" ", "-", "_", "/", ", ", "bright", "Leftover", "3", "ear"]) | st.text(max_size=3)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(words | hours | others, max_size=8).map("".join))
def test_mirrored_twice_is_the_original(text):
    mirrored = mirror_text(text)
    if mirrored is not None:
        assert mirror_text(mirrored) in (unicodedata.normalize("NFC", text), None)
