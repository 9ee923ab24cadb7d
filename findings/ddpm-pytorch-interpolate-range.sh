#!/usr/bin/env bash
# denoising-diffusion-pytorch 2.3.4 (GaussianDiffusion.interpolate), torch 2.13.0: the package's one way to noise given images and denoise
# them again, which is what diffusion purification does. interpolate(x, x, t) should purify x; lam=0 takes the first image alone.
#
# forward(x) takes images in [0, 1] and sample() returns such, since both convert from and to [-1, 1] (auto_normalize=True).
# Guess, written before the first run (2026-11-29), of whoever knows only that: interpolate(x, x, t) takes and returns [0, 1] as well, and
# is the same as q_sample to t and p_sample from t down, by hand. (Its source had been seen long ago, and it was suspected that it does not
# convert; it was read again before the first run. Whether the noise is averaged, too, was suspected only.)
# BEHAVIOUR: it converts neither on the way in nor on the way out. Middle gray reaches the net as the bright gray of 0.75, at half the
# contrast, so that with lam=0 the noise is twice as strong by comparison; and what comes back is in [-1, 1]. The net thus draws middle
# gray towards 0, which is read as black: from 0.50 to 0.17 at t = 100. With lam=0.5, its default, two noises are averaged to 0.71 of
# one. The first step down is from t - 1 while the image has the noise of t. Nothing is said. With images converted by hand and lam=0 all
# but that last is well. Issues 159 and 259 of lucidrains/denoising-diffusion-pytorch are about earlier faults; none on this was found.
# HOW: the net is the exact one for images with independent pixels around middle gray, whose noise prediction is a formula.
# OUTPUT SEEN:
#   denoising-diffusion-pytorch 2.3.4 torch 2.13.0+cpu
#   by hand                        starts at 100, net sees gray at -0.00, contrast 0.25, noise 1.00; comes back 0.50, least  0.00
#   interpolate(x, x, t)           starts at  99, net sees gray at  0.50, contrast 0.12, noise 0.71; comes back 0.18, least -0.65
#   interpolate(x, x, t, lam=0)    starts at  99, net sees gray at  0.50, contrast 0.12, noise 1.00; comes back 0.17, least -0.78
#   the same in [-1, 1], lam=0.5   starts at  99, net sees gray at -0.00, contrast 0.25, noise 0.71; comes back 0.50, least  0.04
#   the same in [-1, 1], lam=0     starts at  99, net sees gray at -0.00, contrast 0.25, noise 1.00; comes back 0.50, least  0.03
#   sample() comes back 0.50, least 0.00
#   warnings: []
#   as described: images in [0, 1] are taken for brighter ones, and come back in another range
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=$tmp/hf HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TQDM_DISABLE=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 pillow==13.0.0 scipy==1.17.1 einops==0.8.2 ema-pytorch==0.8.3 \
    accelerate==1.15.0 tqdm==4.70.1
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps torchvision==0.28.0 denoising-diffusion-pytorch==2.3.4
cat > "$tmp/check.py" <<'PY'
import importlib.metadata, sys, warnings
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
from denoising_diffusion_pytorch import GaussianDiffusion

print("denoising-diffusion-pytorch", importlib.metadata.version("denoising-diffusion-pytorch"), "torch", torch.__version__)
deviation = 0.25                                                                     # of the images, in the net's range of [-1, 1]
class Exact(torch.nn.Module):
    channels = out_dim = 3
    self_condition = random_or_learned_sinusoidal_cond = False
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.seen = []                                                               # t, and the images that it was shown
    def forward(self, x, t, condition=None):
        kept = self.kept[t].view(-1, 1, 1, 1)
        self.seen.append((int(t[0]), x))
        return (1 - kept).sqrt() * x / (kept * deviation ** 2 + 1 - kept)

net = Exact()
diffusion = GaussianDiffusion(net, image_size=64, timesteps=1000, beta_schedule="linear", objective="pred_noise")
net.kept = diffusion.alphas_cumprod
torch.manual_seed(0)
images = (0.5 + deviation / 2 * torch.randn(4, 3, 64, 64)).clamp(0, 1)
t = 100

def by_hand():
    x = diffusion.q_sample(2 * images - 1, torch.full((4,), t))
    for step in reversed(range(t + 1)):
        x, _ = diffusion.p_sample(x, step)
    return (x + 1) / 2
ways = {"by hand": by_hand,
        "interpolate(x, x, t)": lambda: diffusion.interpolate(images, images, t),
        "interpolate(x, x, t, lam=0)": lambda: diffusion.interpolate(images, images, t, lam=0.),
        "the same in [-1, 1], lam=0.5": lambda: (diffusion.interpolate(2 * images - 1, 2 * images - 1, t, lam=0.5) + 1) / 2,
        "the same in [-1, 1], lam=0": lambda: (diffusion.interpolate(2 * images - 1, 2 * images - 1, t, lam=0.) + 1) / 2}
seen = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name, way in ways.items():
        net.seen.clear()
        with torch.no_grad():
            out = way()
        first, shown = net.seen[0]
        gray = shown.mean() / net.kept[t].sqrt()                                     # what middle gray has become, without the noise
        picture = (2 * images - 1 if abs(gray) < 0.1 else images) * net.kept[t].sqrt()
        noise = (shown - picture).std() / (1 - net.kept[t]).sqrt()
        contrast = picture.std() / net.kept[t].sqrt()
        seen[name] = (first, gray.item(), contrast.item(), noise.item(), out.mean().item(), out.min().item())
        print(f"{name:30} starts at {first:3}, net sees gray at {gray:5.2f}, contrast {contrast:.2f}, noise {noise:.2f};",
              f"comes back {out.mean():.2f}, least {out.min():5.2f}")
    with torch.no_grad():
        sampled = diffusion.sample(4)
print(f"sample() comes back {sampled.mean():.2f}, least {sampled.min():.2f}")
print("warnings:", [str(w.message) for w in caught if "denoising_diffusion" in w.filename])
assert not [w for w in caught if "denoising_diffusion" in w.filename]
def near(name, *wanted):
    assert all(abs(a - b) < 0.02 for a, b in zip(seen[name], wanted)), (seen[name], wanted)
near("by hand", 100, 0, 0.25, 1, 0.5)
near("interpolate(x, x, t)", 99, 0.5, 0.125, 0.71, 0.175)
near("interpolate(x, x, t, lam=0)", 99, 0.5, 0.125, 1, 0.175)
near("the same in [-1, 1], lam=0.5", 99, 0, 0.25, 0.71, 0.5)
near("the same in [-1, 1], lam=0", 99, 0, 0.25, 1, 0.5)
assert seen["interpolate(x, x, t)"][5] < -0.4 and abs(sampled.mean() - 0.5) < 0.02 and sampled.min() >= 0
print("as described: images in [0, 1] are taken for brighter ones, and come back in another range")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
