"""The folders of the ENTRep challenge, as its participants' public code shows them.

train/imgs/*.png      train/cls.json  {"a.png": "nose-right", …}   train/t2i.json  {"description": "image.png", …}
public/images/*.png   public/data.json  [{"Path", "Classification", "Description", "DescriptionEN"}, …]
test/imgs/*.png       without labels in the challenge; they may be added as a cls.json or data.json
"""

import json
import tempfile
from pathlib import Path

from errors import UserError
from images import find_files, find_images
from prompts import ENTREP_PROMPTS


def read_entrep(root):
    """The ENTRep layout → rows (image file, class name, caption or None, split or None), else [].

    train/cls.json {image: class name or number} with train/t2i.json {description: image} beside it, and
    public/data.json, a list of {"Path", "Classification", "DescriptionEN", "Description"}. Image names are matched
    without regard to case, at any depth below the JSON file's folder. Images without labels are left out. Where those
    in the folder test have some, their split is test, and that of the others train; else there is no split.
    """
    found = []
    for index in find_files(root, lambda file: file.name in ("cls.json", "data.json")):
        try:
            entries = json.loads(index.read_text(encoding="utf-8-sig"))
            if index.name == "data.json":
                rows = [
                    (row["Path"], row["Classification"], row.get("DescriptionEN") or row.get("Description") or None)
                    for row in entries
                ]
            else:
                t2i = index.with_name("t2i.json")
                described = json.loads(t2i.read_text(encoding="utf-8-sig")) if t2i.is_file() else {}
                captions = {image: text for text, image in described.items()}
                rows = [(image, label, captions.get(image)) for image, label in entries.items()]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
            raise UserError(f"{index} is not as ENTRep's is ({type(problem).__name__}: {problem})") from None
        files = {file.name.lower(): file for file in find_images(index.parent)}
        names = list(ENTREP_PROMPTS)
        for image, label, caption in rows:
            name = Path(image).name
            if name.lower() not in files:
                raise UserError(f"{index} names {name}, which is not in {index.parent}")
            if str(label).isdigit() and int(label) < len(names):
                label = names[int(label)]
            if label not in names:
                raise UserError(f"{index} gives {name} the unknown label {label!r}; known are {', '.join(names)}")
            part = "test" if "test" in index.relative_to(root).parts else "train"
            found.append((files[name.lower()], label, caption, part))
    tested = any(part == "test" for *_, part in found)
    return [(file, label, caption, part if tested else None) for file, label, caption, part in found]


def main():
    """Read phantoms that were written in this layout."""
    from phantom import write_dataset

    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder, "challenge"), count=8)
        for file, label, caption, split in read_entrep(folder):
            print(f"{split:5} {file.relative_to(folder)!s:38} {label:11} {caption}")


if __name__ == "__main__":
    main()
