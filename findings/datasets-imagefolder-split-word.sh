#!/usr/bin/env bash
# datasets 5.2.0 (Hugging Face), load_dataset("imagefolder"), Pillow 13.0.0, numpy 2.4.6.
#
# A folder of classes, as torchvision's ImageFolder takes it: cat/ dog/ ship/, ten PNGs each.
# GUESS, before running: 30 rows with 3 labels, whatever the files are called; a class called "train_station" is a label like any other.
# BEHAVIOUR: one single file called cat/test_07.png, and load_dataset returns that file alone, as split "test", without labels; the other
# 29 images are gone, with no warning and no log line. A class folder "train_station" (a scene of SUN397; "bullet train" of ImageNet does
# it too): its ten images alone are left, as split "train", without labels. Words: train, training, validation, valid, val, dev, test,
# testing, eval, evaluation, beside any of "-._ 0-9" in a folder's or a file's name; files without the word are dropped as soon as one has
# it. data_files={"train": "**"} gives all of them back. (Issues 5650 and 7201 of huggingface/datasets, open.)
# OUTPUT SEEN:
#   datasets 5.2.0 Pillow 13.0.0 numpy 2.4.6
#   cat dog ship                         {'train': (30, ['cat', 'dog', 'ship'])}
#   cat/07.png renamed to test_07.png    {'test': (1, None)}
#   cat dog train_station                {'train': (10, None)}
#   cat dog 'bullet train'               {'train': (10, None)}
#   cat dog trainstation                 {'train': (30, ['cat', 'dog', 'trainstation'])}
#   warnings and log lines: []
#   as described: 29 and 20 of 30 images are dropped in silence
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 HF_HOME=$tmp/hf HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cat > "$tmp/check.py" <<'PY'
import logging, os, tempfile, warnings
import numpy, PIL
from PIL import Image
import datasets
from datasets import load_dataset

print("datasets", datasets.__version__, "Pillow", PIL.__version__, "numpy", numpy.__version__)
datasets.disable_progress_bars()
spoken = []                                                             # whatever the library says while it loads
class Ear(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING:
            spoken.append(record.getMessage())
logging.getLogger("datasets").addHandler(Ear())

def load(*renames, folders=("cat", "dog", "ship"), **options):
    root = tempfile.mkdtemp()
    for label, folder in enumerate(folders):
        os.makedirs(f"{root}/{folder}")
        for i in range(10):
            name = dict(renames).get(f"{folder}/{i:02}.png", f"{folder}/{i:02}.png")
            Image.new("RGB", (8, 8), (50 * label, 20 * i, 0)).save(f"{root}/{name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_dataset("imagefolder", data_dir=root, cache_dir=tempfile.mkdtemp(), **options)
    spoken.extend(str(w.message) for w in caught if "datasets" in w.filename)
    return {split: (len(d), getattr(d.features.get("label"), "names", None)) for split, d in loaded.items()}

plain = load()
one_file = load(("cat/07.png", "cat/test_07.png"))
one_class = load(folders=("cat", "dog", "train_station"))
bullet = load(folders=("cat", "dog", "bullet train"))
glued = load(folders=("cat", "dog", "trainstation"))
for what, got in [("cat dog ship", plain), ("cat/07.png renamed to test_07.png", one_file), ("cat dog train_station", one_class),
                  ("cat dog 'bullet train'", bullet), ("cat dog trainstation", glued)]:
    print(f"{what:36}", got)
print("warnings and log lines:", spoken)
assert plain == {"train": (30, ["cat", "dog", "ship"])}
assert one_file == {"test": (1, None)}
assert one_class == {"train": (10, None)} and bullet == {"train": (10, None)}
assert glued == {"train": (30, ["cat", "dog", "trainstation"])}
assert spoken == []
print("as described: 29 and 20 of 30 images are dropped in silence")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
