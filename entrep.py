"""The folders of the ENTRep challenge, as its participants' public code shows them.

train/imgs/*.png      train/cls.json  {"a.png": "nose-right", …}   train/t2i.json  {"description": "image.png", …}
public/images/*.png   public/data.json  [{"Path", "Classification", "Description", "DescriptionEN"}, …]
test/imgs/*.png       without labels in the challenge; they may be added as a cls.json or data.json
"""

import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from errors import UserError
from files import read_json
from images import find_files, find_images
from prompts import ENTREP_PROMPTS


def read_entrep(root):
    """The ENTRep layout → rows (image file, class name, caption or None, split or None), else [].

    train/cls.json {image: class name or number} with train/t2i.json {description: image} beside it, and
    public/data.json, a list of {"Path", "Classification", "DescriptionEN", "Description"}; each lies above a folder
    named imgs or images. Image names are matched without regard to case, at any depth below the JSON file's folder.
    Images without labels are left out. Where those in the folder test have some, their split is test, and that of the
    others train; else there is no split. Raises UserError.
    """
    found = []
    for index in find_files(root, lambda name: name in ("cls.json", "data.json")):
        files = find_images(index.parent)
        if not any(file.parent.name.lower() in ("imgs", "images") for file in files):
            continue  # another program's file that is called the same
        by_name = {}
        for file in files:
            by_name.setdefault(file.name.lower(), []).append(file)
        for image, label, caption in _entries(index):
            part = "test" if "test" in index.relative_to(root).parts else "train"
            found.append((_find(image, by_name, index), _class(label, image, index), caption, part))
    tested = any(part == "test" for *_, part in found)
    return [(file, label, caption, part if tested else None) for file, label, caption, part in found]


def _entries(index):
    """cls.json or data.json → [(image's name, label, caption or None)]."""
    entries = read_json(index)
    if index.name == "data.json":
        rows = entries if isinstance(entries, list) else [None]
        for row in rows:
            texts = [row.get(key) for key in ("Path", "DescriptionEN", "Description")] if isinstance(row, dict) else []
            if not (texts and isinstance(texts[0], str) and all(isinstance(t, (str, type(None))) for t in texts)):
                raise UserError(
                    f'{index} should be a list of {{"Path": …, "Classification": …, "Description": …}}; correct it'
                )
        return [(r["Path"], r.get("Classification"), r.get("DescriptionEN") or r.get("Description")) for r in rows]
    t2i = index.with_name("t2i.json")
    described = read_json(t2i) if t2i.is_file() else {}
    if not isinstance(entries, dict):
        raise UserError(f'{index} should be a JSON object like {{"a.png": "throat", …}}; correct it')
    if not (isinstance(described, dict) and all(isinstance(image, str) for image in described.values())):
        raise UserError(f'{t2i} should be a JSON object like {{"a polyp": "a.png", …}}; correct it')
    captions = {_plain(image): text for text, image in described.items()}
    return [(image, label, captions.get(_plain(image))) for image, label in entries.items()]


def _plain(image):
    """A name as it is compared: "imgs\\A.png" and "a.PNG" are the same."""
    return PureWindowsPath(image).name.lower()


def _find(image, by_name, index):
    """→ the image's file. A path says which, where two folders have files of the same name."""
    files = by_name.get(_plain(image), [])
    parts = PurePosixPath(PureWindowsPath(image).as_posix().lower()).parts
    if len(files) > 1:
        files = [f for f in files if tuple(part.lower() for part in f.parts)[-len(parts) :] == parts]
    if not files:
        raise UserError(f"{index} names {image}, which is not in {index.parent}; put it there, or delete its entry")
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


def main():
    """Read phantoms that were written in this layout."""
    from phantom import write_dataset

    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder, "challenge"), count=8)
        for file, label, caption, split in read_entrep(folder):
            print(f"{split:5} {file.relative_to(folder)!s:38} {label:11} {caption}")


if __name__ == "__main__":
    main()
