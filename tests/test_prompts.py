"""Prompts: the seven classes of ENTRep, any other class, and the user's own."""

import json

import pytest

from errors import UserError
from prompts import class_prompts
from sides import mirror_text

CLASSES = ["nose-right", "nose-left", "ear-right", "ear-left", "vc-open", "vc-closed", "throat"]


def written(folder, content):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / "prompts.json").write_text(text, encoding="utf-8")
    return folder / "prompts.json"


def test_each_entrep_class_has_several_prompts_of_its_own():
    prompts = class_prompts(CLASSES)
    assert list(prompts) == CLASSES
    everything = [text for texts in prompts.values() for text in texts]
    assert all(len(texts) >= 4 for texts in prompts.values())
    assert len(set(everything)) == len(everything)
    assert all(text == text.strip() and len(text.split()) >= 4 for text in everything)


@pytest.mark.parametrize("part", ["nose", "ear"])
def test_every_prompt_of_a_side_names_it_first(part):
    for side in ("left", "right"):
        for text in class_prompts([f"{part}-{side}"])[f"{part}-{side}"]:
            assert next(word for word in text.replace(",", " ").split() if word in ("left", "right")) == side


@pytest.mark.parametrize("part", ["nose", "ear"])
def test_the_prompts_of_the_sides_are_mirror_images(part):
    left, right = class_prompts([f"{part}-left", f"{part}-right"]).values()
    assert [mirror_text(text) for text in left] == right


@pytest.mark.parametrize("name", ["vc-open", "vc-closed", "throat"])
def test_classes_without_a_side_name_none(name):
    for text in class_prompts([name])[name]:
        assert mirror_text(text) == text


def test_the_anatomy_is_right():
    prompts = {name: " ".join(texts) for name, texts in class_prompts(CLASSES).items()}
    assert "5 o'clock" in prompts["ear-right"]  # the cone of light points to the front and down
    assert "7 o'clock" in prompts["ear-left"]
    assert "septum on the right" in prompts["nose-right"]  # the patient's right nostril is seen from the front
    assert "septum on the left" in prompts["nose-left"]
    assert "abducted" in prompts["vc-open"]
    assert "adducted" in prompts["vc-closed"]
    assert "uvula" in prompts["throat"]


@pytest.mark.parametrize(
    "name", ["nose_right", "Nose Right", "NOSE-RIGHT", " nose  right ", "nose.right", "Nose__Right"]
)
def test_other_spellings_of_an_entrep_class_find_its_prompts(name):
    assert class_prompts([name]) == {name: class_prompts(["nose-right"])["nose-right"]}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vocal_fold_polyp", "vocal fold polyp"),
        ("Tumor  (T2)", "Tumor T2"),
        ("dây_thanh", "dây thanh"),
        ("a{0}b", "a 0 b"),
    ],
)
def test_other_classes_are_put_into_templates(name, words):
    texts = class_prompts([name])[name]
    assert len(set(texts)) == len(texts) >= 4
    assert all(words in text for text in texts)
    assert {text.replace(words, "throat lump") for text in texts} == set(class_prompts(["throat lump"])["throat lump"])


@pytest.mark.parametrize("name", ["___", "?", ""])
def test_a_name_without_letters_still_has_prompts(name):
    assert all(name in text for text in class_prompts([name])[name])


def test_different_classes_never_share_a_prompt():
    texts = [text for texts in class_prompts([*CLASSES, "nose", "polyp", "ear"]).values() for text in texts]
    assert len(set(texts)) == len(texts)


def test_the_users_prompts_replace_the_built_in_ones_and_the_rest_stays(tmp_path):
    file = written(tmp_path, {"throat": ["họng của tôi", "my throat"], "polyp": ["a polyp"]})
    names = ["polyp", *CLASSES, "cyst"]
    before, prompts = class_prompts(names), class_prompts(names, file)
    assert list(prompts) == names
    assert prompts == {**before, "throat": ["họng của tôi", "my throat"], "polyp": ["a polyp"]}
    assert class_prompts(names, str(file)) == prompts


def test_an_empty_object_changes_nothing(tmp_path):
    assert class_prompts(CLASSES, written(tmp_path, {})) == class_prompts(CLASSES)


def test_the_lists_are_the_callers_to_change():
    class_prompts(["throat"])["throat"].clear()
    assert class_prompts(["throat"])["throat"]


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        "",
        '{"throat": ["a"',
        ["a throat"],
        "null",
        {"throat": "a throat"},
        {"throat": []},
        {"throat": ["a throat", 1]},
        {"throat": ["a throat", " "]},
        {"throat": ["a throat"], "vc-open": None},
        {"throat": {"en": "a throat"}},
        {"tonsil": ["a tonsil"]},
    ],
)
def test_a_file_that_holds_no_prompts_is_named(tmp_path, content):
    file = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        class_prompts(CLASSES, file)
    assert str(file) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_class_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    with pytest.raises(UserError, match=r"larinx.*ear.*larynx"):
        class_prompts(["ear", "larynx"], written(tmp_path, {"larinx": ["a larynx"], "ear": ["an ear"]}))


def test_a_missing_file_a_folder_and_a_wrong_encoding_are_named(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"throat": ["\xe9"]}')
    for path in (tmp_path / "nowhere.json", tmp_path, tmp_path / "latin.json"):
        with pytest.raises(UserError) as error:
            class_prompts(CLASSES, path)
        assert str(path) in str(error.value)
        assert len(str(error.value).splitlines()) == 1
