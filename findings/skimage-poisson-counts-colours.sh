#!/usr/bin/env bash
# scikit-image 0.26.0: random_noise(image, "poisson") of an image, and of the same image with a perturbation of at most 8/255.
#
# Noise is the simplest defence against a perturbation, and Poisson noise has no strength to choose.
# Guess, written before the first run (2026-11-29): the perturbed image gets as much noise as the clean one, to 10 %, in 8 bits and in
# float. (The source had been seen years ago, and it was expected that this would fail; by how much was not known.)
# BEHAVIOUR: the number of different values in the array sets the strength. A photograph in 8 bits has 255 of them, and gets noise of 11
# levels of 255. As float, with a perturbation that is no whole number of levels, it has 190000, and gets 0.35, a thirtieth. Rounded to 8
# bits it has 11 again. One perturbed square of 32 x 32 gets 2, 64 of them in one array 0.35; a flat gray image, of one value, turns into
# mere noise. The documentation says only "Poisson-distributed noise generated from the data". That the values are counted was a choice, to
# guess the bit depth (pull request 772 of scikit-image; a user asks about it in issue 4885). What it does to a float image that was
# changed, as here, was not found there.
# OUTPUT SEEN:
#   scikit-image 0.26.0 numpy 2.4.6
#   photograph, 8 bits                               255 values, noise of  11.09 levels
#   photograph, float                                255 values, noise of  11.09 levels
#   perturbed, float                              190777 values, noise of   0.35 levels
#   perturbed, float32                            189441 values, noise of   0.35 levels
#   perturbed, rounded to 8 bits                     256 values, noise of  11.13 levels
#   corner of 32 x 32, 8 bits                        235 values, noise of   8.13 levels
#   corner of 32 x 32, perturbed, float             2896 values, noise of   2.00 levels
#   64 such squares at once                       190777 values, noise of   0.35 levels
#   flat gray, 8 bits                                  1 values, noise of 182.40 levels
#   as described: an imperceptible perturbation takes away the noise that is to drown it
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile scikit-image==0.26.0 numpy==2.4.6 scipy==1.17.1 pillow==13.0.0
cat > "$tmp/check.py" <<'PY'
import warnings
import numpy as np
import skimage
from skimage import data
from skimage.util import random_noise

print("scikit-image", skimage.__version__, "numpy", np.__version__)
warnings.simplefilter("error")                                                                  # nothing is said
rng = np.random.default_rng(0)
photograph = data.astronaut()[:256, :256]                                                       # which the package carries
perturbed = np.clip(photograph / 255 + rng.uniform(-8 / 255, 8 / 255, photograph.shape), 0, 1)
eight = (perturbed * 255).round().astype(np.uint8)

def strength(name, image):
    clean = image / 255 if image.dtype == np.uint8 else image
    levels = 255 * (random_noise(image, "poisson", rng=1, clip=False) - clean).std()
    print(f"{name:44} {len(np.unique(image)):7} values, noise of {levels:6.2f} levels")
    return levels

seen = [strength("photograph, 8 bits", photograph),
        strength("photograph, float", photograph / 255),
        strength("perturbed, float", perturbed),
        strength("perturbed, float32", perturbed.astype(np.float32)),
        strength("perturbed, rounded to 8 bits", eight)]
corner, many = perturbed[:32, :32], np.stack([perturbed[32 * (i // 8):][:32, 32 * (i % 8):][:, :32] for i in range(64)])
seen += [strength("corner of 32 x 32, 8 bits", photograph[:32, :32]),
         strength("corner of 32 x 32, perturbed, float", corner),
         strength("64 such squares at once", many),
         strength("flat gray, 8 bits", np.full((32, 32, 3), 128, np.uint8))]
assert np.abs(perturbed - photograph / 255).max() < 8.01 / 255
assert 10.5 < seen[0] < 11.5 and abs(seen[1] - seen[0]) < 0.01
assert seen[2] < seen[0] / 25 and seen[3] < seen[0] / 25 and abs(seen[4] - seen[0]) < 0.5
assert seen[6] < seen[5] / 3 and seen[7] < seen[6] / 3 and seen[8] > 150
assert "Poisson-distributed noise generated from the data" in " ".join(random_noise.__doc__.split())
print("as described: an imperceptible perturbation takes away the noise that is to drown it")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
