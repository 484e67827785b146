"""The tokenizer against transformers' CLIPTokenizer, and against OpenAI's documented behaviour where the two differ."""

import gzip
import html
import random
from itertools import chain, product
from pathlib import Path
from unicodedata import category

import ftfy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from errors import UserError
from tokenizer import CLIP_MERGES, Tokenizer, learn_merges, save_merges

CLIP_FOLDER = Path(__file__).parents[2] / "shared" / "clip"
START, END = 49406, 49407


def oracle(merges):
    """transformers' tokenizer over a vocabulary built as OpenAI's: the bytes' symbols, printable ones first; the same
    with </w>; a symbol for each merge; start and end."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    ends = [symbol + "</w>" for symbol in symbols]
    vocabulary = [*symbols, *ends, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(vocabulary)}, merges=merges)


@pytest.fixture(scope="module")
def merges():
    if not (CLIP_FOLDER / "merges.txt").is_file():
        pytest.skip("CLIP's merges are not at hand")
    lines = (CLIP_FOLDER / "merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [tuple(line.split(" ")) for line in lines[1:]]


@pytest.fixture(scope="module")
def clip(merges):
    return Tokenizer(CLIP_FOLDER)


@pytest.fixture(scope="module")
def theirs(merges):
    return oracle(merges)


def padded(ids, length=77):
    return ids + [0] * (length - len(ids))


def same_in_both(text):
    """OpenAI's tokenizer mends Unicode and undoes HTML escapes, transformers' does not. They also disagree on
    - lower-casing: Python knows the final sigma, Rust goes character by character;
    - ſ and U+0345: OpenAI's pattern ignores case, so that 'ſ is an 's, and the other is passed over."""
    untouched = ftfy.fix_text(text) == text and html.unescape(text) == text
    return untouched and "".join(c.lower() for c in text) == text.lower() and not {"ſ", "\u0345"} & set(text)


# ---------------------------------------------------------------------------------------------------------------------
# The same ids

WORDS = {
    "medical English": """endoscopic image of the right nasal cavity with inferior turbinate otoscopy shows a perforated
        tympanic membrane and cholesteatoma laryngoscopy: bilateral vocal-fold oedema, 3mm polyp; no mucopurulent
        discharge. adenoid hypertrophy grade 3 post-op Reinke's epiglottis SQUAMOUS papillomatosis""",
    "accents": "naïve façade œdème Über größe señor Ångström crème brûlée ČESKÝ žluťoučký Łódź ÉCOLE ß ðorn ŐRÜLT",
    "Vietnamese": """hình ảnh nội soi tai mũi họng bên phải trái dây thanh quản phù nề viêm xoang mủ nhầy ĐÓNG MỞ
        Khối u sùi màng nhĩ thủng Niêm mạc nhợt Vòm họng""",
    "Chinese and Japanese": "声带 息肉 喉镜检查 右侧鼻腔 中耳炎。 内視鏡 ポリープ のどの画像 鼓膜、正常 𠮷野家",
    "Cyrillic and Greek": "голосовая складка Полип гортани ЭНДОСКОПИЯ ёж їжак φωνητική χορδή ΩΤΙΤΙΔΑ λάρυγγα",
    "Arabic and others": "منظار الحنجرة الأذن اليمنى ٣ سليلة קול אוזן หู คอ จมูก स्वर रज्जु 성대 폴립 גרון ہے",
    "emoji": "😀 👂 👃 👩‍⚕️ 🇻🇳 ❤️ 🩺🔬 👍🏽 ☎ ♀ ✓ → ≤ 🏳️‍🌈",
    "punctuation": "!!! ... ?!?! -- -> (( )) [x] {y} #1 @a a/b c\\d $5 ^_^ ~ `code` ** _a_ = <3 a|b :-) ;; ,, && R&D",
    "numbers": "0 12 345 6,789 1.5 1e-3 2024-05-07 3/4 640x480 ½ ² Ⅳ 100° ±2 №5 10mm T2N0M0",
    "contractions": "don't it's DON'T IT'S we've I'm they'll you'd we're dogs' 'tis n'roll ''s 's 'S x's's o'clock",
}
WORDS = {kind: text.split() for kind, text in WORDS.items()}
WORDS["all of them"] = list(chain.from_iterable(WORDS.values()))
SPACES = [" "] * 12 + ["", "", "  ", "\t", "\n", "\n\n", "\u00a0", "\u2003", " \u2009\n"]


def some_texts(kind, count):
    rng, texts = random.Random(kind), set()
    while len(texts) < count:
        words = rng.choices(WORDS[kind], k=rng.randint(1, 12))
        words = [rng.choice((word, word, word, word.upper(), word.title())) for word in words]
        text = "".join(rng.choice(SPACES) + word for word in words) + rng.choice(("", "", ".", " ", "\n"))
        if same_in_both(text):
            texts.add(text)
    return sorted(texts)


@pytest.mark.parametrize("kind", WORDS)
def test_ids_are_those_of_transformers(clip, theirs, kind):
    texts = some_texts(kind, 250)
    expected = theirs(texts, truncation=True, max_length=77)["input_ids"]
    for text, ours, ids in zip(texts, clip(texts).tolist(), expected, strict=True):
        assert ours == padded(ids), text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"]), max_size=40).filter(same_in_both))
def test_ids_of_random_text_are_those_of_transformers(clip, theirs, text):
    if "<|" not in text:  # special tokens have a test of their own
        assert [START, *clip.encode(text), END] == theirs(text)["input_ids"]


def test_ids_of_every_character_before_the_ideographs_are_those_of_transformers(clip, theirs):
    characters = (chr(i) for i in range(32, 0x3400) if category(chr(i)) not in ("Cc", "Cn", "Co"))
    texts = [text for text in (f"a{c}1 {c}b" for c in characters) if same_in_both(text)]
    assert len(texts) > 9000
    for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert [START, *clip.encode(text), END] == ids, ascii(text)


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "&", "word " * 300, "0" * 300, "声" * 100, "x" * 2000])
def test_ids_of_empty_and_long_texts_are_those_of_transformers(clip, theirs, text):
    assert clip(text)[0].tolist() == padded(theirs(text, truncation=True, max_length=77)["input_ids"])


def test_10_000_captions_have_the_ids_of_transformers(clip, theirs):
    sides, parts = ["left", "right", "both", "neither", "upper"], ["ear", "nostril", "vocal fold", "tonsil", "canal"]
    findings = ["polyp", "oedema", "cholesteatoma", "granuloma", "perforation", "mucus", "scar", "web", "cyst", "ulcer"]
    captions = [f"{s} {p}: {f}, {n} mm" for s, p, f, n in product(sides, parts, findings, range(40))]
    assert len(set(captions)) == 10_000
    assert clip(captions).tolist() == [padded(ids) for ids in theirs(captions)["input_ids"]]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("hello world!", [3306, 1002, 256]),
        ("a diagram", [320, 22697]),
        ("A  Dog", [320, 1929]),
        ("it's", [585, 568]),
    ],
)
def test_known_ids(clip, theirs, text, ids):
    assert clip(text)[0].tolist() == padded([START, *ids, END])
    assert theirs(text)["input_ids"] == [START, *ids, END]


# ---------------------------------------------------------------------------------------------------------------------
# Where OpenAI's tokenizer and transformers' differ, OpenAI's counts


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("&lt;5 mm&gt;", "<5 mm>"),
        ("R&amp;D", "R&D"),
        ("<b>caf&eacute;", "<b>café"),  # ftfy takes a text with "<" for HTML and leaves its escapes
        ("<b>R&amp;amp;D", "<b>R&D"),
        ("âœ” No problems", "✔ No problems"),  # the example of ftfy's own documentation
        ("thanh quáº£n", "thanh quản"),
        ("schÃ¶n", "schön"),
        ("ﬁbrosis", "fibrosis"),
        ("ｐｏｌｙｐ", "polyp"),
        ("“quoted” ‘words’", "\"quoted\" 'words'"),
        ("a\u3000b\x00c", "a bc"),
        ("e\u0301", "\u00e9"),
    ],
)
def test_broken_and_escaped_text_is_mended(clip, text, mended):
    assert clip.encode(text) == clip.encode(mended)


def test_words_are_told_apart_without_regard_to_case(clip):
    assert clip.decode(clip.encode("it'ſ")) == "it 'ſ"  # ſ is an old s


def test_text_is_unescaped_twice_not_more(clip):
    assert clip.decode(clip.encode("<p>&amp;amp;lt;")) == "< p >& lt ;"


def test_padding_is_zero_not_the_end_token(clip, theirs):
    ours = clip("a cat")[0]
    assert ours[:4].tolist() == [START, 320, 2368, END]
    assert ours[4:].count_nonzero() == 0
    assert theirs("a cat", padding="max_length", max_length=77)["input_ids"][4:] == [END] * 73


@pytest.mark.parametrize("text", ["<|startoftext|> a<|endoftext|>b", "<|StartOfText|>A<|ENDOFTEXT|>B"])
def test_special_tokens_in_a_text_are_themselves(clip, text):
    assert clip.encode(text) == [START, 320, END, 321]


# ---------------------------------------------------------------------------------------------------------------------
# The call


def test_a_string_is_a_list_of_one(clip):
    assert torch.equal(clip("a polyp"), clip(["a polyp"]))
    assert torch.equal(clip(("a polyp", "a cyst")), torch.cat([clip("a polyp"), clip("a cyst")]))


@pytest.mark.parametrize("texts", [[], ["a"], ["a polyp", "", "an ear " * 200]])
def test_result_is_int64_with_a_row_a_text(clip, texts):
    tokens = clip(texts)
    assert tokens.shape == (len(texts), 77)
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize("length", [2, 3, 7, 77, 200])
def test_other_context_lengths_cut_and_pad_as_well(clip, theirs, length):
    texts = ["a polyp", "the left vocal fold is smooth " * 20]
    expected = theirs(texts, truncation=True, max_length=length)["input_ids"]
    assert clip(texts, context_length=length).tolist() == [padded(ids, length) for ids in expected]
    assert clip(texts, context_length=length)[1, -1] == (END if length < 130 else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Back to text


@pytest.mark.parametrize("kind", WORDS)
def test_decoded_text_is_the_cleaned_text(clip, kind):
    for text in some_texts(kind, 60):
        decoded = clip.decode(clip.encode(text))
        assert decoded.split() == decoded.split(" ")
        assert decoded.replace(" ", "") == "".join(text.split()).lower()  # blanks are put around every token


@pytest.mark.parametrize("text", ["nội soi thanh quản", "声带 息肉", "a 3 mm polyp , left ( ? )", "👂 👩‍⚕️", "i 'm", ""])
def test_text_of_separate_tokens_comes_back_as_it_was(clip, text):
    assert clip.decode(clip.encode(text.upper())) == text


def test_start_end_and_padding_leave_no_trace(clip):
    assert clip.decode(clip("a smooth polyp")[0]) == "a smooth polyp"
    assert clip.decode(clip("a smooth polyp")[0].tolist()) == "a smooth polyp"
    assert clip.decode(clip("word " * 300)[0]) == " ".join(["word"] * 75)


def test_a_character_cut_in_half_decodes_to_a_replacement(clip):
    assert clip.decode(clip.encode("声")[:-1]).endswith("\ufffd")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_there_are_49_408_symbols(clip, merges):
    assert len(merges) == CLIP_MERGES == 48_894
    assert len(clip) == 49_408


def test_openai_s_own_file_gives_the_same_ids(clip, tmp_path):
    text = (CLIP_FOLDER / "merges.txt").read_text(encoding="utf-8")
    ignored = "".join(f"unused{i} pair{i}\n" for i in range(262_144 - CLIP_MERGES))
    with gzip.open(tmp_path / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8", compresslevel=1) as file:
        file.write('"bpe_simple_vocab_16e6.txt#version: 0.2\n' + text.split("\n", 1)[1] + ignored)
    texts = some_texts("all of them", 200)
    for path in (tmp_path, tmp_path / "bpe_simple_vocab_16e6.txt.gz"):
        tokenizer = Tokenizer(path)
        assert len(tokenizer) == 49_408
        assert torch.equal(tokenizer(texts), clip(texts))


def test_folder_and_file_are_the_same(clip):
    texts = some_texts("all of them", 50)
    assert torch.equal(Tokenizer(str(CLIP_FOLDER / "merges.txt"))(texts), clip(texts))


@pytest.mark.parametrize("name", ["", "nowhere", "nowhere.txt", "nowhere.txt.gz"])
def test_missing_merges_say_how_to_get_them(tmp_path, name):
    with pytest.raises(UserError, match=r"put the one that belongs to the weights there") as error:
        Tokenizer(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Learning merges

# The example of Sennrich et al., counted by hand. newest is 6 times e s, s t</w>, e w …, widest 3 times, and so on;
# of pairs that are as frequent the last in the alphabet goes first.
CORPUS = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
LEARNED = [
    ("s", "t</w>"),  # 9, as e s
    ("e", "st</w>"),  # 9
    ("l", "o"),  # 7
    ("w", "est</w>"),  # 6, as n e and e w
    ("n", "e"),  # 6, as e west</w>
    ("ne", "west</w>"),  # 6
    ("lo", "w</w>"),  # 5
    ("w", "i"),  # 3, as i d and d est</w>
    ("wi", "d"),  # 3, as d est</w>
    ("wid", "est</w>"),  # 3
    ("w", "e"),  # 2, as lo w and e r</w>
    ("we", "r</w>"),  # 2, as lo we
    ("lo", "wer</w>"),  # 2
]


def test_the_most_frequent_pair_is_learned_first():
    assert learn_merges([" ".join(CORPUS)], 100) == LEARNED


@pytest.mark.parametrize("count", [0, 1, 7])
def test_no_more_merges_are_learned_than_asked_for(count):
    assert learn_merges(CORPUS, count) == LEARNED[:count]


def test_the_order_of_the_texts_does_not_matter():
    for seed in range(20):
        assert learn_merges(random.Random(seed).sample(CORPUS, len(CORPUS)), 100) == LEARNED


@pytest.mark.parametrize("texts", [[], [""], ["ab cd"], ["a", "a a", "a"]])
def test_nothing_is_learned_where_no_pair_occurs_twice(texts):
    assert learn_merges(texts, 10) == []


def test_texts_are_cleaned_before_learning():
    assert learn_merges(["AB  &amp;&amp;", "ab\t&&"], 10) == [("a", "b</w>"), ("&", "&</w>")]


def test_saved_merges_are_read_back_and_work_as_transformers_would_use_them(tmp_path):
    texts = ["the left vocal fold", "the right vocal folds", "nội soi: thanh quản, thanh quản", "polyps & a polyp 👂👂"]
    merges = learn_merges(texts, 60)
    save_merges(merges, tmp_path / "merges.txt")
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8").startswith("#version")
    tokenizer, theirs = Tokenizer(tmp_path), oracle(merges)
    assert len(tokenizer) == 512 + len(merges) + 2 == len(theirs)
    for text in [*texts, "something else entirely", "ĐÓNG 声带", "x" * 200]:
        expected = theirs(text, truncation=True, max_length=77)["input_ids"]
        assert tokenizer(text)[0].tolist() == padded(expected)
    assert len(tokenizer.encode("vocal thanh")) == 2


def test_learned_merges_spell_known_words_with_one_id(tmp_path):
    save_merges(LEARNED, tmp_path / "merges.txt")
    tokenizer = Tokenizer(tmp_path)
    assert [len(tokenizer.encode(word)) for word in ("low", "lower", "newest", "widest", "lowest")] == [1, 1, 1, 1, 2]
