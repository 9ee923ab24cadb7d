#!/usr/bin/env bash
# captum 0.9.0, torch 2.13.0: PGD with its default loss, on a net that returns scores (logits).
#
# A small net tells ten classes apart; each image is to be taken for the next class (targeted=True), 8/255 in ten steps.
# GUESS of whoever calls it as captum's own notebook does, on a net that ends in a linear layer: every step brings the target nearer. (The
# source had been read before this was run.)
# BEHAVIOUR: the default loss is minus the logarithm of the net's output, which is right for probabilities. Of a negative score it is not a
# number, but its gradient, 1 / score, is one, with the other sign. So wherever the target's score is negative, which for a wrong class is
# the usual case, the attack lowers it. With CrossEntropyLoss(reduction="none") as loss_func it goes where it should. Nothing of this is said.
# OUTPUT SEEN:
#   captum 0.9.0 torch 2.13.0+cpu
#     of the targets' scores 73 % are below 0
#     default loss   target hit 18 %; where its score was below 0: hit 0 %, score raised in 0 %
#     cross-entropy  target hit 78 %; where its score was below 0: hit 71 %, score raised in 100 %
#   as described: where a score is negative, the attack goes the other way
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 matplotlib==3.11.2 tqdm==4.70.1 packaging==26.4
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps captum==0.9.0
cat > "$tmp/check.py" <<'PY'
import captum, torch
from captum.robust import PGD

print("captum", captum.__version__, "torch", torch.__version__)
torch.manual_seed(0)
prototypes = torch.nn.functional.interpolate(0.4 + 0.2 * torch.rand(10, 3, 4, 4), (32, 32), mode="bilinear")
def draw(n):
    labels = torch.arange(n) % 10
    return ((prototypes[labels] + 0.2 * torch.randn(n, 3, 32, 32)).clamp(0, 1) * 255).round() / 255, labels
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.ReLU(),
                          torch.nn.Flatten(), torch.nn.Linear(32 * 6 * 6, 10))
optimizer = torch.optim.Adam(net.parameters(), 1e-3)
for _ in range(150):
    x, y = draw(100)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
net.eval()
images, labels = draw(1000)
targets = (labels + 1) % 10
negative = net(images).gather(1, targets[:, None])[:, 0] < 0
print(f"  of the targets' scores {100 * negative.float().mean():.0f} % are below 0")

def towards_target(what, loss):
    attack = PGD(net, loss_func=loss, lower_bound=0, upper_bound=1)
    made = attack.perturb(images.clone().requires_grad_(), radius=8 / 255, step_size=2 / 255, step_num=10, target=targets, targeted=True)
    before, after = [net(x).gather(1, targets[:, None])[:, 0] for x in (images, made)]
    hit = net(made).argmax(1) == targets
    shares = [100 * share.float().mean().item() for share in (hit, hit[negative], (after > before)[negative])]
    print(f"  {what:14} target hit {shares[0]:.0f} %; where its score was below 0: hit {shares[1]:.0f} %, score raised in {shares[2]:.0f} %")
    return shares
default = towards_target("default loss", None)
crossed = towards_target("cross-entropy", torch.nn.CrossEntropyLoss(reduction="none"))
assert default[1] < 5 and default[2] < 10 and crossed[1] > 50 and crossed[2] > 90 and crossed[0] > default[0] + 40
print("as described: where a score is negative, the attack goes the other way")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
