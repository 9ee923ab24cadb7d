#!/usr/bin/env bash
# adversarial-robustness-toolbox 1.20.1 against 1.17.1, torch 2.13.0: FGM and PGD in the L1 norm on images in 0..1.
#
# A small net tells ten classes of noisy 8-bit images apart. eps = 12 in L1, a usual budget for CIFAR-10, with clip_values=(0, 1).
# GUESS: the perturbation has L1 size eps, as it has size eps in Linf and in L2, and two releases agree. (Written down after a broad first
# run of 1.20.1 had printed other sizes, before 1.17.1 was run and before robustness was measured.)
# BEHAVIOUR: since 1.18.0 the whole step goes to the one value with the largest gradient, the best step if values had no range. In an image
# that value reaches 0 or 1 after less than 1 of the 12, the next steps choose it again, and nothing moves any more: FGM changes one value,
# forty steps give bit for bit what ten give, 0.3 to 1.8 of the 12 is spent, and the net looks 100 % robust. 1.17.1 spreads the step over
# all values: 17 % right. By hand, one step, going on to the next-largest value whenever one is full: 24 values changed, 0 % right. Linf
# and L2 are as one would guess in both. The change was made as a correction, where values have no range (issue 2381 and pull request 2382
# of Trusted-AI/adversarial-robustness-toolbox); this effect of it was not found there.
# OUTPUT SEEN:
#   art 1.17.1, without attack: 100 % right
#     Linf 0.0314, PGD 40 steps  size 0.0314 to 0.0314, 2522 values changed, 0 % right
#     L2 1, PGD 40 steps         size 1 to 1, 2523 values changed, 0 % right
#     L1 12, FGM                 size 12 to 12, 2522 values changed, 36 % right
#     L1 12, PGD 10 steps        size 12 to 12, 2522 values changed, 20 % right
#     L1 12, PGD 40 steps        size 12 to 12, 2522 values changed, 17 % right
#   art 1.20.1, without attack: 100 % right
#     Linf 0.0314, PGD 40 steps  size 0.0314 to 0.0314, 2522 values changed, 0 % right
#     L2 1, PGD 40 steps         size 1 to 1, 2523 values changed, 0 % right
#     L1 12, FGM                 size 0.31 to 0.8, 1 values changed, 100 % right
#     L1 12, PGD 10 steps        size 0.31 to 1.83, 1 values changed, 100 % right
#     L1 12, PGD 40 steps        size 0.31 to 1.83, 1 values changed, 100 % right
#     forty steps equal ten: True
#     L1 12, by hand             size 12 to 12, 24 values changed, 0 % right
#   as described: an attack with a budget of 12 stops after one or two values, and the net seems robust
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile adversarial-robustness-toolbox==1.20.1 torch==2.13.0 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 \
    packaging==26.2 setuptools==80.9.0                     # which it imports; 1.17.1 still wants pkg_resources, which newer ones have not
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps --target "$tmp/old" adversarial-robustness-toolbox==1.17.1
cat > "$tmp/check.py" <<'PY'
import sys
import numpy as np
import torch
import art
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier

torch.manual_seed(0)
prototypes = torch.nn.functional.interpolate(0.45 + 0.1 * torch.rand(10, 3, 4, 4), (32, 32), mode="bilinear")
def draw(n):
    labels = torch.arange(n) % 10
    return ((prototypes[labels] + 0.1 * torch.randn(n, 3, 32, 32)).clamp(0, 1) * 255).round() / 255, labels
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.ReLU(),
                          torch.nn.Flatten(), torch.nn.Linear(32 * 6 * 6, 10))
optimizer = torch.optim.Adam(net.parameters(), 1e-3)
for _ in range(150):
    x, y = draw(100)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
net.eval()
images, labels = (t.numpy() for t in draw(100))
targets = np.eye(10, dtype=np.float32)[labels]
victim = PyTorchClassifier(net, torch.nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1))

def report(name, norm, attacked):
    d = (attacked.astype(np.float64) - images).reshape(100, -1)
    size = np.linalg.norm(d, norm, axis=1)
    changed = (np.abs(d) > 1e-6).sum(1).mean()
    right = 100 * (victim.predict(attacked).argmax(1) == labels).mean()
    print(f"  {name:26} size {size.min():.3g} to {size.max():.3g}, {changed:.0f} values changed, {right:.0f} % right")
    assert attacked.min() >= 0 and attacked.max() <= 1
    return size, changed, right

print(f"art {art.__version__}, without attack: {100 * (victim.predict(images).argmax(1) == labels).mean():.0f} % right")
new = art.__version__ == "1.20.1"
assert new or art.__version__ == "1.17.1"
for name, norm, eps in (("Linf", np.inf, 8 / 255), ("L2", 2, 1.0)):
    attack = ProjectedGradientDescent(victim, norm=norm, eps=eps, eps_step=eps / 4, max_iter=40, verbose=False)
    size, _, right = report(f"{name} {eps:.3g}, PGD 40 steps", norm, attack.generate(images, targets))
    assert size.min() > 0.98 * eps and size.max() < 1.001 * eps and right < 10

eps = 12.0
one = report("L1 12, FGM", 1, FastGradientMethod(victim, norm=1, eps=eps).generate(images, targets))
few, many = (ProjectedGradientDescent(victim, norm=1, eps=eps, eps_step=eps / 4, max_iter=n, verbose=False).generate(images, targets)
             for n in (10, 40))
report("L1 12, PGD 10 steps", 1, few)
size, changed, right = report("L1 12, PGD 40 steps", 1, many)
if new:
    print("  forty steps equal ten:", np.array_equal(few, many))
    assert np.array_equal(few, many) and one[1] == 1 and size.max() < 4 and changed < 3 and right > 90
else:
    assert size.min() > 11.9 and changed > 1000 and right < 60
    sys.exit()

gradient = victim.loss_gradient(images, targets).reshape(100, -1)               # by hand: one step, as far as the range lets each value go
flat = images.reshape(100, -1)
order = np.argsort(-np.abs(gradient), axis=1)
room = np.take_along_axis(np.where(gradient > 0, 1 - flat, flat), order, 1).astype(np.float64)
spent = np.clip(eps - (room.cumsum(1) - room), 0, room)
step = np.zeros_like(room)
np.put_along_axis(step, order, spent, 1)
by_hand = np.clip(flat + step * np.sign(gradient), 0, 1).astype(np.float32).reshape(images.shape)
size, changed, right = report("L1 12, by hand", 1, by_hand)
assert size.min() > 11.9 and size.max() < 12.01 and changed < 60 and right < 20
print("as described: an attack with a budget of 12 stops after one or two values, and the net seems robust")
PY
PYTHONPATH=$tmp/old "$tmp/venv/bin/python" -W ignore "$tmp/check.py"
"$tmp/venv/bin/python" "$tmp/check.py"
