#!/usr/bin/env bash
# pyarrow 26.0.1, numpy 2.4.6: FixedShapeTensorArray.from_numpy_ndarray of a transposed view, as which images are written to Parquet.
#
# GUESS: images N x 3 x 32 x 32, seen as N x 32 x 32 x 3, come back from pyarrow as they were, since the type keeps a permutation; other
# readers of the file may see them in another order, or refuse.
# BEHAVIOUR: they come back as N x 32 x 3 x 32, which is neither order, and of the 3072 values of an image 317 are given, up to eleven
# times each, the others not at all. The column itself holds all of them, in the order of channels first; what is wrong is how they are
# read. A contiguous copy comes back as it was, and so does a view whose permutation is its own inverse, such as height and width
# exchanged. Nothing is said, from the array itself or through Parquet. Versions 18.1.0, 21.0.0 and 24.0.0 do the same; 15.0.2 refuses
# such a view.
# OUTPUT SEEN:
#   pyarrow 26.0.1 numpy 2.4.6
#     channels last, a view: (4, 32, 32, 3) comes back as (4, 32, 3, 32)
#       of the 3072 values of an image 317 come back, up to 11 times each
#       the column holds [3, 32, 32], all as they were: True; permutation [2, 0, 1]
#     channels last, a copy: the same: True
#     height and width exchanged, a view: the same: True
#     channels last, a view, through Parquet: (4, 32, 3, 32), as before: True
#   as described: a view as channels last comes back scrambled
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile pyarrow==26.0.1 numpy==2.4.6
cat > "$tmp/check.py" <<'PY'
import warnings
import numpy as np, pyarrow as pa, pyarrow.parquet as pq

print("pyarrow", pa.__version__, "numpy", np.__version__)
warnings.simplefilter("error")                                                  # nothing is said
images = np.arange(4 * 3 * 32 * 32, dtype=np.int32).reshape(4, 3, 32, 32)       # each value says where it was

def tensors(array):
    return pa.FixedShapeTensorArray.from_numpy_ndarray(array)

last = images.transpose(0, 2, 3, 1)
held = tensors(last)
back = held.to_numpy_ndarray()
values, times = np.unique(back[0], return_counts=True)
print(f"  channels last, a view: {last.shape} comes back as {back.shape}")
print(f"    of the {last[0].size} values of an image {len(values)} come back, up to {times.max()} times each")
assert back.shape == (4, 32, 3, 32) and len(values) < 400
kept = np.array(held.storage.to_pylist()).reshape(images.shape)
print(f"    the column holds {held.type.shape}, all as they were: {np.array_equal(kept, images)}; permutation {held.type.permutation}")
assert np.array_equal(kept, images)
copied = tensors(np.ascontiguousarray(last)).to_numpy_ndarray()
print(f"  channels last, a copy: the same: {np.array_equal(copied, last)}")
assert np.array_equal(copied, last)
turned = images.transpose(0, 1, 3, 2)
print(f"  height and width exchanged, a view: the same: {np.array_equal(tensors(turned).to_numpy_ndarray(), turned)}")
assert np.array_equal(tensors(turned).to_numpy_ndarray(), turned)
pq.write_table(pa.table({"image": held}), "images.parquet")
read = pq.read_table("images.parquet")["image"].combine_chunks().to_numpy_ndarray()
print(f"  channels last, a view, through Parquet: {read.shape}, as before: {np.array_equal(read, back)}")
assert np.array_equal(read, back)
print("as described: a view as channels last comes back scrambled")
PY
cd "$tmp" && "$tmp/venv/bin/python" check.py
