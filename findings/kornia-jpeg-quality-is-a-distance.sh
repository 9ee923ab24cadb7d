#!/usr/bin/env bash
# kornia 0.9.0, torch 2.13.0, Pillow 13.0.0: RandomJPEG(jpeg_quality=10.0, p=1.0), as a purification of noise of +-8/255.
#
# GUESS of whoever calls it: JPEG of quality 10, the usual baseline of this field, as in Pillow. (The source had been read before this was
# run.)
# BEHAVIOUR: a single number is the distance from 50, drawn for each image: 10 gives qualities 40 to 60, 49 gives 1 to 99, and the stronger
# the compression that one asks for, the weaker it is. Nearly three times as much of the noise is left as quality 10 leaves: 11 % for 4.
# Above 50 it raises. (10.0, 10.0) is quality 10. The documentation calls the number "the range of compression rates"; one comment in its
# example, that 20.0 samples from 30 to 70, is all that says so.
# OUTPUT SEEN:
#   kornia 0.9.0 torch 2.13.0+cpu Pillow 13.0.0
#     Pillow, quality=10: 4.0 % of the noise left
#     Pillow, quality=50: 10.4 % of the noise left
#     RandomJPEG(jpeg_quality=10.0): qualities 40 to 60, 11.0 % of the noise left
#     RandomJPEG(jpeg_quality=20.0): qualities 30 to 69, 11.2 % of the noise left
#     RandomJPEG(jpeg_quality=49.0): qualities 1 to 99, 14.6 % of the noise left
#     RandomJPEG(jpeg_quality=(10.0, 10.0)): qualities 10 to 10, 4.3 % of the noise left
#     RandomJPEG(jpeg_quality=75.0): jpeg_quality out of bounds. Expected inside (1, 100), got tensor([-25., 125.]).
#   as described: a single quality is how far from 50 it may be
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 pillow==13.0.0
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps kornia==0.9.0 kornia-rs==0.2.0
cat > "$tmp/check.py" <<'PY'
import io, warnings
import numpy as np, PIL, torch
from PIL import Image
import kornia
from kornia.augmentation import RandomJPEG

print("kornia", kornia.__version__, "torch", torch.__version__, "Pillow", PIL.__version__)
warnings.simplefilter("error")                                                  # nothing is said
torch.manual_seed(0)
smooth = torch.nn.functional.interpolate(0.3 + 0.4 * torch.rand(200, 3, 5, 5), (32, 32), mode="bicubic").clamp(0.1, 0.9)
images = (smooth * 255).round() / 255
noise = 8 / 255 * torch.randn_like(images).sign()

def pillow(x, quality):
    made = []
    for image in (x * 255).round().byte().permute(0, 2, 3, 1).numpy():
        held = io.BytesIO()
        Image.fromarray(image).save(held, "JPEG", quality=quality)
        made.append(np.asarray(Image.open(held)))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2) / 255

def left(compress):                                                             # of the noise, in what compression makes of both
    apart = compress(images + noise) - compress(images)
    return 100 * ((apart * noise).sum() / noise.square().sum()).item()

def asked(quality):
    augmentation = RandomJPEG(jpeg_quality=quality, p=1.0)
    share = left(augmentation)
    used = augmentation._params["jpeg_quality"]
    print(f"  RandomJPEG(jpeg_quality={quality}): qualities {used.min():.0f} to {used.max():.0f}, {share:.1f} % of the noise left")
    return used, share
seen = {}
for quality in (10, 50):
    seen[quality] = left(lambda x, quality=quality: pillow(x, quality))
    print(f"  Pillow, quality={quality}: {seen[quality]:.1f} % of the noise left")
for quality in (10.0, 20.0, 49.0, (10.0, 10.0)):
    seen["kornia", quality] = asked(quality)
used, share = seen["kornia", 10.0]
assert 39.9 < used.min() < 43 and 57 < used.max() < 60.1 and share > 2 * seen[10]
used, share = seen["kornia", 49.0]
assert used.min() < 5 and used.max() > 95
used, share = seen["kornia", (10.0, 10.0)]
assert used.min() == used.max() == 10 and abs(share - seen[10]) < 1
try:
    RandomJPEG(jpeg_quality=75.0)
    raise AssertionError
except ValueError as error:
    print(f"  RandomJPEG(jpeg_quality=75.0): {error}")
print("as described: a single quality is how far from 50 it may be")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
