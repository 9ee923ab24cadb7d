#!/usr/bin/env bash
# torchmetrics 1.9.0 against piq 0.8.0 (torch 2.13.0, torchvision 0.28.0): visual information fidelity of the same two gray images in 0..1.
#
# GUESS, before running: visual_information_fidelity(y, x) equals piq.vif_p(y, x, data_range=1.), to 0.01, and does not change if both
# images are given in 0..255.
# BEHAVIOUR: torchmetrics' has no data_range and its constant (the eye's noise, variance 2) is one of 0..255, which its documentation does
# not say. With images in 0..1, as its SSIM, PSNR and LPIPS take them, noise of +-8/255 (30 dB) costs nothing, 0.99 instead of 0.59; and
# half the contrast, harmless to VIF (0.8), comes out worse than noise of 64/255 (0.25). Multiplied by 255 it is piq's number to four digits.
# OUTPUT SEEN:
#   torchmetrics 1.9.0 piq 0.8.0 torch 2.13.0+cpu
#   noise of 2/255     torchmetrics, 0..1: 0.9982   torchmetrics, 0..255: 0.8748   piq, 0..1: 0.8748
#   noise of 8/255     torchmetrics, 0..1: 0.9917   torchmetrics, 0..255: 0.5927   piq, 0..1: 0.5927
#   noise of 64/255    torchmetrics, 0..1: 0.7371   torchmetrics, 0..255: 0.1294   piq, 0..1: 0.1294
#   half the contrast  torchmetrics, 0..1: 0.2527   torchmetrics, 0..255: 0.8077   piq, 0..1: 0.8077
#   as described
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6 pillow==13.0.0
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps piq==0.8.0 torchvision==0.28.0      # piq imports torchvision, for other metrics than this
cat > "$tmp/check.py" <<'PY'
import sys
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
import piq, torchmetrics
from torchmetrics.functional.image import visual_information_fidelity as vif

print("torchmetrics", torchmetrics.__version__, "piq", piq.__version__, "torch", torch.__version__)
random = torch.Generator().manual_seed(0)
x = torch.nn.functional.interpolate(torch.rand(1, 1, 16, 16, generator=random), size=(64, 64), mode="bicubic").clamp(0, 1)
sign = torch.rand(x.shape, generator=random).round() * 2 - 1
rows = {f"noise of {k}/255": (x + k / 255 * sign).clamp(0, 1) for k in (2, 8, 64)}
rows["half the contrast"] = x / 2 + 0.25
got = {}
for name, y in rows.items():
    got[name] = vif(y, x).item(), vif(255 * y, 255 * x).item(), piq.vif_p(y, x, data_range=1.).item()
    print(f"{name:18} torchmetrics, 0..1: {got[name][0]:.4f}   torchmetrics, 0..255: {got[name][1]:.4f}   piq, 0..1: {got[name][2]:.4f}")
    assert abs(got[name][1] - got[name][2]) < 1e-3
assert got["noise of 8/255"][0] > 0.97 and got["noise of 8/255"][2] < 0.7
assert got["half the contrast"][0] < 0.3 < got["noise of 64/255"][0] and got["half the contrast"][2] > 0.7 > got["noise of 64/255"][2]
assert "255" not in vif.__doc__
print("as described")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
