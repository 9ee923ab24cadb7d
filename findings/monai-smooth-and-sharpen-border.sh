#!/usr/bin/env bash
# monai 1.6.1, torch 2.13.0, scipy 1.17.1: GaussianSmooth and GaussianSharpen, as a countermeasure or as an augmentation of small images.
#
# GUESS: a flat image comes back flat, as from the filters of other libraries, which repeat or reflect the border.
# BEHAVIOUR: what is outside the image is taken for 0. GaussianSmooth(1) of a flat 0.5 has 0.24 in the corners and 0.35 along the border,
# and a quarter of the values of an image of 32 pixels a side are changed by more than 1/255; with a sigma of 2 half of them are. Sharpening
# subtracts such a blur thirty times, so a flat image gets a border of 2.2, and nine of ten values are changed. The same package's
# MedianSmooth leaves it flat, and in CT scans, whose border is 0, nothing of it can be seen. The documentation of both says nothing of it.
# OUTPUT SEEN:
#   monai 1.6.1 torch 2.13.0+cpu scipy 1.17.1, a flat image of 0.5, 32 x 32
#     scipy gaussian_filter, sigma 1: 0.50 to 0.50, changed by more than 1/255: 0 %
#     MedianSmooth(1): 0.50 to 0.50, changed by more than 1/255: 0 %
#     GaussianSmooth(1): 0.24 to 0.50, changed by more than 1/255: 24 %
#     GaussianSmooth(2): 0.18 to 0.50, changed by more than 1/255: 53 %
#     GaussianSharpen(): 0.50 to 2.21, changed by more than 1/255: 88 %
#   as described: what is outside is taken for 0
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps monai==1.6.1
cat > "$tmp/check.py" <<'PY'
import monai, scipy, torch
from monai.transforms import GaussianSharpen, GaussianSmooth, MedianSmooth
from scipy.ndimage import gaussian_filter

flat = torch.full((3, 32, 32), 0.5)
print("monai", monai.__version__, "torch", torch.__version__, "scipy", f"{scipy.__version__}, a flat image of 0.5, 32 x 32")

def seen(what, made):
    made = torch.as_tensor(made)
    low, high = made.min().item(), made.max().item()
    changed = 100 * ((made - flat).abs() > 1 / 255).float().mean().item()
    print(f"  {what}: {low:.2f} to {high:.2f}, changed by more than 1/255: {changed:.0f} %")
    return low, high, changed

flat_again = [seen("scipy gaussian_filter, sigma 1", gaussian_filter(flat.numpy(), (0, 1, 1))), seen("MedianSmooth(1)", MedianSmooth(1)(flat))]
assert all(changed == 0 for _, _, changed in flat_again)
low, _, changed = seen("GaussianSmooth(1)", GaussianSmooth(1.0)(flat))
assert low < 0.3 and changed > 20
low, _, changed = seen("GaussianSmooth(2)", GaussianSmooth(2.0)(flat))
assert low < 0.25 and changed > 50
_, high, changed = seen("GaussianSharpen()", GaussianSharpen()(flat))
assert high > 2 and changed > 80
print("as described: what is outside is taken for 0")
PY
"$tmp/venv/bin/python" -W ignore "$tmp/check.py"
