"""Tests of what somebody else has protected: studies/published.py."""
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import attacks
import train
from le import BadInput
from studies import folders, own, published
from studies.test_own import TOY, class_folders, counts, loaded, unpack
from studies.test_studies import cifar10_files, write_cifar10
from test_le import asked_for, refusal, same, seeded
from unet import as_bytes


# -- In folders ------------------------------------------------------------------------------------

def picture(seed, size=(40, 36)):
    """A smooth picture, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def brighter(image):
    return Image.eval(image, lambda level: min(255, level + 5))


def noisy_folders(root, originals=True, ending=".png"):
    """A folder as somebody has who protects: UEs, others, clean test images, perhaps originals."""
    class_folders(root / "Unprotected", 12)
    class_folders(root / "test", 3)
    for k, name in enumerate(("cat", "dog")):
        for part in ("original", "protected"):
            (root / part / name).mkdir(parents=True)
        for i in range(6):
            clean = picture(10 * k + i)
            clean.save(root / "original" / name / f"{i}.jpg", quality=95)
            brighter(clean).save(root / "protected" / name / f"{i}{ending}", "PNG")
    if not originals:
        shutil.rmtree(root / "original")
    return root


@pytest.mark.parametrize("originals", [True, False])
def test_main_judges_what_lies_in_a_folder_of_protected_images(tmp_path, originals, capsys):
    root = noisy_folders(tmp_path / "mine", originals)
    command = ["--data", str(root), *TOY, "--out", str(tmp_path / "run")]
    own.main(command)
    said = capsys.readouterr().out
    row = re.search(r"^\| published \| (.*) \|$", said, re.M)[1].split(" | ")
    assert [cell == "-" for cell in row[:1] + row[4:]] == [not originals] * 3
    assert all(0 <= float(cell) <= 100 for cell in row[1:3]) and "4 protected" in said
    if not originals:
        asked = [*command, "--protections", "em-class"]
        assert "--protections em-class: there are no orig" in refusal(own.main, asked, capsys)
    said = refusal(own.main, [*command, "--published", "ue.npy"], capsys)
    assert "--published: expected a --data that is not protected yet" in said


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpg.png"])  # as `studies.purify` names them
def test_protected_images_are_beside_originals_of_their_names(tmp_path, ending):
    root = noisy_folders(tmp_path / "mine", ending=ending)
    sets, _, ue = loaded("--data", root)
    assert (255 * (ue - sets["protected"][0]).abs().mean()) < 8
    assert counts(sets) == dict(protected=12, unprotected=22, validation=2, test=6)
    cat = root / "protected" / "cat"
    (cat / f"0{ending}").rename(cat / "swap")
    (cat / f"4{ending}").rename(cat / f"0{ending}")
    (cat / "swap").rename(cat / f"4{ending}")
    with pytest.raises(BadInput, match=f"cat/0{ending}: shows what .*l/cat/4.jpg does, not"):
        loaded("--data", root)
    (root / "original" / "cat" / "3.jpg").rename(root / "original" / "cat" / "old.jpg")
    with pytest.raises(BadInput, match=f"cat/3{ending}: 0 files in .*original have its name"):
        loaded("--data", root)
    for other in (".webp", ".bmp"):
        picture(1).save(root / "original" / "cat" / f"3{other}")
    with pytest.raises(BadInput, match=f"cat/3{ending}: [02] files in .*original have its name"):
        loaded("--data", root)


# -- In a file -------------------------------------------------------------------------------------

@pytest.fixture
def cifar(tmp_path):
    """Options that name an archive of 100 training and 20 test images, and the 100."""
    root = write_cifar10(tmp_path / "c.tar.gz", cifar10_files()[0])
    x, y = train.cifar10(root)[0]
    return ["--data", "cifar10", "--root", root, *asked_for(40, 30, 20, 15)], x, y


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
def test_published_perturbations_and_UEs_are_read_in_the_order_of_the_set(
        tmp_path, cifar, suffix, kind, capsys):
    options, x, y = cifar
    class_wise = kind == "class-wise"                      # which any images can wear
    places = folders.spaced(100, 40) if class_wise else list(range(40))
    steps = torch.randint(-8, 9, (10 if class_wise else 40, 3, 32, 32))
    ue = attacks.publish(x[places], steps[y[places]] / 255 if class_wise else steps / 255)
    content = {"int8": steps.to(torch.int8), "bytes": as_bytes(ue.clone()),
               "images": ue}.get(kind, steps / 255)
    if suffix != ".pt":
        content = content.permute(0, 2, 3, 1)
    file = stored(tmp_path / f"ue{suffix}", content.numpy())
    sets, _, theirs = loaded(*options, "--published", file)
    same(sets["protected"][0], x[places])
    torch.testing.assert_close(theirs, ue, rtol=0, atol=1e-6)
    assert torch.equal(sets["protected"][1], y[places])
    others = {image.numpy().tobytes() for name in ("unprotected", "validation")
              for image in sets[name][0]}
    assert len(others) == 50 and not others & {image.numpy().tobytes() for image in x[places]}
    whose = "the 10 classes" if class_wise else "the first 40 training images, in order"
    assert f", of {whose}" in capsys.readouterr().out


def test_a_folder_of_numbered_images_is_read_by_their_numbers(tmp_path, cifar):
    options, x, _ = cifar
    options += ["--published", tmp_path / "ue"]
    (tmp_path / "ue" / "thumbnails").mkdir(parents=True)   # which are not among the images
    for i, pixels in enumerate(as_bytes(x[:12].clone()).permute(0, 2, 3, 1).numpy()):
        name = f"{i:02}" if i == 3 else f"{i}"             # 10.png lies before 2.png
        Image.fromarray(pixels).save(tmp_path / "ue" / f"{name}.png")
    shutil.copy(tmp_path / "ue" / "0.png", tmp_path / "ue" / "thumbnails")
    same(loaded(*options)[2], x[:12])
    (tmp_path / "ue" / "2.png").rename(tmp_path / "ue" / "cat.png")
    with pytest.raises(BadInput, match="expected 0.png, 1.png, .* of 12 images none is number 2"):
        loaded(*options)
    picture(0).save(tmp_path / "ue" / "2.png")
    (tmp_path / "ue" / "cat.png").unlink()
    with pytest.raises(BadInput, match=r"2.png: \(3, 36, 40\), expected .*\(3, 32, 32\)"):
        loaded(*options)


@pytest.mark.parametrize("gone, first, looks_like", [
    ([37], 37, 38), ([5, 6, 7], 5, 8), ([0], 0, 1)])
def test_the_first_published_image_out_of_place_is_named(tmp_path, gone, first, looks_like):
    x, _ = train.shapes(100, seed=0)
    ue = attacks.publish(x, 8 / 255 * torch.randn_like(x).sign())
    rest = [i for i in range(60) if i not in gone]
    assert published.out_of_place(ue[:60], range(60), x) is None
    assert published.out_of_place(ue[rest], range(len(rest)), x) == (first, looks_like)
    swapped = [*range(20), 21, 20, *range(22, 60)]
    assert published.out_of_place(ue[swapped], range(60), x) == (20, 21)
    options = ["--data", "shapes", *asked_for(60, 20, 10, 10), "--published"]
    loaded(*options, stored(tmp_path / "whole.npy", as_bytes(ue[:60]).permute(0, 2, 3, 1)))
    file = stored(tmp_path / "ue.npy", as_bytes(ue[rest]).permute(0, 2, 3, 1))
    with pytest.raises(BadInput, match=f"image {first}, the first out .* image {looks_like};"):
        loaded(*options, file)


@pytest.mark.parametrize("content, message", [
    (torch.rand(40, 3, 32, 32) * 300, r"float32, \(40, 3, 32, 32\), .* to 3\d\d; expected images"),
    (torch.rand(40, 3, 32, 32) * 2 - 1, "-1 to 1; expected images"),  # of a budget not said
    (torch.rand(40, 3, 28, 28), r"\(40, 3, 28, 28\)"),
    (torch.rand(200, 3, 32, 32) / 50, "200 images, but the training set of cifar10 has 100"),
    (torch.rand(40, 3, 32, 32), "not the first of the training set .* in its order"),
    (torch.rand(100, 3, 32, 32) / 50, "the 0 training images that are .* expected --unprotected"),
    (dict(x=torch.rand(9, 3, 32, 32), ue=torch.rand(9, 3, 32, 32)), "2 arrays that could be it"),
])
def test_a_published_file_that_is_neither_is_described(tmp_path, cifar, content, message):
    torch.save(content, tmp_path / "ue.pt")
    with pytest.raises(BadInput, match=f"ue.pt: .*{message}"):
        loaded(*cifar[0], "--published", tmp_path / "ue.pt")


@pytest.mark.parametrize("others", ["test", "folder", "test of a folder"])
def test_the_unprotected_images_are_of_elsewhere_if_all_are_protected(tmp_path, cifar, others):
    options, _, _ = cifar
    file = stored(tmp_path / "ue.pt", torch.rand(100, 3, 32, 32) / 50)
    if others == "test of a folder":
        options = ["--data", "cifar10", "--root", unpack(tmp_path / "c", cifar10_files()[0])]
    if others == "folder":
        others = tmp_path / "folder"
        for i, name in enumerate(train.CIFAR10_CLASSES):
            (others / name).mkdir(parents=True)
            for k in range(4):
                picture(i).rotate(90 * k).save(others / name / f"{k}.png")
    unprotected = others if "folder" == getattr(others, "name", "") else "test"
    sets, *_ = loaded(*options, "--published", file, "--unprotected", unprotected)
    from_there = [len(sets[name][1]) for name in ("unprotected", "validation")]
    assert len(sets["protected"][1]) == 100 and min(from_there) > 0
    if unprotected == "test":                              # all of them, --images.test or not
        assert sum(from_there) + len(sets["test"][1]) == 20


def test_published_for_a_folder_is_of_all_its_classes_in_their_order(tmp_path):
    pets = class_folders(tmp_path / "pets")                # cats first
    few = stored(tmp_path / "ue.npy", np.full((3, 32, 32, 3), 0.02, np.float32))
    whole = stored(tmp_path / "most.npy", np.full((15, 32, 32, 3), 0.02, np.float32))
    with pytest.raises(BadInput, match="the 9 training images .* are of 1 of 2 classes; expected"):
        loaded("--data", pets, "--published", whole)
    sets, *_ = loaded("--data", pets, "--published", whole, "--limit", 4, "--unprotected", pets)
    assert sets["protected"][1].tolist() == [0, 0, 0, 1]
    with pytest.raises(BadInput, match="its 3 images are of one class"):
        loaded("--data", pets, "--published", few)
    noise = torch.tensor([0.02, -0.02]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    options = ["--data", pets, "--published", stored(tmp_path / "two.pt", noise.clone())]
    sets, _, ue = loaded(*options, *asked_for(15, 3, 3, 3))
    x, y = sets["protected"]
    assert counts(sets) == dict(protected=15, unprotected=5, validation=2, test=2)
    same(ue, attacks.publish(x, noise[y]))
    with pytest.raises(BadInput, match="--unprotected test: .*pets has no test set"):
        loaded(*options, "--unprotected", "test")


def test_main_gives_a_row_for_a_published_perturbation(tmp_path, cifar, capsys):
    file = stored(tmp_path / "ue.pt", torch.rand(10, 3, 32, 32) / 50)
    own.main([*map(str, cifar[0][:4]), *TOY, "--published", str(file), "--victim", "simclr",
              "--protections", "published,em-class", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "simclr on published-le" in said and "makes no use of its seed" not in said
    assert re.search(r"^\| published \| \d.*\n\| em-class \| \d", said, re.M)
