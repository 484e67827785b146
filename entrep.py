"""The folders of the ENTRep challenge, as its participants' public code shows them.

train/imgs/*.png      train/cls.json  {"a.png": "nose-right", …}   train/t2i.json  {"description": "a.png", …}
                      train/i2i.json  {"query.png": "match.png", …}
public/images/*.png   public/data.json  [{"Path", "Classification", "Description", "DescriptionEN"}, …]
test/imgs/*.png       test/cls.csv, test/i2i.csv: names of images; test/t2i.csv: descriptions; a query a line. There are
                      no labels in the challenge; they may be added as a cls.json or data.json
"""

import json
import re
import tempfile
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from errors import UserError
from files import read_json, read_text, whole
from images import IMAGE_SUFFIXES, find_files, find_images
from prompts import ENTREP_PROMPTS, plain_name

QUOTED = re.compile(r'"(?:[^"]|"")*"')


def read_entrep(root):
    """The ENTRep layout → rows, each {"image", "label", "captions", "split", "match"} as `data.Sample` has them, else
    [].

    train/cls.json {image: class name or number}, with train/t2i.json {description: image} and train/i2i.json {image:
    the image that a search by it should find} beside it; and public/data.json, a list of {"Path", "Classification",
    "DescriptionEN", "Description"}, of which the latter is the former in Vietnamese and counts only by itself. Each
    lies above a folder named imgs or images. Image names are matched without regard to case, at any depth below the
    JSON file's folder. Images without labels are left out. Where those in the folder test have some, their split is
    test, and that of the others train; else there is no split. Raises UserError.
    """
    found = []
    for index in find_files(root, lambda name: name in ("cls.json", "data.json")):
        files = find_images(index.parent)
        if not any(file.parent.name.lower() in ("imgs", "images") for file in files):
            continue  # another program's file that is called the same
        by_name = names_of(files)
        split = "test" if "test" in index.relative_to(root).parts else "train"
        t2i, i2i = index.with_name("t2i.json"), index.with_name("i2i.json")
        captions, matches = {}, {}
        if index.name == "cls.json":
            for text, image in _texts(t2i, '{"a polyp": "a.png", …}').items():
                if _plain(image) in by_name:  # of an image that has no label, perhaps
                    captions.setdefault(find_name(image, by_name, t2i), []).append(text)
            for image, match in _texts(i2i, '{"a.png": "b.png", …}').items():
                matches[find_name(image, by_name, i2i)] = find_name(match, by_name, i2i)
        for image, label, own in _entries(index):
            file = find_name(image, by_name, index)
            row = {"image": file, "label": _class(label, image, index), "split": split, "match": matches.get(file)}
            found.append(row | {"captions": own or tuple(captions.get(file, ()))})
    tested = any(row["split"] == "test" for row in found)
    return found if tested else [row | {"split": None} for row in found]


def _entries(index):
    """cls.json or data.json → [(image's name, label, captions that stand there)]."""
    entries = read_json(index)
    if index.name == "cls.json":
        if not isinstance(entries, dict):
            raise UserError(f'{index} should be a JSON object like {{"a.png": "throat", …}}; correct it')
        return [(image, label, ()) for image, label in entries.items()]
    rows = entries if isinstance(entries, list) else [None]
    for row in rows:
        texts = [row.get(key) for key in ("Path", "DescriptionEN", "Description")] if isinstance(row, dict) else []
        if not (texts and isinstance(texts[0], str) and all(isinstance(t, (str, type(None))) for t in texts)):
            raise UserError(
                f'{index} should be a list of {{"Path": …, "Classification": …, "Description": …}}; correct it'
            )
    captions = [row.get("DescriptionEN") or row.get("Description") for row in rows]
    return [
        (row["Path"], row.get("Classification"), (caption,) if caption else ())
        for row, caption in zip(rows, captions, strict=True)
    ]


def _texts(file, example):
    """→ a JSON object of texts; {} where there is no such file."""
    found = read_json(file) if file.is_file() else {}
    if not (isinstance(found, dict) and all(isinstance(value, str) for value in found.values())):
        raise UserError(f"{file} should be a JSON object like {example}; correct it")
    return found


def _plain(image):
    """A name as it is compared: "imgs\\A.png" and "a.PNG" are the same."""
    return PureWindowsPath(image).name.lower()


def names_of(files):
    """Image files → {name as it is compared: files of that name}."""
    by_name = {}
    for file in files:
        by_name.setdefault(_plain(file.name), []).append(file)
    return by_name


def find_name(image, by_name, index):
    """→ the file of an image that `index` names. A path says which, where two folders have files of the same name."""
    files = by_name.get(_plain(image), [])
    files = [file for file in files if file.name == PureWindowsPath(image).name] or files  # A.png beside a.png
    parts = PurePosixPath(PureWindowsPath(image).as_posix().lower()).parts
    if len(files) > 1:
        files = [f for f in files if tuple(part.lower() for part in f.parts)[-len(parts) :] == parts]
    if not files:
        raise UserError(f"{index} names {image}, which is not among the images; put it there, or delete the entry")
    if len(files) > 1:
        raise UserError(
            f"{index} names {image}, of which there are two: {files[0]} and {files[1]}; write its path, or rename one"
        )
    return files[0]


def _class(label, image, index):
    """A class's name or number → its name."""
    names = list(ENTREP_PROMPTS)
    numbers = {str(number): name for number, name in enumerate(names)}
    name = label if label in names else numbers.get(str(label))
    if name is None:
        raise UserError(f"{index} gives {image} the unknown label {label!r}; correct it to one of {', '.join(names)}")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Submissions: a JSON object for each task, {query: answer}, in the order of the queries


def read_queries(file):
    """test/cls.csv, i2i.csv or t2i.csv → their lines. There is no heading, and a line is a query, whatever commas and
    quotation marks it has; only one that is in quotation marks as a whole, as CSV has it, is without them."""
    text = read_text(file)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{file} is not UTF-8; save it as UTF-8")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    queries = [line[1:-1].replace('""', '"') if QUOTED.fullmatch(line) else line for line in lines if line.strip()]
    if not queries:
        raise UserError(f"there are no queries in {file}; give the challenge's cls.csv, i2i.csv or t2i.csv")
    return queries


def name_images(queries):
    """Whether queries are names of images, and no descriptions."""
    return any(Path(_bare(query)).suffix.lower() in IMAGE_SUFFIXES for query in queries)


def find_queries(queries, files, file):
    """Names of images → their files. Raises UserError for one that is not among the files."""
    by_name = names_of(files)
    return [find_name(_bare(query), by_name, file) for query in queries]


def _bare(query):
    return query.rstrip(", ").strip()


def class_numbers(classes):
    """→ {class: number}, as the challenge numbers its classes. Raises UserError for one that it does not know."""
    known = {plain_name(name): number for number, name in enumerate(ENTREP_PROMPTS)}
    unknown = [name for name in classes if plain_name(name) not in known]
    if unknown:
        raise UserError(
            f"the run has the class {unknown[0]!r}, for which the ENTRep challenge has no number; use a run of its "
            f"classes with --queries: {', '.join(ENTREP_PROMPTS)}"
        )
    return {name: known[plain_name(name)] for name in classes}


def zip_submission(answers, name, file):
    """Write a zip archive with one JSON file in it."""
    with whole(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.json", json.dumps(answers, indent=2))


def main():
    """Read phantoms that were written in this layout."""
    from phantom import write_dataset

    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder, "challenge"), count=8)
        for row in read_entrep(folder):
            print(f"{row['split']:5} {row['image'].relative_to(folder)!s:38} {row['label']:11} {row['captions']}")


if __name__ == "__main__":
    main()
