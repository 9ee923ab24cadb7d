#!/usr/bin/env bash
# mosaicml-streaming 0.13.0 (encoding "pil") and litdata 0.2.76 (images), Pillow 13.0.0: a PNG with a palette goes into a dataset.
#
# A perturbed drawing of few colours, saved as a PNG with a palette, as optimizers of PNGs do of themselves since nothing is lost by it.
# Guess, written before the first run (2026-11-29, source not read): it comes back from both with its colours. (The source was read after
# litdata's first run, before streaming's.)
# BEHAVIOUR: from both it comes back in mode P, of the right size, with the right indices, and with an empty palette: converted to RGB, as
# loaders do, it is black everywhere. Nothing is said when it is written, nor when it is read. The same picture in RGB is kept, and
# so is the first in streaming's encoding "png". Both store the mode, the size and what tobytes() gives, which has no palette. That those
# three are not enough is told to a user in issue 6788 of python-pillow/Pillow; in the two libraries no issue on it was found.
# OUTPUT SEEN:
#   mosaicml-streaming 0.13.0 litdata 0.2.76 Pillow 13.0.0
#   mode RGB  the file itself  furthest from the picture   0, brightest value 248
#   mode RGB  streaming, png   furthest from the picture   0, brightest value 248
#   mode RGB  streaming, pil   furthest from the picture   0, brightest value 248
#   mode RGB  litdata          furthest from the picture   0, brightest value 248
#   mode P    the file itself  furthest from the picture   0, brightest value 248
#   mode P    streaming, png   furthest from the picture   0, brightest value 248
#   mode P    streaming, pil   furthest from the picture 248, brightest value   0
#   mode P    litdata          furthest from the picture 248, brightest value   0
#   warnings and log lines: []
#   as described: what is read back is black
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=$tmp/hf HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.1.3 pillow==13.0.0 boto3==1.44.8 requests==2.34.2 \
    Brotli==1.2.0 catalogue==2.0.10 python-snappy==0.7.3 xxhash==3.6.0 zstd==1.5.7.2 tqdm==4.70.1 packaging==26.2
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps mosaicml-streaming==0.13.0 litdata==0.2.76 lightning-utilities==0.15.3 \
    obstore==0.12.1 tifffile==2026.3.3 torchvision==0.28.0
cat > "$tmp/check.py" <<'PY'
import importlib.metadata, io, logging, sys, tempfile, types, warnings
import numpy as np, PIL, torch
from PIL import Image
try:
    import torchvision
except RuntimeError:                  # a CPU build of torch beside PyPI's torchvision, whose compiled operators then do not load;
    for name in [n for n in sys.modules if n.startswith("torchvision")]:                            # none of them is used here
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
for name, kind in {"feature_extraction_utils": "BatchFeature", "tokenization_utils_base": "BatchEncoding",          # streaming names these
                   "models.auto.tokenization_auto": "AutoTokenizer"}.items():                           # for text, which is not used here
    sys.modules["transformers." + name] = types.SimpleNamespace(**{kind: object})
from litdata import StreamingDataset
from litdata.streaming import Cache
from streaming import LocalDataset, MDSWriter

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("mosaicml-streaming", "litdata")), "Pillow", PIL.__version__)
spoken = []
class Ear(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING:
            spoken.append(record.getMessage())
for name in ("streaming", "litdata", "PIL"):
    logging.getLogger(name).addHandler(Ear())

drawing = np.full((32, 32, 3), (200, 40, 60))
drawing[16:], drawing[8:24, 8:24] = (20, 120, 220), (240, 220, 40)
signs = np.random.default_rng(0).choice([-8, 8], (4, 4, 3)).repeat(8, 0).repeat(8, 1)                    # one for each patch of 8 x 8
picture = (drawing + signs).astype(np.uint8)
def opened(mode):
    file = io.BytesIO()
    image = Image.fromarray(picture)
    (image if mode == "RGB" else image.quantize(256)).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()))
def mds(encoding, image):
    folder = tempfile.mkdtemp()
    with MDSWriter(out=folder, columns={"image": encoding}) as writer:
        writer.write({"image": image})
    return LocalDataset(folder)[0]["image"]
def lit(image):
    folder = tempfile.mkdtemp()
    cache = Cache(input_dir=folder, chunk_size=10)
    cache[0] = {"image": image}
    cache.done()
    cache.merge(1)
    return StreamingDataset(folder)[0]["image"]

seen = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for mode in ("RGB", "P"):
        for name, store in {"the file itself": lambda image: image, "streaming, png": lambda image: mds("png", image),
                            "streaming, pil": lambda image: mds("pil", image), "litdata": lit}.items():
            image = store(opened(mode))
            assert image.mode == mode and image.size == (32, 32)
            if mode == "P":
                assert (np.asarray(image) == np.asarray(opened("P"))).all()
            pixels = np.asarray(image.convert("RGB")).astype(int)
            seen[mode, name] = np.abs(pixels - picture).max(), pixels.max()
            print(f"mode {mode:4} {name:16} furthest from the picture {seen[mode, name][0]:3}, brightest value {seen[mode, name][1]:3}")
said = [str(w.message) for w in caught if any(n in w.filename for n in ("streaming", "litdata", "PIL"))
        and not issubclass(w.category, ResourceWarning)] + spoken                       # (an index file that is left open)
print("warnings and log lines:", said)
assert not said
for (mode, name), (far, bright) in seen.items():
    assert (far, bright) == ((int(picture.max()), 0) if mode == "P" and name in ("streaming, pil", "litdata") else (0, int(picture.max())))
print("as described: what is read back is black")
PY
TMPDIR=$tmp "$tmp/venv/bin/python" "$tmp/check.py"
