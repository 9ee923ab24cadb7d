#!/usr/bin/env bash
# datasets 5.2.0 and litdata 0.2.76 with Pillow 13.0.0: images that are changed in place, then stored.
#
# A perturbation of 8/255 is pasted into an image that Pillow has opened (image.paste).
# GUESS of whoever has not read their source: what is stored are the pixels that the image has at that moment, all of them 8.0 from the
# original. Ours, before running, was that both look at the image's `filename`; that was read in their source first.
# BEHAVIOUR: both store the file that the image was once opened from, as it was. load_dataset("imagefolder").map(protect) returns the
# unprotected images, as if `protect` had done nothing, and so do Dataset.from_dict, and what save_to_disk writes; litdata does it to JPEGs,
# PNGs it stores as they are. The `filename` outlives what is done in place, and both take it for the content. The same pixels in a
# new image (Image.fromarray) are kept. Nothing is said.
# OUTPUT SEEN:
#   datasets 5.2.0 litdata 0.2.76 Pillow 13.0.0 numpy 2.4.6
#   mean distance from the original, in memory: 8.0
#   datasets, from_dict     PNG   in place 0.0   as a new image 8.0
#   datasets, from_dict     JPEG  in place 0.0   as a new image 8.0
#   datasets, map           PNG   in place 0.0   as a new image 8.0
#   datasets, save_to_disk  PNG   in place 0.0   as a new image 8.0
#   litdata, serializer     PNG   in place 8.0   as a new image 8.0
#   litdata, serializer     JPEG  in place 0.0   as a new image 8.0
#   warnings and log lines: []
#   as described: what is published has no protection
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 HF_HOME=$tmp/hf HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 datasets==5.2.0 pillow==13.0.0 numpy==2.4.6 boto3==1.44.8 requests==2.34.2
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps litdata==0.2.76 lightning-utilities==0.15.3 obstore==0.12.1 tifffile==2026.3.3
cat > "$tmp/check.py" <<'PY'
import io, logging, os, tempfile, warnings
import numpy as np, PIL
from PIL import Image
import datasets, litdata
from litdata.streaming.serializers import JPEGSerializer, PILSerializer

print("datasets", datasets.__version__, "litdata", litdata.__version__, "Pillow", PIL.__version__, "numpy", np.__version__)
datasets.disable_progress_bars()
spoken = []
class Ear(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING:
            spoken.append(record.getMessage())
for name in ("datasets", "litdata"):
    logging.getLogger(name).addHandler(Ear())

signs = np.sign(np.random.default_rng(0).standard_normal((32, 32, 3))).astype(int)
def pasted(image):                                                      # the opened image itself, with other pixels
    image.paste(changed(image))
    return image
def changed(image):                                                     # a new image with the same pixels
    return Image.fromarray((np.asarray(image) + 8 * signs).astype(np.uint8))
def folder(kind):
    path = tempfile.mkdtemp()
    Image.new("RGB", (32, 32), (100, 120, 140)).save(f"{path}/0.{kind}")
    return path
def opened(kind):
    return Image.open(f"{folder(kind)}/0.{kind}")
def distance(image, kind):
    return round(float(np.abs(np.asarray(image).astype(int) - np.asarray(opened(kind))).mean()), 1)

def from_dict(kind, protect):
    return datasets.Dataset.from_dict({"image": [protect(opened(kind))]})[0]["image"]
def mapped(kind, protect):
    loaded = datasets.load_dataset("imagefolder", data_dir=folder(kind), split="train", cache_dir=tempfile.mkdtemp())
    return loaded.map(lambda row: {"image": protect(row["image"])})[0]["image"]
def saved(kind, protect):
    out = tempfile.mkdtemp() + "/saved"
    datasets.Dataset.from_dict({"image": [protect(opened(kind))]}).save_to_disk(out)
    return datasets.load_from_disk(out)[0]["image"]
def serialized(kind, protect):
    image = protect(opened(kind))
    content, _ = (JPEGSerializer() if image.format == "JPEG" else PILSerializer()).serialize(image)
    return Image.open(io.BytesIO(content)) if image.format == "JPEG" else PILSerializer.deserialize(content)

print("mean distance from the original, in memory:", distance(pasted(opened("png")), "png"))
seen = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for label, store, kind in [("datasets, from_dict", from_dict, "png"), ("datasets, from_dict", from_dict, "jpeg"),
                               ("datasets, map", mapped, "png"), ("datasets, save_to_disk", saved, "png"),
                               ("litdata, serializer", serialized, "png"), ("litdata, serializer", serialized, "jpeg")]:
        seen.append((distance(store(kind, pasted), kind), distance(store(kind, changed), kind)))
        print(f"{label:23} {kind.upper():5} in place {seen[-1][0]}   as a new image {seen[-1][1]}")
spoken += [str(w.message) for w in caught if "datasets" in w.filename or "litdata" in w.filename]
print("warnings and log lines:", spoken)
assert [place for place, _ in seen] == [0, 0, 0, 0, 8, 0] and {new for _, new in seen} == {8}
assert spoken == []
print("as described: what is published has no protection")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
