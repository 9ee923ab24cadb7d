#!/usr/bin/env bash
# imagecodecs 2026.3.6 (libjxl 0.11.2), its Zarr codec with numcodecs 0.16.6, tifffile 2026.3.3: JPEG XL of a perturbed 8-bit image.
#
# GUESS: distance=0 and level=100 keep every pixel, as they do in the tool cjxl (its manual: -d 0 is mathematically lossless, -q 100 too) and
# as level=100 does for WebP and AVIF in imagecodecs; and jpegxl_encode(distance=d) and Jpegxl(distance=d).encode of the same package
# write the same bytes. (Written down after a broad first run over many codecs had shown otherwise for the first part.)
# BEHAVIOUR: without options jpegxl_encode is lossless. To ask it for distance=0 or level=100 makes it lossy: 37 % of the values change, by
# up to 10 of 255 where the perturbation is 8, and the file is a quarter larger than the lossless one; level=101 is lossless again. tifffile
# hands compressionargs through and does the same. The package's Zarr codec is the other way round: lossless for any distance and any
# level, so that distance=3 saves nothing. A second decoder reads the same pixels to +-2, so it is the encoder. Neither the docstring nor
# the type stubs mention it (a comment in the source says "> 100: lossless"; a warning about distance 0 stands in libjxl's header; related:
# issues 30, 54 and 58 of cgohlke/imagecodecs, closed).
# OUTPUT SEEN:
#   imagecodecs 2026.3.6 libjxl 0.11.2 tifffile 2026.3.3 numcodecs 0.16.6
#   jpegxl_encode {}                                  30113 bytes, furthest  0,  0 % of the values changed
#   jpegxl_encode {'distance': 0}                     38432 bytes, furthest 10, 37 % of the values changed
#   jpegxl_encode {'level': 100}                      38432 bytes, furthest 10, 37 % of the values changed
#   jpegxl_encode {'level': 101}                      30113 bytes, furthest  0,  0 % of the values changed
#   jpegxl_encode {'distance': 0, 'lossless': True}   30113 bytes, furthest  0,  0 % of the values changed
#   jpegxl_encode {'distance': 3}                       802 bytes, furthest 48, 99 % of the values changed
#   numcodecs.Jpegxl {}                               30113 bytes, furthest  0,  0 % of the values changed
#   numcodecs.Jpegxl {'distance': 0}                  30113 bytes, furthest  0,  0 % of the values changed
#   numcodecs.Jpegxl {'level': 100}                   30113 bytes, furthest  0,  0 % of the values changed
#   numcodecs.Jpegxl {'distance': 3}                  30113 bytes, furthest  0,  0 % of the values changed
#   tifffile compressionargs=None                     30385 bytes, furthest  0,  0 % of the values changed
#   tifffile compressionargs={'level': 100}           38704 bytes, furthest 10, 37 % of the values changed
#   webp_encode level=100                             23396 bytes, furthest  0,  0 % of the values changed
#   avif_encode level=100                             34620 bytes, furthest  0,  0 % of the values changed
#   as described: the highest quality is larger than lossless and changes values by more than the perturbation
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile imagecodecs==2026.3.6 numcodecs==0.16.6 tifffile==2026.3.3 numpy==2.4.6 pillow==13.0.0 \
    pillow-jxl-plugin==1.3.8
cat > "$tmp/check.py" <<'PY'
import io
import numpy as np
import imagecodecs, numcodecs, tifffile
import pillow_jxl                                                                      # a second decoder, through Pillow
from imagecodecs.numcodecs import Jpegxl
from PIL import Image

print("imagecodecs", imagecodecs.__version__, imagecodecs.jpegxl_version(), "tifffile", tifffile.__version__, "numcodecs", numcodecs.__version__)
rng = np.random.default_rng(0)
rows, columns = np.mgrid[:128, :128]
clean = np.stack([128 + 90 * np.sin(rows / a + columns / b) for a, b in ((17, 29), (23, -19), (-31, 13))], axis=2).astype(int)
image = (clean + rng.choice([-8, 8], clean.shape)).astype(np.uint8)

def worst(decoded):
    return int(np.abs(decoded.astype(int) - image).max())
def show(what, data, decoded):
    changed = (decoded != image).mean()
    print(f"{what:48} {len(data):6} bytes, furthest {worst(decoded):2}, {100 * changed:2.0f} % of the values changed")
    return len(data), worst(decoded), changed

seen = {}
for options in ({}, {"distance": 0}, {"level": 100}, {"level": 101}, {"distance": 0, "lossless": True}, {"distance": 3}):
    data = imagecodecs.jpegxl_encode(image, numthreads=1, **options)
    decoded = imagecodecs.jpegxl_decode(data, numthreads=1)
    other = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(decoded.astype(int) - other).max() <= 2
    seen[str(options)] = show(f"jpegxl_encode {options}", data, decoded)
for options in ({}, {"distance": 0}, {"level": 100}, {"distance": 3}):
    data = Jpegxl(numthreads=1, **options).encode(image)
    seen["zarr" + str(options)] = show(f"numcodecs.Jpegxl {options}", data, imagecodecs.jpegxl_decode(data, numthreads=1))
for options in (None, {"level": 100}):
    file = io.BytesIO()
    tifffile.imwrite(file, image, compression="jpegxl", compressionargs=options, photometric="rgb")
    data = file.getvalue()
    seen["tiff" + str(options)] = show(f"tifffile compressionargs={options}", data, tifffile.imread(io.BytesIO(data)))
for name in ("webp", "avif"):
    data = getattr(imagecodecs, name + "_encode")(image, level=100)
    seen[name] = show(f"{name}_encode level=100", data, getattr(imagecodecs, name + "_decode")(data))

size = seen["{}"][0]
for key in ("{}", "{'level': 101}", "{'distance': 0, 'lossless': True}", "tiffNone", "webp", "avif",
            "zarr{}", "zarr{'distance': 0}", "zarr{'level': 100}", "zarr{'distance': 3}"):
    assert seen[key][1] == 0, key
for key in ("{'distance': 0}", "{'level': 100}", "tiff{'level': 100}"):
    assert seen[key][0] > 1.05 * size and seen[key][1] > 8 and 0.2 < seen[key][2] < 0.6, key
assert seen["zarr{'distance': 3}"][0] == size and seen["{'distance': 3}"][0] < size / 5
print("as described: the highest quality is larger than lossless and changes values by more than the perturbation")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
