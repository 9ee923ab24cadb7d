#!/usr/bin/env bash
# torchattacks 3.5.1, torch 2.13.0, scipy 1.17.1: FGSM and PGD with eps = 8/255, saved with save_type="int" and loaded again.
#
# Images are whole multiples of 1/255, so the perturbed ones are too, and 8 bits can hold them.
# GUESS, before running: what is loaded is at most 8/255 from the image: nothing is lost here.
# BEHAVIOUR: (k - 8)/255 in float32, times 255, is k - 8 or a hair less, and save truncates: 3.7 % of the lowered pixels come back 9/255
# from the image, outside the ball the attack was given. Raised pixels stay at +8. With save_type="float" nothing is further than 8/255.
# OUTPUT SEEN:
#   torchattacks 3.5.1 torch 2.13.0+cpu
#   FGSM float furthest 8/255;  levels away: -9: 0, -8: 24495, +7: 0, +8: 24657, of 49152
#   FGSM int   furthest 9/255;  levels away: -9: 921, -8: 23574, +7: 0, +8: 24657, of 49152
#   PGD float furthest 8/255;  levels away: -9: 0, -8: 23335, +7: 0, +8: 23193, of 49152
#   PGD int   furthest 9/255;  levels away: -9: 873, -8: 22462, +7: 0, +8: 23193, of 49152
#   as described: saved as integers, 8/255 became 9/255
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps torchattacks==3.5.1
cat > "$tmp/check.py" <<'PY'
import contextlib, io, os, sys
from collections import Counter
import torch, torchattacks

print("torchattacks", torchattacks.__version__, "torch", torch.__version__)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 30 * 30, 10)).eval()
levels = torch.randint(20, 236, (16, 3, 32, 32))
images, labels = levels / 255, torch.randint(10, (16,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 16)
attacks = {"FGSM": torchattacks.FGSM(net, eps=8 / 255), "PGD": torchattacks.PGD(net, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)}
for name, attack in attacks.items():
    for kind in ("float", "int"):
        path = os.path.join(sys.argv[1], name + kind)
        with contextlib.redirect_stdout(io.StringIO()):
            attack.save(loader, save_path=path, save_type=kind)
            loaded = next(iter(attack.load(load_path=path, batch_size=16, shuffle=False)))[0]
        away = ((loaded - images) * 255).round().int()
        count = Counter(away.flatten().tolist())
        print(f"{name} {kind:5} furthest {away.abs().max()}/255;  levels away: -9: {count[-9]}, -8: {count[-8]}, +7: {count[7]},",
              f"+8: {count[8]}, of {away.numel()}")
        if kind == "float":
            assert away.abs().max() == 8
        else:
            assert away.min() == -9 and away.max() == 8 and 0.01 < count[-9] / (count[-9] + count[-8]) < 0.3
print("as described: saved as integers, 8/255 became 9/255")
PY
"$tmp/venv/bin/python" "$tmp/check.py" "$tmp"
