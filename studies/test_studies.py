"""Tests of the studies and of the user's own files, found by `python -m pytest` with the others."""
import base64
import functools
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import attacks
import le
import perceptual
import train
import unet
from attacks import EPSILON, SimCLR, Victim, fit, partner_scores, publish
from le import BadInput, Sampler, purify
from perceptual import VGG
from studies import (ablation, answers, arrays, contrastive, handout, opponents, pictures,
                     protections, purifiers, scenarios)
from studies import purify as own_images
from studies.grading import CLAIMS
from test_le import (FREE, HERE, JOINT, SMALL, TINY, Malice, asked_for, awake, checkpoint,
                     configured, copy_of_the_project, images, nets, refusal, same, seeded,
                     silent, small_run)
from unet import DEVICE, UNet, on_device

CIFAR10_MINI = HERE.parent / "shared" / "data" / "cifar-10-mini.tar.gz"


# -- Data sets in files ---------------------------------------------------------------------------

def cifar10_files(records=20):
    """The official layout in small: {name: bytes}, and the records (6, records, 3073) in them."""
    data = np.random.default_rng(0).integers(0, 256, (6, records, 3073), dtype=np.uint8)
    data[:, :, 0] %= 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    return {name: part.tobytes() for name, part in zip(names, data)}, data


def write_cifar10(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_load_data_keeps_the_test_batch_of_cifar10_apart(tmp_path):
    files, data = cifar10_files()
    root = write_cifar10(tmp_path / "c.tar.gz", files)
    cifar = ["--data", "cifar10", "--root", root]
    sets, _ = train.load_data(configured(*cifar, *asked_for(50, 30, 20, 15)))
    same(sets["test"][1], torch.from_numpy(data[5, :15, 0]).long())
    assert len({x.numpy().tobytes() for part, _ in sets.values() for x in part}) == 115
    with pytest.raises(BadInput, match="100 images for 51 protected"):
        train.load_data(configured(*cifar, *asked_for(51, 30, 20, 15)))
    with pytest.raises(BadInput, match="--images.test 21: .* has 20"):
        train.load_data(configured(*cifar, *asked_for(50, 30, 20, 21)))


def test_cifar10_reads_planes_and_labels(tmp_path):
    files, data = cifar10_files()
    (x, y), (test_x, test_y) = train.cifar10(write_cifar10(tmp_path / "c.tar.gz", files))
    assert x.shape == (100, 3, 32, 32) and test_x.shape == (20, 3, 32, 32)
    record = data[2, 5]                                    # the sixth of the third batch: image 45
    assert y[45] == record[0]
    assert math.isclose(x[45, 1, 3, 7], record[1 + 1024 + 3 * 32 + 7] / 255, rel_tol=1e-6)
    same(test_y, torch.from_numpy(data[5, :, 0]).long())


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("damage", ["cut", "a bit turned over"])
def test_cifar10_notices_a_damaged_archive(tmp_path, mode, damage):
    path = write_cifar10(tmp_path / "c.tar.gz", cifar10_files()[0], mode)
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    content[place] ^= 1
    path.write_bytes(content[:place] if damage == "cut" else content)
    with pytest.raises(BadInput, match="c.tar.gz"):
        train.cifar10(path)


@pytest.mark.parametrize("name, start, cut", [
    ("data_batch_2.bin", b"", -1), ("test_batch.bin", b"\x0b", None), ("data_batch_5.bin", b"", 0)])
def test_cifar10_names_the_broken_file(tmp_path, name, start, cut):
    files, _ = cifar10_files()
    files[name] = (start + files[name][len(start):])[:cut]
    with pytest.raises(BadInput, match=f"{name} is missing, cut off or mislabelled"):
        train.cifar10(write_cifar10(tmp_path / "c.tar.gz", files))


@pytest.mark.skipif(not CIFAR10_MINI.exists(), reason="no real CIFAR-10 beside the project")
def test_cifar10_reads_real_images():
    (x, y), (test_x, test_y) = train.cifar10(CIFAR10_MINI)
    assert len(x) == 12000 and len(test_x) == 2400 and set(y.tolist()) == set(range(10))
    neighbours = (x[:, :, 1:] - x[:, :, :-1]).abs().mean()
    strangers = (x[1:] - x[:-1]).abs().mean()
    assert 3 * neighbours < strangers                      # photographs are smooth


def class_folders(root, per_class=12, size=(40, 36)):
    for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            suffix = "png" if i % 2 else "jpg"
            Image.new("RGB", size, colour).save(root / name / f"{i}.{suffix}")
    return root


def test_folder_crops_resizes_and_labels(tmp_path):
    pets = class_folders(tmp_path / "pets")
    x, y, files = train.folder(pets, 32)
    assert x.shape == (24, 3, 32, 32) and y.tolist() == [0] * 12 + [1] * 12
    assert files[0] == pets / "cat" / "0.jpg" and train.classes_in(pets) == ["cat", "dog"]
    assert (x[0].mean((1, 2)) * 255 - torch.tensor([200, 30, 30])).abs().max() < 3  # JPEG


def test_folder_says_what_it_leaves_out_and_names_what_it_cannot_use(tmp_path, capsys):
    pets = class_folders(tmp_path / "pets")
    (pets / "notes.txt").write_text("not an image")
    (pets / ".ipynb_checkpoints").mkdir()                  # a notebook's, and a Mac's
    shutil.copy(pets / "cat" / "0.jpg", pets / ".ipynb_checkpoints")
    (pets / "cat" / "._0.jpg").write_bytes(b"no image")
    assert len(train.folder(pets, 32)[0]) == 24
    said = capsys.readouterr().out
    assert "pets: 1 files that are no images" in said and "notes.txt" in said
    (pets / "cat" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(BadInput, match="bad.png"):
        train.folder(pets, 32)
    with pytest.raises(BadInput, match="two or more"):
        train.folder(pets / "cat", 32)
    with pytest.raises(BadInput, match="named cat, bird"):
        train.folder(pets, 32, ["cat", "bird"])


def test_load_data_judges_on_the_test_folder_where_there_is_one(tmp_path, capsys):
    class_folders(tmp_path / "train", 24)
    class_folders(tmp_path / "test", 3)
    sets, classes = train.load_data(configured("--data", tmp_path))
    assert classes == ["cat", "dog"] and len(sets["test"][1]) == 6
    assert len(sets["protected"][1]) > 10
    assert "2 classes, cat, dog; images: 6 test, " in capsys.readouterr().out
    sets, _ = train.load_data(configured("--data", tmp_path, "--limit", 4))
    assert [len(labels) for _, labels in sets.values()] == [4] * 4
    assert all(len(labels.unique()) > 1 for _, labels in sets.values())


def test_in_proportion_gives_every_set_an_image_and_divides_no_more_than_there_are():
    assert train.in_proportion(dict(a=60, b=30, c=10), 10) == dict(a=6, b=3, c=1)
    assert train.in_proportion(dict(a=1, b=5500, c=1, d=1), 100) == dict(a=1, b=97, c=1, d=1)
    assert sum(train.in_proportion(dict(a=1, b=1, c=1), 2).values()) == 3  # which is refused


def test_load_data_leaves_a_small_folder_to_the_unet_as_the_readme_says(tmp_path):
    pets = class_folders(tmp_path / "pets")
    sets, _ = train.load_data(configured("--data", pets, *asked_for(1, 5500, 1, 1)))
    assert {name: len(labels) for name, (_, labels) in sets.items()} == dict(
        protected=1, unprotected=21, validation=1, test=1)


def noisy_folders(root, originals):
    """A folder as somebody has who protects: UEs, others, clean test images, perhaps originals."""
    for name, count in (("unprotected", 12), ("test", 3), ("original", 6)):
        class_folders(root / name, count)
    for file in (root / "original").rglob("*.*"):
        ue = root / "protected" / file.relative_to(root / "original").with_suffix(".png")
        ue.parent.mkdir(parents=True, exist_ok=True)
        Image.eval(Image.open(file), lambda level: min(255, level + 5)).save(ue)
    if not originals:
        shutil.rmtree(root / "original")
    return root


@pytest.mark.parametrize("originals", [True, False])
def test_main_judges_what_lies_in_a_folder_of_protected_images(tmp_path, originals, capsys):
    root = noisy_folders(tmp_path / "mine", originals)
    command = ["--data", str(root), *SMALL[:10], "--unet.attention", "", "--ddpm.levels", "200",
               "--out", str(tmp_path / "run")]
    train.main(command)
    said = capsys.readouterr().out
    row = re.search(r"^\| published \| (.*) \|$", said, re.M)[1].split(" | ")
    assert [cell == "-" for cell in row[:1] + row[4:]] == [not originals] * 3
    assert all(0 <= float(cell) <= 100 for cell in row[1:3]) and "4 protected" in said
    if not originals:
        said = refusal(train.main, [*command, "--protections", "em-class"], capsys)
        assert "--protections em-class: there are no originals" in said
    if originals:
        shutil.copy(root / "original" / "cat" / "0.jpg", root / "original" / "cat" / "0.png")
        with pytest.raises(BadInput, match="they differ in how many have one name"):
            train.load_data(configured("--data", root))
    said = refusal(train.main, [*command, "--published", "ue.npy"], capsys)
    assert "--published: expected a --data that is not protected yet" in said
    with pytest.raises(BadInput, match="they differ in"):
        (root / "protected" / "cat" / "0.png").rename(root / "protected" / "cat" / "new.png")
        shutil.copytree(root / "protected", root / "original", dirs_exist_ok=True)
        (root / "original" / "cat" / "new.png").rename(root / "original" / "cat" / "old.png")
        train.load_data(configured("--data", root))


# -- UEs that somebody else has published ----------------------------------------------------------

@pytest.fixture
def cifar(tmp_path):
    """Options that name an archive of 100 training and 20 test images, and the first 40 images."""
    files, data = cifar10_files()
    root = write_cifar10(tmp_path / "c.tar.gz", files)
    (x, y), _ = train.cifar10(root)
    return ["--data", "cifar10", "--root", root, *asked_for(40, 30, 20, 15)], x[:40], y[:40]


def stored(path, array):
    """An array in a file of the kind that its name says."""
    if path.suffix == ".pt":
        torch.save(torch.as_tensor(array), path)
    elif path.suffix == ".npz":
        np.savez(path, labels=np.arange(3), data=array)
    else:
        np.save(path, array)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz"])
@pytest.mark.parametrize("kind", ["float", "int8", "class-wise", "bytes", "images"])
def test_load_data_reads_published_perturbations_and_UEs_in_the_order_of_the_set(
        tmp_path, cifar, suffix, kind):
    options, x, y = cifar
    steps = torch.randint(-8, 9, (10 if kind == "class-wise" else 40, 3, 32, 32))
    noise = steps
    if kind == "class-wise":                               # which any images can wear
        (x, y), _ = train.cifar10(options[3])
        places = train.spaced(100, 40)
        x, y = x[places], y[places]
        noise = steps[y]
    ue = attacks.publish(x, noise / 255)
    content = {"float": steps / 255, "int8": steps.to(torch.int8), "class-wise": steps / 255,
               "bytes": le.as_bytes(ue), "images": ue}[kind]
    if suffix != ".pt":
        content = content.permute(0, 2, 3, 1)
    file = stored(tmp_path / f"ue{suffix}", content.numpy())
    sets, _ = train.load_data(configured(*options, "--published", file))
    same(sets["protected"][0], x)
    torch.testing.assert_close(sets["published"][0], ue, rtol=0, atol=1e-6)
    assert torch.equal(sets["published"][1], y) and len(sets["unprotected"][1]) == 30
    others = {image.numpy().tobytes() for name in ("unprotected", "validation")
              for image in sets[name][0]}
    assert len(others) == 50 and not others & {image.numpy().tobytes() for image in x}


def test_load_data_reads_a_folder_of_numbered_images_by_their_numbers(tmp_path, cifar):
    options, x, y = cifar
    (tmp_path / "ue").mkdir()
    for i, pixels in enumerate(le.as_bytes(x[:12]).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(tmp_path / "ue" / f"{i}.png")  # 10.png lies before 2.png
    sets, _ = train.load_data(configured(*options, "--published", tmp_path / "ue"))
    same(sets["published"][0], x[:12])
    (tmp_path / "ue" / "cat.png").write_bytes((tmp_path / "ue" / "0.png").read_bytes())
    with pytest.raises(BadInput, match="expected 0.png, 1.png, .* there is no 12"):
        train.load_data(configured(*options, "--published", tmp_path / "ue"))
    (tmp_path / "ue" / "thumbnails").mkdir()               # which are not among the images
    (tmp_path / "ue" / "cat.png").rename(tmp_path / "ue" / "thumbnails" / "0.png")
    same(train.load_data(configured(*options, "--published", tmp_path / "ue"))[0]["published"][0],
         x[:12])
    picture("RGB").save(tmp_path / "ue" / "3.png")
    with pytest.raises(BadInput, match=r"3.png: \(3, 36, 40\), expected .*\(3, 32, 32\)"):
        train.load_data(configured(*options, "--published", tmp_path / "ue"))


@pytest.mark.parametrize("content, message", [
    (torch.rand(40, 3, 32, 32) * 300, r"float32, \(40, 3, 32, 32\), .* to 3\d\d; expected images"),
    (torch.rand(40, 3, 32, 32) * 2 - 1, "-1 to 1; expected images"),  # of a budget not said
    (torch.rand(40, 3, 28, 28), r"\(40, 3, 28, 28\)"),
    (torch.rand(200, 3, 32, 32) / 50, "200 images, but the training set of cifar10 has 100"),
    (torch.rand(40, 3, 32, 32), "not the first of the training set .* in its order"),
    (torch.rand(100, 3, 32, 32) / 50, "the 0 training images that are .* expected --unprotected"),
])
def test_load_data_says_what_a_published_file_holds_that_is_neither(tmp_path, cifar, content,
                                                                    message):
    file = stored(tmp_path / "ue.pt", content)
    with pytest.raises(BadInput, match=f"ue.pt: .*{message}"):
        train.load_data(configured(*cifar[0], "--published", file))


@pytest.mark.parametrize("others", ["test", "folder"])
def test_load_data_takes_the_unprotected_images_from_elsewhere_if_all_are_protected(
        tmp_path, cifar, others):
    options, _, _ = cifar
    file = stored(tmp_path / "ue.pt", torch.rand(100, 3, 32, 32) / 50)
    if others == "folder":
        for i, name in enumerate(train.CIFAR10_CLASSES):
            (tmp_path / "folder" / name).mkdir(parents=True)
            picture("RGB").rotate(i).save(tmp_path / "folder" / name / "a.png")
        others = tmp_path / "folder"
    c = configured(*options, "--published", file, "--unprotected", others)
    sets, _ = train.load_data(c)
    assert len(sets["protected"][1]) == 100 and c.run.name == "cifar10-ue"
    from_there = [len(sets[name][1]) for name in ("unprotected", "validation")]
    assert min(from_there) > 0
    if others == "test":                                   # all of them, --images.test or not
        assert sum(from_there) + len(sets["test"][1]) in (19, 20)


def test_main_gives_a_row_for_a_published_perturbation(tmp_path, cifar, capsys):
    file = stored(tmp_path / "ue.pt", torch.rand(10, 3, 32, 32) / 50)
    options = [str(option) for option in cifar[0][:4]]
    small = [*SMALL[:10], "--unet.attention", "", "--ddpm.levels", "200"]
    train.main([*options, *small, "--published", str(file), "--victim", "simclr",
                "--protections", "published,em-class", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "simclr on published-le" in said
    assert re.search(r"^\| published \| \d.*\n\| em-class \| \d", said, re.M)


def test_load_data_refuses_published_images_of_a_single_class(tmp_path):
    pets = class_folders(tmp_path / "pets")                # cats first
    file = stored(tmp_path / "ue.npy", np.full((3, 32, 32, 3), 0.02, np.float32))
    whole = stored(tmp_path / "most.npy", np.full((15, 32, 32, 3), 0.02, np.float32))
    with pytest.raises(BadInput, match="the 9 training images .* are of 1 of 2 classes; expected"):
        train.load_data(configured("--data", pets, "--published", whole))
    sets, _ = train.load_data(configured("--data", pets, "--published", whole, "--limit", 4,
                                         "--unprotected", pets))
    assert sets["published"][1].tolist() == [0, 0, 0, 1]
    with pytest.raises(BadInput, match="its 3 images are of one class"):
        train.load_data(configured("--data", pets, "--published", file))


def test_load_data_takes_a_perturbation_for_each_class_of_a_folder(tmp_path):
    pets = class_folders(tmp_path / "pets")
    noise = np.stack([np.full((32, 32, 3), 0.02), np.full((32, 32, 3), -0.02)])
    file = stored(tmp_path / "ue.npy", noise.astype(np.float32))
    options = ["--data", pets, "--published", file, *asked_for(15, 3, 3, 3)]
    sets, _ = train.load_data(configured(*options))
    (x, y), (ue, _) = sets["protected"], sets["published"]
    assert len(x) == 15 and len(sets["unprotected"][1]) == 3
    same(ue, attacks.publish(x, torch.from_numpy(noise).float().permute(0, 3, 1, 2)[y]))
    with pytest.raises(BadInput, match="--unprotected test: .*pets has no test set"):
        train.load_data(configured(*options, "--unprotected", "test"))


def test_main_runs_on_a_folder_that_keeps_its_runs_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [*SMALL[:10], "--unet.attention", "", "--protections", "em-class",
             "--ddpm.levels", "200"]
    train.main(["--data", str(class_folders(tmp_path / "a" / "pets")), *small])
    assert "| em-class |" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "pets-limit4" / "vgg.pt").exists()  # nothing perceptual there
    other = ["--data", class_folders(tmp_path / "b" / "pets"), *small]
    assert "belongs to --data" in refusal(train.main, other, capsys)
    few = ["--data", class_folders(tmp_path / "few", 2), "--out", "few-run"]
    assert "two or more images" in refusal(train.main, few, capsys)
    assert not list((tmp_path / "few-run").glob("*.pt"))


# -- Images in files -------------------------------------------------------------------------------

def picture(mode, size=(40, 36)):
    """A smooth Pillow image, different in every channel."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    bands = np.stack([3 * x + 60, 255 - 4 * y, 2 * (x + y), 255 * (x > y)], -1)
    rgba = Image.fromarray(bands.astype(np.uint8))
    if mode == "P":
        return rgba.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    return rgba.convert(mode)


@pytest.mark.parametrize("mode, transparency, expected", [
    ("RGB", None, "RGB"), ("RGBA", None, "RGBA"), ("L", None, "L"), ("LA", None, "LA"),
    ("P", None, "RGB"), ("P", 0, "RGBA"), ("RGB", (60, 255, 0), "RGBA"), ("L", 168, "RGBA")])
def test_open_image_keeps_transparency(tmp_path, mode, transparency, expected):
    picture(mode).save(tmp_path / "a.png", transparency=transparency)
    image = le.open_image(tmp_path / "a.png")
    assert image.mode == expected
    if transparency is not None:
        assert image.getchannel("A").getextrema()[0] == 0


# An RGB PNG of 16 bits a channel, which Pillow cannot write
DEEP_PNG = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAA"
            "D0lEQVR4nGNgYGRiZmEFAAAqABAazIwkAAAAAElFTkSuQmCC")


def test_open_image_turns_takes_the_first_frame_and_refuses(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                       # to be turned by 90 degrees
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert le.open_image(tmp_path / "turned.jpg").size == (36, 40)
    frames = [picture("RGB").rotate(90)]
    picture("RGB").save(tmp_path / "two.gif", save_all=True, append_images=frames)
    first = np.array(le.open_image(tmp_path / "two.gif").convert("RGB")).astype(int)
    assert np.abs(first - np.array(picture("RGB"))).mean() < 20
    (tmp_path / "deep.png").write_bytes(base64.b64decode(DEEP_PNG))
    picture("CMYK").save(tmp_path / "cmyk.jpg")
    (tmp_path / "text.png").write_text("not an image")
    wrong = {"deep.png": "16 bits", "cmyk.jpg": "mode CMYK", "text.png": "readable"}
    for name, message in wrong.items():
        with pytest.raises(BadInput, match=f"{name}: .*{message}"):
            le.open_image(tmp_path / name)


def test_open_image_refuses_image_bombs(tmp_path, monkeypatch):
    picture("RGB").save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadInput, match="large.png"):
        le.open_image(tmp_path / "large.png")


# -- studies/purify.py and arrays.py: the user's own files -----------------------------------------

@pytest.fixture
def checkpoints(nets, tmp_path):
    """The options that name two small checkpoints, and a short way."""
    unet.save(tmp_path / "unet.pt", checkpoint(nets[0]))
    unet.save(tmp_path / "vgg.pt", checkpoint(nets[1].vgg))
    files = ["--unet", str(tmp_path / "unet.pt"), "--perceptual", str(tmp_path / "vgg.pt")]
    return [*files, "--t_star", "12", "--steps", "2", "--pixel_above", "6"]


def test_read_arrays_runs_no_code(tmp_path, capsys):
    np.save(tmp_path / "evil.npy", np.array([Malice()]), allow_pickle=True)
    with pytest.raises(BadInput, match="evil.npy"):
        le.read_arrays(tmp_path / "evil.npy")
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("length, tile, overlap", [(32, 128, 16), (129, 128, 16), (500, 128, 16),
                                                   (1000, 64, 8)])
def test_positions_cover_the_length_with_overlap(length, tile, overlap):
    starts = arrays.positions(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile >= length and starts[-1] == max(0, length - tile)
    assert all(a + tile - b >= overlap for a, b in zip(starts, starts[1:]))


def test_purify_any_keeps_the_size_and_equals_purify_where_it_fits(nets):
    x = images(2, 32)
    expected = purify(*nets, x, JOINT, [5 * 1_000_003, 6 * 1_000_003])
    same(arrays.purify_any(*nets, x, JOINT, [5, 6]), expected)
    for size in ((1, 1), (5, 47), (33, 32)):
        y = arrays.purify_any(*nets, torch.rand(1, 3, *size), JOINT, [0])
        assert y.shape == (1, 3, *size) and torch.allclose(y * 255, (y * 255).round(), atol=1e-3)


def test_purify_any_pads_to_what_a_unet_of_other_patches_takes():
    net = UNet(width=8, mults=(1, 2), blocks=1, attention=(), patch=3, size=36).eval()
    unguided = replace(JOINT, pixel_weight=0.0, perceptual_weight=0.0)
    for size in ((7, 40), (33, 150)):                      # multiples of 6, and tiles of 126
        made = arrays.purify_any(net, None, torch.rand(1, 3, *size), unguided, [0])
        assert made.shape == (1, 3, *size)


def test_purify_any_blends_tiles_without_seams():
    net = UNet(**TINY).eval().requires_grad_(False)        # predicts no noise: its end is zero
    x = torch.full((1, 3, 80, 80), 0.5)
    sampler = replace(FREE, t_star=1, steps=1, rounds=1)   # no diffusion to speak of
    y = arrays.purify_any(net, None, x, sampler, [0], tile=32, overlap=8)
    assert (y - 0.5).abs().max() < 0.06 and y.std() > 0


def files_in(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def test_main_purify_purifies_a_folder_to_pngs_and_says_what_it_leaves_out(
        tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep" / "er").mkdir(parents=True)
    picture("RGB").save(source / "a.png")
    picture("RGB").save(source / "a.jpg")                  # beside a.png
    picture("RGBA").save(source / "deep" / "b.png")
    picture("L").save(source / "deep" / "er" / "c.bmp")
    picture("LA").save(source / "d.PNG")
    picture("RGB", (7, 5)).save(source / "f.webp", lossless=True)
    (source / "notes.txt").write_text("not an image")
    (source / "linked").symlink_to(tmp_path)
    own_images.main([str(source), str(out), *checkpoints])
    said = capsys.readouterr().out
    assert "2 that are not images" in said and "notes.txt" in said and "linked" in said
    made = {name: Image.open(path) for name, path in files_in(out).items()}
    assert {name: (image.mode, image.size) for name, image in made.items()} == {
        "a.png": ("RGB", (40, 36)), "a.jpg.png": ("RGB", (40, 36)), "d.PNG.png": ("LA", (40, 36)),
        "deep/b.png": ("RGBA", (40, 36)), "deep/er/c.bmp.png": ("L", (40, 36)),
        "f.webp.png": ("RGB", (7, 5))}
    alpha = made["deep/b.png"].getchannel("A").tobytes()
    assert alpha == picture("RGBA").getchannel("A").tobytes()
    assert made["a.png"].tobytes() != picture("RGB").tobytes()
    own_images.main([str(source / "a.png"), str(tmp_path / "one.png"), *checkpoints])
    assert (tmp_path / "one.png").read_bytes() == (out / "a.png").read_bytes()


def test_main_purify_goes_on_and_names_what_it_cannot_read(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        picture("RGB").save(source / f"{name}.png")
    own_images.main([str(source), str(out), *checkpoints])
    first = {name: path.read_bytes() for name, path in files_in(out).items()}
    (out / "a.png").write_bytes(first["a.png"][:100])      # half a file, and an empty one
    (out / "b.png").write_bytes(b"")
    (source / "0.png").write_bytes((source / "a.png").read_bytes()[:54])
    with pytest.raises(SystemExit) as stop:
        own_images.main([str(source), str(out), *checkpoints])
    said = capsys.readouterr()
    assert stop.value.code == 1 and "1 files could not be read" in said.err
    assert "1 of 4 are there already" in said.out and "0.png: not a readable image" in said.err
    assert {name: path.read_bytes() for name, path in files_in(out).items()} == first


def test_main_purify_takes_any_seed_and_copies_what_is_no_array(tmp_path, checkpoints):
    source, out = tmp_path / "in.pt", tmp_path / "out.pt"
    others = dict(classes=["cat", "dog"], note=None, meta=dict(epsilon=8))
    torch.save(dict(images=images(2, 16), **others), source)
    own_images.main([str(source), str(out), *checkpoints, "--seed", str(2 ** 31 - 1)])
    made = torch.load(out)
    assert made.pop("images").shape == (2, 3, 16, 16) and made == others


def test_images_in_refuses_one_image_which_is_not_many_grey_ones(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(BadInput, match="expected 8-bit images, N x H x W x 3"):
        arrays.images_in(tmp_path / "one.npy")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_main_purify_takes_an_array_the_same_after_an_interruption(tmp_path, checkpoints, suffix,
                                                                     monkeypatch):
    x, source, out = images(70, 16), tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    content = x if suffix == ".pt" else le.as_bytes(x).permute(0, 2, 3, 1).numpy()
    stored(source, content)
    command = [str(source), str(out), *checkpoints]
    own_images.main(command)
    arrays_in, whole = arrays.images_in(out)
    made = whole["data" if suffix == ".npz" else ""]
    assert made.shape == x.shape and not torch.equal(made, x)
    assert suffix != ".npz" or (arrays_in["labels"] == np.arange(3)).all()
    out.unlink()

    def stopped(label):
        def report(done, total):
            if done == 70:
                raise KeyboardInterrupt
        return report
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "Progress", stopped)
        patch.setattr(arrays.purify_array, "__defaults__", (0,))
        patch.setattr(arrays, "BATCH", 8)
        with pytest.raises(SystemExit) as stop:
            own_images.main(command)
        assert stop.value.code == 130 and not out.exists()
        with pytest.raises(SystemExit):                    # another seed does not take what is done
            own_images.main([*command, "--seed", "1"])
    assert len(list(tmp_path.glob("*.partial"))) == 2
    own_images.main(command)
    same(arrays.images_in(out)[1]["data" if suffix == ".npz" else ""], made)
    assert len(list(tmp_path.glob("*.partial"))) == 1


BYTES = np.arange(2 * 8 * 9 * 3, dtype=np.uint8).reshape(2, 8, 9, 3)


@pytest.mark.parametrize("name, content", [
    ("a.npy", BYTES), ("a.npy", np.moveaxis(BYTES, 3, 1)), ("a.npy", BYTES / 255),
    ("a.npy", np.float32(np.moveaxis(BYTES, 3, 1)) / 255), ("a.npy", BYTES[..., 0]),
    ("a.npz", dict(arr_0=BYTES, arr_1=np.arange(2))),      # guided-diffusion's samples
    ("a.npz", dict(x_train=BYTES, y_train=np.arange(2), x_test=BYTES)),
    ("a.npz", dict(train_images=BYTES[..., 0], train_labels=np.zeros((2, 1)))),  # MedMNIST's
    ("a.pt", torch.from_numpy(np.moveaxis(BYTES, 3, 1))), ("a.pt", dict(images=BYTES / 255)),
    ("a.npy", (BYTES / 255).astype(">f4")),                # of another machine
    ("a.pt", torch.from_numpy(np.moveaxis(BYTES / 255, 3, 1)).bfloat16()),
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
    last = name != "a.pt"
    for key, x in seen.items():
        back = arrays.written(found[key], x, last)
        assert back.shape == found[key].shape and back.dtype == found[key].dtype
        step = 1 if back.dtype == np.uint8 else 1e-6       # grey goes by way of three channels
        assert np.abs(back - found[key].astype(float)).max() <= step
    arrays.write_arrays(tmp_path / f"b{name}", found)
    again = le.read_arrays(tmp_path / f"b{name}")
    assert all((again[key] == found[key]).all() for key in found)


@pytest.mark.parametrize("name, content, message", [
    ("a.npy", np.zeros((4, 8, 8, 4), np.uint8), r"uint8, \(4, 8, 8, 4\), 0 to 0; expected"),
    ("a.npy", np.full((4, 8, 8, 3), 2.5), "float64, .*, 2.5 to 2.5; expected"),
    ("a.npy", np.zeros((0, 8, 8, 3), np.uint8), "expected 8-bit"),
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
    elif name == "a.npy":
        np.save(path, content)
    elif name == "a.npz":
        np.savez(path, **content)
    else:
        torch.save(content, path)
    with pytest.raises(BadInput, match=f"{name}: .*{message}|{name}: {message}"):
        arrays.images_in(path)


@pytest.mark.parametrize("arguments, message", [
    (["nowhere", "out"], "nowhere: no such file"),
    (["in", "in/out"], "expected a place outside in"),
    (["in", "in"], "expected a place outside in"),
    (["in", "out"], "--unet is missing; `python train.py ddpm"),
    (["in", "out", "--unet", "x.pt"], "--perceptual is missing: the vgg.pt of a run"),
    (["in", "out", "--unet", "x.pt", "--perceptual", "y.pt"], "x.pt"),
    (["in", "out", "--steps", "0"], "steps"),
    (["in", "out", "--pixel_weight", "nan"], "weights"),
    (["in", "out", "--seed", "-1"], "--seed -1"),
    (["in", "out", "--fast"], "--fast"),
    (["in/a.npy", "out.npz"], "both end in"),
    (["in/a.png", "out.jpg"], "an image and a .png"),
    (["in/a.png", "in"], "an image and a .png"),
    (["in", "in/a.png"], "expected a place outside in"),
])
def test_main_purify_refuses_bad_input_in_one_line(
        tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    np.save("in/a.npy", np.zeros((1, 8, 8, 3), np.uint8))
    picture("RGB").save("in/a.png")
    said = refusal(own_images.main, arguments, capsys)
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_main_purify_refuses_targets_that_are_taken(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    picture("RGB").save(source / "a.jpg")
    (out / "a.jpg.png").mkdir(parents=True)
    command = [source, out, *checkpoints]
    assert "a.jpg.png: a folder" in refusal(own_images.main, command, capsys)
    (out / "a.jpg.png").rmdir()
    picture("RGB").save(source / "a.jpg.png")
    assert "would both become" in refusal(own_images.main, command, capsys)


def test_main_purify_takes_names_of_any_bytes_and_length(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in (b"\xff\xfe.jpg", "ü.png".encode(), b"l" * 251 + b".jpg"):
        with open(os.path.join(os.fsencode(source), name), "wb") as file:
            picture("RGB").save(file, "PNG")               # the content decides, not the name
    said = refusal(own_images.main, [source, out, *checkpoints], capsys, code=1)
    assert "its name leaves no room" in said
    assert sorted(os.listdir(os.fsencode(out))) == [b"\xc3\xbc.png", b"\xff\xfe.jpg.png"]


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
    seeds = {"a.png": "PNG", "a.jpg": "JPEG", "a.webp": "WEBP", "a.bmp": "BMP", "a.gif": "GIF",
             "b.bmp": "TIFF"}                              # the content decides, not the name
    originals = {}
    for name, kind in seeds.items():
        content = io.BytesIO()
        picture("RGB", (12, 10)).save(content, kind)
        originals[name] = le.open_image, content.getvalue()
    for name in ("a.npy", "a.npz", "a.pt"):
        stored(tmp_path / name, le.as_bytes(images(2, 4)).numpy())
        originals[name] = le.read_arrays, (tmp_path / name).read_bytes()
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


# -- Other machines --------------------------------------------------------------------------------

class NotebookStream(io.StringIO):
    """A stream such as ipykernel's, which is no text file."""
    reconfigure = property()


def test_main_runs_in_a_notebook_and_outside_the_main_thread(tmp_path, monkeypatch, small_run):
    folder = shutil.copytree(small_run, tmp_path / "run")
    stream, failed = NotebookStream(), []
    assert not hasattr(stream, "reconfigure")
    monkeypatch.setattr(sys, "stdout", stream)

    def work():
        try:
            train.main([*SMALL, "--protections", "em-class", "--out", str(folder)])
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    assert "| em-class |" in stream.getvalue()


def test_main_runs_without_distributed_and_where_text_is_not_utf_8(tmp_path):
    copied = copy_of_the_project(tmp_path / "kopie-ü")
    with open(copied / "attacks.py", "a", encoding="utf-8") as file:
        file.write("# für alle\n")
    program = tmp_path / "main.py"
    program.write_text("import sys, runpy; sys.modules['torch.distributed.nn'] = None; "
                       "sys.path.insert(0, sys.argv[1]); import train; train.main(sys.argv[2:])")
    command = [sys.executable, program, copied, "ddpm", *SMALL, "--out", tmp_path / "run"]
    plain = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", OMP_NUM_THREADS="1")
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True,
                          env=os.environ | plain)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"vgg: made" in done.stdout


def test_main_says_in_one_line_that_WORLD_SIZE_alone_is_no_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(le, "PROCESSES", 2)                # as `unet` reads it from WORLD_SIZE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    said = refusal(train.main, SMALL, capsys)
    assert said.count("\n") == 1 and "WORLD_SIZE is set" in said and "MASTER_ADDR" in said


# -- studies ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("study, written", [
    (["pictures"], ["overview", "forward", "strip", "curves", "confusion", "neighbours"]),
    (["ablation", "--only", "JPEG 10", "--protection", "em-class"], []),
    (["ablation", "--only", "unguided, DDIM", "--protection", "em-class"], []),
    (["ablation", "--only", "joint, on grey", "--protection", "cp-class"], []),
    (["scenarios", "code", "--victims", "1"], ["code"]),
    (["scenarios", "longer", "--victims", "1"], ["longer"]),
    (["scenarios", "mean", "--victims", "1", "--protections", "em-class"], ["mean"]),
    (["scenarios", "ceiling", "--victims", "1", "--protections", "em-class"], ["ceiling"]),
    (["scenarios", "others", "--victims", "1", "--protections", "targeted",
      "--sampler.perceptual_weight", "0"], ["others"]),   # as on photographs
    (["scenarios", "mend", "--victims", "1"], ["mend"]),
    (["scenarios", "few", "--victims", "1"], ["few"]),
    (["scenarios", "shift", "--victims", "1"], ["shift", "shift-images"]),
    (["scenarios", "victims", "--victims", "1", "--protections", "em-class"], ["victims"]),
    (["scenarios", "reply", "--victims", "1"], ["reply"]),
    (["scenarios", "strides", "--victims", "1", "--protections", "em-class"], ["strides"]),
    (["scenarios", "worth", "--victims", "1"], ["worth"]),
    (["scenarios", "part", "--victims", "1"], ["part"]),
])
def test_main_studies_run_on_a_run(tmp_path, small_run, study, written, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    name, *options = study
    main = importlib.import_module(f"studies.{name}").main
    main([*options, *SMALL, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert ("ddpm: kept" in said or name == "scenarios") and (written or said.count("|") > 10)
    for picture_name in written:
        assert Image.open(tmp_path / "run" / f"{picture_name}.png").width > 300
    if study[1:2] == ["part"]:
        assert "part, em-sample" in said                   # the question's own, of a whole run


@pytest.mark.parametrize("name", le.SAMPLERS)
def test_ablation_changes_what_the_name_of_its_row_says(name):
    sampler = le.SAMPLERS[name]
    rows = {}
    for part in ablation.questions(sampler).values():
        rows |= part
    alone, both = rows["perceptual only"], rows["joint, both"]
    assert alone.perceptual_weight > 0 and alone.pixel_weight == 0 and both.perceptual_weight > 0
    other = "colour" if sampler.compare == "grey" else "grey"
    assert rows[f"joint, on {other}"] == replace(sampler, compare=other)


def test_pictures_says_where_there_is_nothing_to_draw(tmp_path, small_run, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    pictures.main(["scenarios", *SMALL, "--out", str(tmp_path / "run")])
    assert "scenarios: there is nothing to draw yet" in capsys.readouterr().err


def test_main_studies_know_victims_of_ones_own_and_runs_of_two_images(tmp_path, monkeypatch):
    monkeypatch.setitem(attacks.VICTIMS, "mine", attacks.VICTIMS["classifier"])
    own = replace(attacks.PROTECTIONS["em-class"], victim="mine")
    monkeypatch.setitem(attacks.PROTECTIONS, "own", own)
    small = [*SMALL, "--limit", "2", "--protections", "own", "--out", str(tmp_path / "run")]
    train.main(small)
    scenarios.main(["cross", "--victims", "1", *small])
    assert Image.open(tmp_path / "run" / "cross.png").width > 300
    for picture in ("forward", "strip", "neighbours"):
        pictures.main([picture, *small])


def test_main_scenarios_all_asks_each_with_settings_of_its_own(tmp_path, small_run, monkeypatch):
    seen = []

    def watched(c, sets, count):
        """What does it see?"""
        seen.append(c.evaluate)
        return scenarios.cross(c, sets, count)
    questions = {"probe": scenarios.probe, "cross": watched}
    monkeypatch.setattr(scenarios, "SCENARIOS", questions)
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    scenarios.main(["all", "--victims", "1", "--protections", "em-class", *SMALL,
                    "--out", str(run)])
    assert seen == ["test"]                                # though the probe's are for validation
    for name in questions:
        assert json.loads((run / f"{name}.json").read_text())
        assert Image.open(run / f"{name}.png").width > 300


def test_convolved_filters_every_channel_and_image_of_a_class_alike():
    dot = torch.zeros(6, 3, 8, 8)
    dot[:, :, 4, 4] = 1.0                                  # what becomes of it is the filter
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    made = protections.convolved(dot, labels, None, epsilon=0, seed=0, report=silent)
    filters = made[:, :, 3:6, 3:6].flatten(2)
    assert made.sum() == filters.sum()
    same(filters[:3], filters[3:])
    same(filters[:, :1].expand_as(filters), filters)
    highest, others = filters.sort(descending=True)[0].split((1, 8), dim=2)
    assert (highest == 1).all() and others.max() < 0.31
    assert len({f.numpy().tobytes() for f in filters[:3, 0]}) == 3


def test_patches_fit_any_size():
    ue = protections.patches(images(4, 28), torch.arange(4) % 2, None, epsilon=EPSILON, seed=0,
                             report=silent)
    assert ue.shape == (4, 3, 28, 28)


def test_deterministic_goes_through_all_rounds(monkeypatch):
    net = awake(UNet(**TINY, size=16)).to(DEVICE)
    done = []
    sampler = Sampler(t_star=20, rounds=3, steps=2)
    purifiers.deterministic(net, None, images(2, 16), sampler, [0, 1],
                            lambda count, total: done.append((count, total)))
    assert done == [(2, 6), (4, 6), (6, 6)]


def test_unshared_takes_away_what_all_images_bear_and_others_do_not():
    originals = 0.25 + images(6) / 2
    noise = torch.tensor([8.0, -8.0, 4.0]).view(3, 1, 1) / 255
    unprotected = originals.flip(0)                        # other images, of the same mean
    restored = answers.unshared(publish(originals, noise), unprotected)
    same(restored, publish(originals, 0))


def test_colours_anew_keeps_grey_values_and_no_colours_of_the_noise():
    net = awake(UNet(**TINY, size=16)).to(DEVICE)
    x = 0.3 + 0.4 * images(3, 16)
    sampler = Sampler(t_star=20, rounds=2, steps=2)
    anew = purifiers.colours_anew(net, x, sampler, [3, 1, 2])
    assert (anew - x).mean(1).abs().max() <= 1 / 255 and (anew - x).abs().max() > 20 / 255
    same(purifiers.colours_anew(net, x[1:], sampler, [1, 2]), anew[1:])  # noise is each image's own
    made = purifiers.recoloured(net, None, x, sampler, [3, 1, 2])
    same(made, (255 * made).round() / 255)


def test_main_owner_gives_each_victim_a_noise_of_its_own(tmp_path, small_run):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    scenarios.main(["owner", "--victims", "2", *SMALL, "--out", str(run)])
    assert Image.open(run / "owner.png").width > 300
    made = [unet.read(run / f"owner-8-knows-its-U-Net{k}.pt")["images"] for k in ("", "-1")]
    assert not torch.equal(*made)
    key = "classifier-owner-8-knows-its-U-Net"
    for k, images in zip(("", "-1"), made):
        learned = unet.read(run / f"{key}-UE{k}.pt")["parts"]["images"]
        assert learned == train.hashes(dict(images=on_device(le.as_float(images))))["images"]
    assert len({unet.read(run / f"{key}-LE{k}.pt")["parts"]["images"] for k in ("", "-1")}) == 2


def test_main_pictures_puts_answers_of_scenarios_side_by_side(tmp_path, small_run):
    shutil.copytree(small_run, tmp_path / "run")
    for name in ("few", "part"):
        rows = [{name: f"{n} %", "mix": f"{n}.0 ± 1.0", "PSNR": "9 dB"} for n in (20, 50)]
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps(rows))
    pictures.main(["scenarios", *SMALL, "--out", str(tmp_path / "run")])
    assert Image.open(tmp_path / "run" / "scenarios.png").size == (2 * 620, 400)


@pytest.mark.parametrize("study, message", [
    (["pictures"], "no run yet; first `python train.py`"), (["bench"], "no run yet"),
    (["scenarios", "part"], "no run yet"), (["ablation"], "no run yet"),
    (["ablation", "--only", "soap"], "no run yet"), (["scenarios", "money"], "invalid choice"),
])
def test_main_studies_say_in_one_line_what_they_lack(tmp_path, capsys, study, message):
    program = importlib.import_module(f"studies.{study[0]}").main
    said = refusal(program, [*study[1:], "--out", tmp_path / "none"], capsys)
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("program", [train, own_images, handout, *map(importlib.import_module, (
    "studies.pictures", "studies.ablation", "studies.scenarios", "studies.bench"))])
def test_main_help_is_there(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    assert stop.value.code == 0 and "    python " in capsys.readouterr().out


def test_every_option_is_explained_by_all_the_lines_beside_it():
    options = train.every_option()
    untold = {option for option, (_, what) in options.items() if not what}
    assert {option.split(".")[1] for option in untold} <= set(protections.OTHERS)
    assert options["seed"][1] == "of the images, the networks and the noise"
    assert options["simclr.lr"][1].endswith("from 0.95 to 0.85 and back")


def probe_of(x, view, data):
    """Accuracy of a small SimCLR that is trained on x."""
    config = dict(widths=(8, 16, 32, 64), blocks=1, strides=(2, 2, 2), classes=10)
    victim = Victim(SimCLR, partner_scores, config, dict(view=view, temperature=0.2))
    made = fit(victim, x, torch.zeros(len(x), dtype=torch.long), epochs=10, batch_size=64,
               lr=0.2, seed=0, report=silent)
    net = victim.fresh(0).eval()
    net.load_state_dict(made["weights"])
    return train.linear_probe(net, data, data)


def test_SimCLR_can_be_fooled_by_a_code_that_is_added_after_the_views():
    # a positive control: if this fails, no noise could protect from SimCLR
    x, labels = train.shapes(640, seed=0)
    code = torch.zeros_like(x)
    code[:, :, :16, :16] = contrastive.class_codes(10, 16, 48 / 255, seed=0)[labels]
    clean = probe_of(x, attacks.quadrant_view, (x, labels))
    after = functools.partial(opponents.coded_view, view=attacks.quadrant_view)
    fooled = probe_of(torch.cat([x, code], 1), after, (x, labels))
    assert clean > 58 and fooled < clean - 12              # 66 and 49 when this was written


# -- Assignments (see the README) ------------------------------------------------------------------

def outcomes(folder, only):
    """{test: (outcome, what it said)} of tests in a copy of the project."""
    command = [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", "test_le.py",
               "-k", only]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR).*::(\w+)(.*)", done.stdout, re.M)
    return {test: (outcome, said) for outcome, test, said in found}, done.stdout


QUICK = "not (main or torchrun or cached or SimCLR)"


def test_assignment_fails_its_own_tests_and_lets_those_of_others_wait(tmp_path):
    numbers = ["1", "4", "8"]
    handout.main([*numbers, "--out", str(tmp_path / "copy")])
    names = [handout.ASSIGNMENTS[int(number)][1] for number in numbers]
    # some that need nothing, or a fixture
    others = "ddpm_loss or unguided or schedule or (story and whole)"
    tests, said = outcomes(tmp_path / "copy", f"({' or '.join(names)} or {others})")
    for name in names:
        own = {outcome for test, (outcome, _) in tests.items() if name in test}
        assert own == {"FAILED"}
        assert f"{name} is yours to write: {CLAIMS[name][:40]}" in said
    assert tests["test_schedule_alpha_bar_is_the_running_product_and_starts_at_one"][0] == "PASSED"
    waiting = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert len(waiting) >= 3 and all(re.search("needs (q_sample|embed)", line) for line in waiting)
    failed = {test for test, (outcome, _) in tests.items() if outcome in ("FAILED", "ERROR")}
    assert all(any(name in test for name in names) for test in failed)


def test_assignment_solutions_pass_their_tests_even_where_a_student_deleted_all(tmp_path):
    if any("raise NotImplementedError" in (HERE / file).read_text()
           for file, _ in handout.ASSIGNMENTS.values()):
        pytest.skip("the solutions are not in a copy that was handed out")
    numbers = [str(number) for number in handout.ASSIGNMENTS]
    folder = tmp_path / "copy"
    handout.main([*numbers, "--out", str(folder)])
    source = (folder / "unet.py").read_text()
    body = handout.function_in(source, "q_sample").body
    lines = source.splitlines(keepends=True)
    lines[body[0].lineno - 1:body[-1].end_lineno] = ["    return x0\n"]  # no docstring any more
    (folder / "unet.py").write_text("".join(lines))
    handout.main([*numbers, "--out", str(folder), "--solutions"])
    for file, _ in handout.ASSIGNMENTS.values():
        assert (folder / file).read_text() == (HERE / file).read_text()
    tests, _ = outcomes(folder, f"({' or '.join(CLAIMS)}) and {QUICK}")
    assert len(tests) > 15 and {outcome for outcome, _ in tests.values()} == {"PASSED"}


def test_assignment_copies_lie_anywhere_and_a_broken_one_is_named(tmp_path, capsys):
    folder = tmp_path / "studies"                          # a name that is in the project, too
    handout.main(["1", "--out", str(folder)])
    assert (folder / "studies" / "handout.py").exists()
    (folder / "unet.py").write_text("def q_sample(:\n")
    said = refusal(handout.main, ["1", "--out", str(folder), "--solutions"], capsys)
    assert "unet.py: line 1" in said


def test_assignment_solutions_are_not_taken_from_a_copy_that_lacks_them(tmp_path, monkeypatch,
                                                                        capsys):
    folder = tmp_path / "copy"
    handout.main(["1", "--out", str(folder)])
    assert '`python -m pytest -k "q_sample"`' in capsys.readouterr().out
    monkeypatch.setattr(handout, "HERE", folder)
    said = refusal(handout.main, ["1", "--out", str(folder), "--solutions"], capsys)
    assert "q_sample is left out here, too" in said


@pytest.mark.parametrize("number", handout.ASSIGNMENTS)
def test_every_assignment_has_tests_that_bear_its_name(number):
    tests = re.findall(r"^def (test_\w+)", (HERE / "test_le.py").read_text(), re.M)
    assert any(handout.ASSIGNMENTS[number][1] in test for test in tests)


# -- README ----------------------------------------------------------------------------------------

def test_readme_commands_are_understood():
    """Every command in the READMEs is one that the programs know."""
    text = (HERE / "README.md").read_text() + (HERE / "studies" / "README.md").read_text()
    start = r"(?:python|torchrun --nproc_per_node=\d+) "
    commands = re.findall(rf"^    {start}(.*?)(?:  .*)?$", text, re.M)
    commands += re.findall(rf"`{start}([^`]*)`", text)
    assert len(commands) > 15
    for command in sorted(set(commands)):
        program, *arguments = shlex.split(command)
        if program == "train.py" and arguments != ["--help"]:
            train.parse(arguments)
        elif program == "train.py":
            assert set(train.every_option()) > set(train.DEFAULTS)
        elif arguments[0].startswith("studies."):
            assert (HERE / "studies" / f"{arguments[0].split('.')[1]}.py").exists(), command
        else:
            assert arguments[0] == "pytest", command


def test_readme_doors_work_as_they_are_pasted(tmp_path, monkeypatch, capsys):
    """A protection, a victim and a purifier of one's own: the README's lines, as if they stood at
    the end of the files that it names."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    for module, entries, name in ((attacks, "PROTECTIONS", "corner"), (attacks, "VICTIMS", "mlp"),
                                  (le, "PURIFIERS", "blur")):
        monkeypatch.setitem(getattr(module, entries), name, None)  # is taken out again afterwards
        block, = [block for block in blocks if f"{entries}[" in block]
        exec(block, dict(vars(module)))
    train.main([*SMALL, "--out", str(tmp_path), "--protections", "corner", "--purifier", "blur",
                "--victim", "mlp"])
    said = capsys.readouterr().out
    assert "mlp on corner-le: " in said and "| corner |" in said


def test_readme_counts_the_lines_of_each_file():
    readme = (HERE / "README.md").read_text()
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M):
        counted = len((HERE / name).read_text().splitlines())
        assert abs(counted - int(lines)) <= 10, f"README.md: {name} has {counted} lines"
