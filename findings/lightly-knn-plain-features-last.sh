#!/usr/bin/env bash
# lightly 1.6.0, torch 2.13.0: knn_predict, by which encoders that learn without labels are watched, of features as they are.
#
# GUESS: the same answers for features of unit length and for plain ones, or a little worse, since the neighbours are nearly the same.
# BEHAVIOUR: the right class comes last, or nearly so. Weights are exp(similarity / 0.1), which is infinite from a similarity of 8.9 on,
# as features behind a ReLU have it; a class among the neighbours then has infinity, and a class that is not among them 0 x infinity,
# which is NaN, and NaN is sorted before infinity. So an encoder looks ruined, as by a protection, that a vote of the same neighbours
# finds 99 % right. The documentation recommends to normalise, in an example, and the KNNClassifier of the same package has an option for
# it, normalize=False.
# OUTPUT SEEN:
#   lightly 1.6.0 torch 2.13.0+cpu
#     features have a length of 11.6, on average
#     by hand, the vote of the 50 neighbours of plain features: 98.6 % right
#     knn_predict of features of unit length: 100.0 % right
#     knn_predict of plain features: 0.2 % right; the right class is the last of ten for 74.8 %
#   as described: the nearer its neighbours, the later a class comes
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 pillow==13.0.0 pytorch-lightning==2.6.6
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps lightly==1.6.0 lightly-utils==0.0.2 torchvision==0.28.0 tqdm==4.67.1
cat > "$tmp/check.py" <<'PY'
import sys, warnings
import torch
import torch.nn.functional as F
try:
    import torchvision
except RuntimeError:                  # a CPU build of torch beside PyPI's torchvision, whose compiled operators then do not load;
    for name in [n for n in sys.modules if n.startswith("torchvision")]:                            # none of them is used here
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import lightly
from lightly.utils.benchmarking.knn import knn_predict

print("lightly", lightly.__version__, "torch", torch.__version__)
warnings.simplefilter("error")                                                  # nothing is said
torch.manual_seed(0)
labels = torch.arange(2000) % 10
centres = torch.randn(10, 128)

def features():                                                                 # as behind a ReLU
    return (centres[labels] + torch.randn(2000, 128)).relu()

bank, asked = features(), features()
print(f"  features have a length of {bank.norm(dim=1).mean():.1f}, on average")
voted = labels[(asked @ bank.T).topk(50).indices].mode(1).values
by_vote = 100 * (voted == labels).float().mean().item()
print(f"  by hand, the vote of the 50 neighbours of plain features: {by_vote:.1f} % right")
unit = knn_predict(F.normalize(asked, dim=1), F.normalize(bank, dim=1).T, labels, 10, knn_k=50)
of_unit = 100 * (unit[:, 0] == labels).float().mean().item()
print(f"  knn_predict of features of unit length: {of_unit:.1f} % right")
plain = knn_predict(asked, bank.T, labels, 10, knn_k=50)
of_plain, last = [100 * (plain[:, place] == labels).float().mean().item() for place in (0, -1)]
print(f"  knn_predict of plain features: {of_plain:.1f} % right; the right class is the last of ten for {last:.1f} %")
assert by_vote > 95 and of_unit > 95 and of_plain < 5 and last > 60
print("as described: the nearer its neighbours, the later a class comes")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
