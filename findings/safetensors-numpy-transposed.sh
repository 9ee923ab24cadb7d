#!/usr/bin/env bash
# safetensors 0.8.0 against 0.7.0, numpy 2.4.6, torch 2.13.0.
#
# A class-wise perturbation [10, 3, 32, 32] is turned to images' axes, noise.transpose(0, 2, 3, 1) (every loader of published unlearnable
# examples does), and saved. One library, two front ends: safetensors.numpy and safetensors.torch.
# GUESS, before running: what is loaded equals what was saved, for any strides, in numpy; torch refuses or copies; x.conj() is saved as it is.
# BEHAVIOUR: safetensors.numpy 0.8.0 writes the array's memory under the transposed shape: shape, dtype, minimum, maximum, mean and
# standard deviation are right, and nearly every value is in the wrong place (the file holds noise.reshape(10, 32, 32, 3)). 0.7.0 saved it
# right: a silent change between two releases. safetensors.torch refuses the same array (ValueError: non contiguous), but saves x.conj()
# without its conjugation (torch.save keeps it). "Contiguous" stands in the docstring of both releases. (Issue 825 of
# safetensors/safetensors, August 2026, open when this was written.)
# OUTPUT SEEN:
#   safetensors 0.7.0: shape (10, 32, 32, 3), float32, 100.00 % of the values where they were; min -0.0314 -0.0314, mean 0.000047 0.000047, std 0.018049 0.018049
#   safetensors 0.8.0: shape (10, 32, 32, 3), float32, 0.07 % of the values where they were; min -0.0314 -0.0314, mean 0.000047 0.000047, std 0.018049 0.018049
#   safetensors.torch: You are trying to save a non contiguous tensor: `noise` which
#   conjugate: [-1j, (1-2j), (2-3j)] safetensors.torch: [1j, (1+2j), (2+3j)] torch.save: [-1j, (1-2j), (2-3j)]
#   as described
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile safetensors==0.8.0 numpy==2.4.6 torch==2.13.0
"$tmp/venv/bin/pip" install -qq --no-compile --no-deps --target "$tmp/old" safetensors==0.7.0
cat > "$tmp/check.py" <<'PY'
import io, sys
import numpy as np
import safetensors
from safetensors.numpy import load, save

noise = np.random.default_rng(0).uniform(-8 / 255, 8 / 255, (10, 3, 32, 32)).astype(np.float32)
nhwc = noise.transpose(0, 2, 3, 1)
back = load(save({"noise": nhwc}))["noise"]
same = (back == nhwc).mean()
print(f"safetensors {safetensors.__version__}: shape {back.shape}, {back.dtype}, {100 * same:.2f} % of the values where they were;",
      f"min {back.min():.4f} {nhwc.min():.4f}, mean {back.mean():.6f} {nhwc.mean():.6f}, std {back.std():.6f} {nhwc.std():.6f}")
if safetensors.__version__ == "0.7.0":
    assert same == 1
    sys.exit()
assert safetensors.__version__ == "0.8.0" and same < 0.01 and np.array_equal(np.sort(back, None), np.sort(nhwc, None))
assert np.array_equal(back, noise.reshape(10, 32, 32, 3))
assert np.array_equal(load(save({"noise": np.ascontiguousarray(nhwc)}))["noise"], nhwc)

import torch
from safetensors.torch import load as load_torch, save as save_torch
try:
    save_torch({"noise": torch.from_numpy(noise).permute(0, 2, 3, 1)})
    raise SystemExit("safetensors.torch takes it now")
except ValueError as error:
    print("safetensors.torch:", str(error)[:61])
spectrum = torch.complex(torch.arange(3.), torch.arange(3.) + 1).conj()
kept = load_torch(save_torch({"s": spectrum}))["s"]
file = io.BytesIO()
torch.save(spectrum, file)
file.seek(0)
print("conjugate:", spectrum.resolve_conj().tolist(), "safetensors.torch:", kept.tolist(), "torch.save:", torch.load(file).tolist())
assert torch.equal(kept, spectrum.conj()) and not torch.equal(kept, spectrum)
print("as described")
PY
PYTHONPATH=$tmp/old "$tmp/venv/bin/python" "$tmp/check.py"
"$tmp/venv/bin/python" "$tmp/check.py"
