#!/usr/bin/env bash
# torchvision 0.28.0 (v2.GaussianNoise, torch 2.13.0) and albumentations 2.0.8 (GaussNoise): noise of k/255 on a gray uint8 image.
#
# GUESS, before running (for k = 8): mean shift below 0.05 levels, standard deviation 8.0 +- 0.05, as on the same image in float.
# BEHAVIOUR: both cut the noise to whole levels towards zero before they add it, so it shrinks: 7.6 for 8, 1.6 for 2, 0.7 for 1, and with
# k = 0.5, 95 % of the values are not touched at all (rounded, they would have 8.01, 2.02, 1.04, 0.57). On float images both are exact.
# torchvision's documentation: "Regardless of the dtype used, the parameters of the function use the same scale"; a mean of 0.9/255 with
# sigma 0 changes nothing in uint8.
# OUTPUT SEEN:
#   torchvision 0.28.0+cu130 albumentations 2.0.8 torch 2.13.0+cpu
#   sigma 8/255: uint8 torchvision 7.61 albumentations 7.61; float 8.00 8.00; untouched 10 %
#   sigma 2/255: uint8 torchvision 1.65 albumentations 1.64; float 2.00 2.00; untouched 38 %
#   sigma 1/255: uint8 torchvision 0.68 albumentations 0.68; float 1.00 1.00; untouched 68 %
#   sigma 0.5/255: uint8 torchvision 0.21 albumentations 0.21; float 0.50 0.50; untouched 95 %
#   mean 0.9/255, sigma 0: uint8 0.00, float 0.90
#   as described
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 NO_ALBUMENTATIONS_UPDATE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 pillow==13.0.0 albumentations==2.0.8
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps torchvision==0.28.0
cat > "$tmp/check.py" <<'PY'
import sys
import numpy as np
import torch
try:
    import torchvision
except RuntimeError:                  # a CPU build of torch beside PyPI's torchvision, whose compiled operators then do not load;
    for name in [n for n in sys.modules if n.startswith("torchvision")]:                            # none of them is used here
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
import albumentations
from torchvision.transforms import v2

print("torchvision", torchvision.__version__, "albumentations", albumentations.__version__, "torch", torch.__version__)
torch.manual_seed(0)
gray = torch.full((3, 512, 512), 128, dtype=torch.uint8)
array = np.full((512, 512, 3), 128, np.uint8)
expected = {8: 7.61, 2: 1.64, 1: 0.68, 0.5: 0.21}
for k, wanted in expected.items():
    one = v2.GaussianNoise(sigma=k / 255)
    other = albumentations.GaussNoise(std_range=(k / 255, k / 255), p=1)
    a = one(gray).float() - 128
    b = other(image=array)["image"].astype(float) - 128
    exact = [(one(gray / 255) * 255 - 128).std().item(), other(image=(array / 255).astype(np.float32))["image"].std() * 255]
    print(f"sigma {k}/255: uint8 torchvision {a.std():.2f} albumentations {b.std():.2f}; float {exact[0]:.2f} {exact[1]:.2f};",
          f"untouched {100 * (a == 0).float().mean():.0f} %")
    assert abs(a.std().item() - wanted) < 0.03 and abs(b.std() - wanted) < 0.03
    assert abs(exact[0] - k) < 0.03 and abs(exact[1] - k) < 0.03
shifted = v2.functional.gaussian_noise(gray, mean=0.9 / 255, sigma=0.), v2.functional.gaussian_noise(gray / 255, mean=0.9 / 255, sigma=0.)
print(f"mean 0.9/255, sigma 0: uint8 {shifted[0].float().mean() - 128:.2f}, float {(shifted[1] * 255).mean() - 128:.2f}")
assert shifted[0].eq(128).all() and abs((shifted[1] * 255).mean().item() - 128.9) < 0.01
assert "Regardless of the dtype used" in v2.GaussianNoise.__doc__
print("as described")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
