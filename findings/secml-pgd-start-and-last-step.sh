#!/usr/bin/env bash
# secml-torch 1.5, torch 2.13.0: its own PGD in Linf (backend="native"), epsilon 8/255, beside the same attack by hand.
#
# GUESS of whoever calls it: random_start begins anywhere within +-8/255, one half of the values raised, the other lowered; one step of 8/255
# without it is FGSM. (The source had been read before this was run, so the behaviour was expected, the numbers were not.)
# BEHAVIOUR: the random start is the image itself plus noise, cut to +-8/255 as if that were the perturbation. So every value above 16/255 is
# raised by 8/255, whatever the seed: the attack starts from one brighter image. And the best perturbation is noted before each step, so the
# last step is never looked at: one step gives the images back as they were, four steps of 2/255 are three and lower no value at all, and
# a net looks 84 % robust where it is 17 %. Ten steps find their way back. Nothing is said; no report of it was found.
# OUTPUT SEEN:
#   secml-torch 1.5 torch 2.13.0+cpu
#     no attack                                 +0.0 to +0.0/255, raised 0 %, lowered 0 %, as it was 100 %; 100 % right
#     one step of 8, no random start, by hand   -8.0 to +8.0/255, raised 40 %, lowered 42 %, as it was 18 %; 1 % right
#     one step of 8, no random start, native    +0.0 to +0.0/255, raised 0 %, lowered 0 %, as it was 100 %; 100 % right
#     one step of nothing, random start, by hand -8.0 to +8.0/255, raised 50 %, lowered 50 %, as it was 0 %; 100 % right
#     one step of nothing, random start, native +8.0 to +8.0/255, raised 100 %, lowered 0 %, as it was 0 %; 100 % right
#     four steps of 2, random start, by hand    -8.0 to +8.0/255, raised 49 %, lowered 51 %, as it was 0 %; 17 % right
#     four steps of 2, random start, native     +2.0 to +8.0/255, raised 100 %, lowered 0 %, as it was 0 %; 84 % right
#     ten steps of 2, random start, by hand     -8.0 to +8.0/255, raised 49 %, lowered 51 %, as it was 0 %; 1 % right
#     ten steps of 2, random start, native      -8.0 to +8.0/255, raised 59 %, lowered 41 %, as it was 0 %; 1 % right
#   as described: the start is a brighter image, and the last step is left out
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps secml-torch==1.5
cat > "$tmp/check.py" <<'PY'
import torch
from importlib.metadata import version
from secmlt.adv.evasion.pgd import PGD
from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier

print("secml-torch", version("secml-torch"), "torch", torch.__version__)
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
images, labels = draw(200)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 200)
epsilon = 8 / 255

def theirs(steps, step, start):
    attack = PGD("linf", epsilon=epsilon, num_steps=steps, step_size=step, random_start=start, lb=0.0, ub=1.0, backend="native")
    return next(iter(attack(BasePyTorchClassifier(net), loader)))[0].detach()

def by_hand(steps, step, start):
    x = images + (2 * torch.rand_like(images) - 1) * epsilon * start
    for _ in range(steps):
        x = x.clamp(0, 1).requires_grad_()
        gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(net(x), labels), x)[0]
        x = images + (x.detach() + step * gradient.sign() - images).clamp(-epsilon, epsilon)
    return x.clamp(0, 1)

inner = (images > 16 / 255) & (images < 1 - epsilon)                            # where neither 0 nor 1 is near
def report(what, x):
    away = (255 * (x - images))[inner]
    lowered, raised, untouched = [(share.float().mean() * 100).item() for share in (away < -0.01, away > 0.01, away.abs() < 0.01)]
    right = 100 * (net(x).argmax(1) == labels).float().mean().item()
    print(f"  {what:41} {away.min():+.1f} to {away.max():+.1f}/255, raised {raised:.0f} %, lowered {lowered:.0f} %, as it was "
          f"{untouched:.0f} %; {right:.0f} % right")
    return lowered, raised, untouched, right
report("no attack", images)
seen = {}
for what, arguments in (("one step of 8, no random start", (1, epsilon, False)), ("one step of nothing, random start", (1, 1e-9, True)),
                        ("four steps of 2, random start", (4, epsilon / 4, True)), ("ten steps of 2, random start", (10, epsilon / 4, True))):
    for name, attack in (("by hand", by_hand), ("native", theirs)):
        torch.manual_seed(1)
        seen[name, what] = report(f"{what}, {name}", attack(*arguments))
hand, one = seen["by hand", "one step of 8, no random start"], seen["native", "one step of 8, no random start"]
assert one[2] == 100 and hand[2] < 30 and hand[3] < 10 and one[3] > 95
hand, start = seen["by hand", "one step of nothing, random start"], seen["native", "one step of nothing, random start"]
assert start[1] == 100 and 45 < hand[0] < 55 and 45 < hand[1] < 55
hand, four = seen["by hand", "four steps of 2, random start"], seen["native", "four steps of 2, random start"]
assert four[0] == 0 and 40 < hand[0] < 60 and four[3] > hand[3] + 40
print("as described: the start is a brighter image, and the last step is left out")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
