"""Tests of images and arrays in files: studies/files.py, and what arrays.py takes for images."""
import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

import perceptual
from le import BadInput
from perceptual import VGG
from studies import arrays, files
from studies.test_published import stored
from test_le import Malice, checkpoint, images, seeded
from unet import as_bytes


# -- Images in files -------------------------------------------------------------------------------

def picture(mode, size=(40, 36)):
    """A smooth Pillow image, different in every channel."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    bands = np.stack([3 * x + 60, 255 - 4 * y, 2 * (x + y), 255 * (x > y)], -1)
    rgba = Image.fromarray(bands.astype(np.uint8))
    if mode == "P":
        return rgba.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    return rgba.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else rgba.convert(mode)


@pytest.mark.parametrize("mode, transparency, expected", [
    ("RGB", None, "RGB"), ("RGBA", None, "RGBA"), ("L", None, "L"), ("LA", None, "LA"),
    ("P", None, "RGB"), ("P", 0, "RGBA"), ("RGB", (60, 255, 0), "RGBA"), ("L", 168, "RGBA"),
    ("1", None, "L"), ("1", 0, "RGBA")])
def test_open_image_keeps_transparency(tmp_path, mode, transparency, expected):
    picture(mode).save(tmp_path / "a.png", transparency=transparency)
    image = files.open_image(tmp_path / "a.png")
    assert image.mode == expected
    if transparency is not None:
        assert image.getchannel("A").getextrema()[0] == 0


@pytest.mark.parametrize("name, mode", [("a.jpg", "CMYK"), ("a.tif", "CMYK"), ("a.tif", "1"),
                                        ("a.gif", "P")])
def test_open_image_converts_what_keeps_its_meaning(tmp_path, name, mode):
    picture(mode).save(tmp_path / name, icc_profile=b"of another mode")
    image = files.open_image(tmp_path / name)
    expected = picture(mode if mode == "1" else "RGB").convert("RGB")
    apart = np.abs(np.array(image.convert("RGB")).astype(int) - np.array(expected))
    assert image.mode == ("L" if mode == "1" else "RGB") and apart.mean() < 6
    assert mode not in ("CMYK", "YCbCr") or "icc_profile" not in image.info


# An RGB PNG of 16 bits a channel, which Pillow cannot write
DEEP_PNG = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAA"
            "D0lEQVR4nGNgYGRiZmEFAAAqABAazIwkAAAAAElFTkSuQmCC")


def test_open_image_turns_takes_the_first_frame_and_refuses(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6                                       # to be turned by 90 degrees
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert files.open_image(tmp_path / "turned.jpg").size == (36, 40)
    frames = [picture("RGB").rotate(90)]
    picture("RGB").save(tmp_path / "two.gif", save_all=True, append_images=frames)
    two = files.open_image(tmp_path / "two.gif")
    first = np.array(two.convert("RGB")).astype(int)
    assert np.abs(first - np.array(picture("RGB"))).mean() < 20 and two.info["frames"] == 2
    (tmp_path / "deep.png").write_bytes(base64.b64decode(DEEP_PNG))
    (tmp_path / "deep.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(6))
    Image.new("I;16", (9, 9)).save(tmp_path / "grey.png")
    Image.new("F", (9, 9)).save(tmp_path / "f.tif")
    Image.new("LAB", (9, 9)).save(tmp_path / "lab.tif")
    (tmp_path / "text.png").write_text("not an image")
    wrong = {"deep.png": "16 bits", "grey.png": "16 bits", "f.tif": "mode F", "lab.tif": "mode LAB",
             "text.png": "readable", "bomb.png": "readable", "deep.ppm": "16 bits"}
    picture("RGB").save(tmp_path / "bomb.png")
    for name, message in wrong.items():
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 if name == "bomb.png" else None)
        with pytest.raises(BadInput, match=f"{name}: .*{message}"):
            files.open_image(tmp_path / name)


# -- Arrays ----------------------------------------------------------------------------------------

def test_read_arrays_runs_no_code(tmp_path, capsys):
    np.save(tmp_path / "evil.npy", np.array([Malice()]), allow_pickle=True)
    with pytest.raises(BadInput, match="evil.npy"):
        files.read_arrays(tmp_path / "evil.npy")
    assert "ran code" not in capsys.readouterr().out


BYTES = np.arange(2 * 8 * 9 * 3, dtype=np.uint8).reshape(2, 8, 9, 3)
GREY, FIRST = BYTES[..., 0], np.moveaxis(BYTES, 3, 1)


@pytest.mark.parametrize("name, content", [
    ("a.npy", BYTES), ("a.npy", FIRST), ("a.npy", BYTES / 255), ("a.npy", np.float32(FIRST) / 255),
    ("a.npy", GREY), ("a.npy", GREY[..., None]),           # Keras's
    ("a.npy", GREY[:, None]), ("a.npy", np.float16(GREY[..., None] / 255)),
    ("a.npz", dict(arr_0=BYTES, arr_1=np.arange(2))),      # guided-diffusion's samples
    ("a.npz", dict(x_train=BYTES, y_train=np.arange(2), x_test=BYTES)),
    ("a.npz", dict(train_images=GREY, train_labels=np.zeros((2, 1)))),  # MedMNIST's
    ("a.npz", dict(images=BYTES, masks=GREY, marks=np.zeros((2, 68, 2), np.uint8))),
    ("a.pt", torch.from_numpy(FIRST)), ("a.pt", dict(images=BYTES / 255)),
    ("a.pt", torch.from_numpy(GREY[:, None] / 255)),       # torchvision's MNIST
    ("a.npy", (BYTES / 255).astype(">f4")),                # of another machine
    ("a.pt", torch.from_numpy(FIRST / 255).bfloat16()),
    ("a.npz", dict(images=BYTES, names=np.array(["a", "b"]))),
])
def test_images_in_finds_what_looks_like_images_and_written_gives_it_its_axes(
        tmp_path, name, content):
    path = tmp_path / name
    if name == "a.npz":
        np.savez(path, **content)
    elif name == "a.npy":
        np.save(path, content)
    else:
        torch.save({key: torch.from_numpy(x) for key, x in content.items()}
                   if isinstance(content, dict) else content, path)
    found, seen = arrays.images_in(path)
    assert seen and all(x.shape == (2, 3, 8, 9) for x in seen.values())
    assert not {"masks", "marks"} & set(seen)
    for key, x in seen.items():
        back = arrays.written(found[key], x, last=name != "a.pt")
        assert back.shape == found[key].shape and back.dtype == found[key].dtype
        step = {"u": 1, "f": 1.1 / 255}[back.dtype.kind]   # grey goes by way of three channels
        assert np.abs(back - found[key].astype(float)).max() <= step
    arrays.write_arrays(tmp_path / f"b{name}", found)
    again = files.read_arrays(tmp_path / f"b{name}")
    assert all((again[key] == found[key]).all() for key in found)


@pytest.mark.parametrize("name, content, message", [
    ("a.npy", np.zeros((4, 8, 8, 4), np.uint8), r"uint8, \(4, 8, 8, 4\), 0 to 0; expected"),
    ("a.npy", np.full((4, 8, 8, 3), 2.5), "float64, .*, 2.5 to 2.5; expected"),
    ("a.npy", np.zeros((0, 8, 8, 3), np.uint8), "expected 8-bit"),
    ("a.npy", np.zeros((32, 32, 3), np.uint8), "a single one, .* with an axis for their number"),
    ("a.npy", np.zeros((32, 32, 1), np.uint8), "a single one, .* with an axis for their number"),
    ("a.npy", np.zeros((3, 32, 32), np.uint8), "or three grey ones, with an axis for .* channels"),
    ("a.npy", np.zeros((5, 68, 2), np.uint8), "N x H x W x 3"),
    ("a.npy", np.zeros((2, 3, 8, 8), np.longdouble), "N x H x W x 3"),
    ("a.npy", b"text", "not a readable file of arrays"),
    ("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, "
              b"'shape': (9000000000, 32, 32, 3)}" + b" " * 43 + b"\n", "not a readable file"),
    ("a.npz", dict(images=np.zeros(1), labels=np.arange(3)), r"images float64, \(1,\).*; labels"),
    ("a.npz", b"PK", "not a readable file"),
    ("a.pt", torch.zeros(2, 3, 4, 4, dtype=torch.bool), "bool"),
    ("a.pt", torch.zeros(2, 3, 4, 4) * math.nan, "float32"),
    ("a.pt", ["a list"], "expected 8-bit|not a readable"), ("a.pt", b"text", "not a whole file"),
])
def test_images_in_says_what_it_found(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name == "a.npz":
        np.savez(path, **content)
    elif name == "a.npy":
        np.save(path, content)
    else:
        torch.save(content, path)
    with pytest.raises(BadInput, match=f"{name}: .*{message}|{name}: {message}"):
        arrays.images_in(path)


def test_images_in_says_for_each_key_what_happens_and_takes_the_named(tmp_path, capsys):
    masks = np.ones((3, 8, 9), np.uint8)
    np.savez(tmp_path / "seg.npz", images=BYTES, masks=masks, marks=np.ones((2, 68, 2), np.uint8))
    assert [*arrays.images_in(tmp_path / "seg.npz")[1]] == ["images"]
    said = capsys.readouterr().out
    assert "images: 2 colour images of 8x9, purified" in said and "marks: uint8, (2, 68, 2)" in said
    assert [*arrays.images_in(tmp_path / "seg.npz", ["masks"])[1]] == ["masks"]
    assert "masks: 3 grey images of 8x9, purified" in capsys.readouterr().out
    with pytest.raises(BadInput, match="seg.npz: --key mask: images uint8"):
        arrays.images_in(tmp_path / "seg.npz", ["mask"])


# -- Damaged files ---------------------------------------------------------------------------------

def mutations(content, count, seed=0):
    """Copies of a file with a few bytes changed, cut off, or twice there."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        data = bytearray(content)
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            data[place] = rng.integers(0, 256)
        start, stop = sorted(rng.integers(0, len(data), 2))
        yield bytes([data, data[:stop], data[:start] + data[stop:]][rng.integers(3)])


def test_fuzz_open_image_and_read_arrays_and_load_raise_BadInput_or_read(tmp_path):
    kinds = {"a.png": "PNG", "a.jpg": "JPEG", "a.webp": "WEBP", "a.bmp": "BMP", "a.gif": "GIF",
             "b.bmp": "TIFF"}                              # the content decides, not the name
    originals = {}
    for name, kind in kinds.items():
        content = io.BytesIO()
        more = [picture("RGB")] if kind in ("GIF", "TIFF") else []
        options = dict(save_all=True, append_images=more) if more else {}
        picture("RGB", (12, 10)).save(content, kind, **options)
        originals[name] = files.open_image, content.getvalue()
    for name in ("a.npy", "a.npz", "a.pt"):
        stored(tmp_path / name, as_bytes(images(2, 4)).numpy())
        originals[name] = files.read_arrays, (tmp_path / name).read_bytes()
    torch.save(checkpoint(VGG(width=1, convs=(1,))), tmp_path / "vgg.pt")
    originals["vgg.pt"] = perceptual.load, (tmp_path / "vgg.pt").read_bytes()
    refused = 0
    for name, (reader, content) in originals.items():
        for mutated in mutations(content, 30):
            (tmp_path / name).write_bytes(mutated)
            try:
                reader(tmp_path / name)
            except BadInput as error:
                refused += 1
                assert name in str(error)
    assert refused > 100
