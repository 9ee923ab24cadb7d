"""Tests of one's own folders and of published UEs: studies/own.py, folders.py and published.py."""
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from attacks import PROTECTIONS
from le import BadInput
from studies import folders, own
from studies.test_studies import cifar10_files, write_cifar10
from test_le import HERE, SMALL, asked_for, images, refusal, seeded

TOY = [*SMALL[:10], "--unet.attention", "", "--ddpm.levels", "200"]
RED, BLUE = (200, 30, 30), (30, 30, 200)
CIFAR10_MINI = HERE.parent / "shared" / "data" / "cifar-10-mini.tar.gz"


# -- CIFAR-10 in files -----------------------------------------------------------------------------

def unpack(path, files):
    """The same files in a folder, or in a .zip."""
    for name, content in files.items():
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(f"cifar-10-batches-bin/{name}", content)
        else:
            (path / "cifar-10-batches-bin").mkdir(parents=True, exist_ok=True)
            (path / "cifar-10-batches-bin" / name).write_bytes(content)
    return path


def loaded(*arguments):
    """(sets, class names, UEs or None) that the arguments of studies.own name."""
    with own.entries([str(argument) for argument in arguments]) as given:
        _, c = train.parse(given)
        sets, classes = train.load_data(c)
        theirs = PROTECTIONS.get("published")
        ue = theirs and theirs.make(None, None, None, epsilon=0, seed=0, report=None)["images"]
        return sets, classes, None if ue is None else ue / 255


def counts(sets):
    return {name: len(labels) for name, (_, labels) in sets.items()}


@pytest.mark.parametrize("kind", ["c.zip", "c"])
def test_root_may_be_unpacked_and_a_wrong_one_is_named(tmp_path, kind):
    files, _ = cifar10_files()
    options = ["--data", "cifar10", *asked_for(50, 30, 20, 15), "--root"]
    expected, *_ = loaded(*options, write_cifar10(tmp_path / "c.tar.gz", files))
    sets, *_ = loaded(*options, unpack(tmp_path / kind, files))
    assert all(torch.equal(a, b) for name in sets for a, b in zip(sets[name], expected[name]))
    for start, cut in (b"", -1), (b"\x0b", None), (b"", 0):
        second = start + files["data_batch_2.bin"][len(start):]
        broken = files | {"data_batch_2.bin": second[:cut]}
        wrong = unpack(tmp_path / f"{cut}{start.hex()}{kind}", broken)
        with pytest.raises(BadInput, match=f"--root {wrong}: data_batch_2.bin is cut off or"):
            loaded(*options, wrong)
    with pytest.raises(BadInput, match="without test_batch.bin; expected the files of the binary"):
        del files["test_batch.bin"]
        loaded(*options, unpack(tmp_path / f"few{kind}", files))
    damaged = tmp_path / "damaged.zip"
    unpack(damaged, files)
    damaged.write_bytes(damaged.read_bytes().replace(files["data_batch_2.bin"][:99], b"x" * 99))
    for wrong, message in (damaged, "not a whole .zip"), (Path(__file__), "no whole cifar"):
        with pytest.raises(BadInput, match=f"--root {wrong}: {message}") as caught:
            loaded(*options, wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not CIFAR10_MINI.exists(), reason="no real CIFAR-10 beside the project")
def test_cifar10_reads_real_images():
    (x, y), (test_x, _) = train.cifar10(CIFAR10_MINI)
    assert len(x) == 12000 and len(test_x) == 2400 and set(y.tolist()) == set(range(10))
    neighbours = (x[:, :, 1:] - x[:, :, :-1]).abs().mean()
    assert 3 * neighbours < (x[1:] - x[:-1]).abs().mean()  # photographs are smooth


# -- Folders ---------------------------------------------------------------------------------------

def class_folders(root, per_class=12, size=(40, 36), names=("cat", "dog")):
    """A folder a class, of plain images, which are called 0.jpg, 1.png, 2.jpg, ..."""
    for name, colour in zip(names, (RED, BLUE)):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            suffix = "png" if i % 2 else "jpg"
            Image.new("RGB", size, colour).save(root / name / f"{i}.{suffix}")
    return root


def test_folder_crops_resizes_labels_and_says_what_it_leaves_out(tmp_path, capsys):
    pets = class_folders(tmp_path / "pets")
    (pets / "notes.txt").write_text("not an image")
    (pets / ".ipynb_checkpoints").mkdir()                  # a notebook's, and a Mac's
    shutil.copy(pets / "cat" / "0.jpg", pets / ".ipynb_checkpoints")
    (pets / "cat" / "._0.jpg").write_bytes(b"no image")
    (pets / "cat" / "bad.png").write_bytes(b"not an image")
    Image.new("CMYK", (40, 36)).save(pets / "dog" / "print.jpg")
    Image.new("I;16", (40, 36)).save(pets / "dog" / "deep.png")
    x, y, files = folders.folder(pets, 32)
    assert x.shape == (25, 3, 32, 32) and y.tolist() == [0] * 12 + [1] * 13
    assert files[0] == pets / "cat" / "0.jpg" and files[-1].name == "print.jpg"
    assert (x[0].mean((1, 2)) * 255 - torch.tensor(RED)).abs().max() < 3  # JPEG
    said = capsys.readouterr().out
    assert "pets: 1 that are no images of a class" in said and "notes.txt" in said
    assert re.search("pets: 2 skipped: .*bad.png.*deep.png", said)
    wrong = (pets / "cat", (), "are none"), (pets, ["cat", "bird"], "two or more of cat, bird")
    for root, classes, message in wrong:
        with pytest.raises(BadInput, match=message):
            folders.folder(root, 32, classes)


@pytest.mark.parametrize("names", [
    ("train", "val"), ("Training", "Testing"), ("TRAIN", "dev", "test"), ("train", "valid", "test"),
    ("train_set", "Validation"), ("training", "eval")])
def test_divisions_go_by_their_usual_names(tmp_path, names, capsys):
    for name, n in zip(names, (12, 5, 3)):
        class_folders(tmp_path / "tv" / name, n)
    sets, classes, _ = loaded("--data", tmp_path / "tv")
    assert classes == ["cat", "dog"]
    assert sum(counts(sets).values()) == 2 * sum((12, 5, 3)[:len(names)])
    brought = {folders.division_of(name): 2 * n for name, n in zip(names[1:], (5, 3))}
    assert brought.items() <= counts(sets).items()
    said = capsys.readouterr().out
    assert all(f"{name} is taken for {folders.division_of(name)}" in said for name in names)
    small, *_ = loaded("--data", tmp_path / "tv", "--limit", 4)
    assert all(len(labels) == 4 and len(labels.unique()) == 2 for _, labels in small.values())


@pytest.mark.parametrize("made, message", [
    (["fold1", "fold2"], "fold1, fold2 all hold cat, dog, so which are the classes"),
    (["a/seg_a", "b/seg_b"], "a, b all hold cat, dog"),
    (["cat/train", "dog/train"], "cat, dog all hold cat, dog"),
    (["train", "more"], "train, but no test"), (["test", "val"], "no train"),
    (["val", "Validation", "train"], "would both be validation"),
    (["protected", "unprotected"], "but no test"),
    (["train/x", "val/x"], "folders of images are x")])
def test_what_may_be_classes_or_divisions_is_refused(tmp_path, made, message):
    for name in made:
        class_folders(tmp_path / "d" / name, 2)
    with pytest.raises(BadInput, match=message):
        loaded("--data", tmp_path / "d")


def test_what_is_no_division_is_a_class_or_said_to_be_left_out(tmp_path, capsys):
    class_folders(tmp_path / "vehicles", names=("train", "car"))
    assert loaded("--data", tmp_path / "vehicles")[1] == ["car", "train"]
    assert "2 classes, car, train" in capsys.readouterr().out
    class_folders(tmp_path / "tiny" / "train")
    class_folders(tmp_path / "tiny" / "val", names=("images",))  # tiny-imagenet's
    class_folders(tmp_path / "tiny" / "unlabelled")
    sets, classes, _ = loaded("--data", tmp_path / "tiny")
    said = capsys.readouterr().out
    assert classes == ["cat", "dog"] and "val left out, as its folders, images, are no" in said
    assert "unlabelled is left out" in said and len(sets) == 4
    (tmp_path / "tiny" / "val" / "images").rename(tmp_path / "tiny" / "val" / "cat")
    class_folders(tmp_path / "tiny" / "val", names=("Dog",))
    with pytest.raises(BadInput, match="val: its folders of images are Dog, cat; expected two or"):
        loaded("--data", tmp_path / "tiny")


def test_links_to_class_folders_are_followed_once(tmp_path, capsys):
    store = class_folders(tmp_path / "store")
    (tmp_path / "pets").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).symlink_to(store / name)
    (store / "dog" / "loop").symlink_to(tmp_path / "pets")
    x, y, _ = folders.folder(tmp_path / "pets", 32)
    assert y.tolist() == [0] * 12 + [1] * 12 and "loop" in capsys.readouterr().out


def test_each_class_is_divided_alike_and_too_small_ones_are_named(tmp_path, capsys):
    assert folders.in_proportion(dict(a=60, b=30, c=10), 10) == dict(a=6, b=3, c=1)
    assert folders.in_proportion(dict(a=1, b=5500, c=1, d=1), 100) == dict(a=1, b=97, c=1, d=1)
    few = folders.of_a_small_class(dict(a=2, b=1, c=3), 2, dict(a=5, b=1, c=5))
    assert few == dict(a=0, b=1, c=1)                      # the largest, and who has least so far
    class_folders(tmp_path / "d", 60)
    for i in range(2, 60):
        next((tmp_path / "d" / "dog").glob(f"{i}.*")).unlink()
    sets, *_ = loaded("--data", tmp_path / "d")
    rare = {name: (labels == 1).sum().item() for name, (_, labels) in sets.items()}
    assert rare == dict(protected=1, unprotected=1, validation=0, test=0)
    said = capsys.readouterr().out
    assert "validation has no image of dog: too few" in said and "test has no image of dog" in said
    others, *_ = loaded("--data", tmp_path / "d", "--seed", 1)
    assert counts(others) == counts(sets) and sum(counts(sets).values()) == 62
    class_folders(tmp_path / "few", 1)
    with pytest.raises(BadInput, match="0 of 2 images for unprotected.* --images.unprotected"):
        loaded("--data", tmp_path / "few")
    many = class_folders(tmp_path / "many", 3)
    for k in range(20):
        shutil.copytree(many / "cat", many / f"{k}")
    assert min(counts(loaded("--data", many)[0]).values()) > 2
    sets, *_ = loaded("--data", class_folders(tmp_path / "pets"), *asked_for(1, 5500, 1, 1))
    assert counts(sets) == dict(protected=2, unprotected=18, validation=2, test=2)


def test_main_runs_on_a_folder_and_keeps_its_runs_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy = [*TOY, "--protections", "em-class"]
    own.main(["--data", str(class_folders(tmp_path / "a" / "pets")), *toy])
    assert "| em-class |" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "pets-limit4" / "vgg.pt").exists()  # nothing perceptual there
    said = refusal(own.main, ["--data", class_folders(tmp_path / "b" / "pets"), *toy], capsys)
    assert "belongs to --data" in said and said.count("\n") == 1
    class_folders(tmp_path / "shapes", 2)
    own.main(["ddpm", "--data", "shapes", *TOY])
    assert "built-in data; for the folder beside it, --data ./shapes" in capsys.readouterr().out


def test_main_ddpm_needs_no_classes_where_it_needs_no_perceptual_distance(tmp_path, capsys):
    holiday = tmp_path / "holiday"
    shutil.move(class_folders(tmp_path / "x", 5) / "cat", holiday)
    command = ["--data", str(holiday), *TOY, "--out", str(tmp_path / "run")]
    own.main(["ddpm", *command])
    assert (tmp_path / "run" / "ddpm.pt").exists() and "all 4 images" in capsys.readouterr().out
    asked = ["ddpm", *command, "--sampler.perceptual_weight", "1"]
    for arguments, message in (asked, "--sampler.perceptual_weight 0"), (command, "`ddpm` alone"):
        said = refusal(own.main, arguments, capsys)
        assert message in said and "a class each" in said and said.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "--data nowhere: expected shapes, cifar10 or an existing folder"),
    (["--unprotected", "test"], "--unprotected: expected --published beside it"),
    (["--published", "nowhere"], "--published nowhere: no such file"),
    (["--published", ".", "--unprotected", "no"], "--unprotected no: expected test or a folder"),
    (["--seed", "x"], "--seed: invalid int value"),
    (["--data", "."], "folders of images are none"),
])
def test_main_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    said = refusal(own.main, arguments, capsys)
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("scores, message", [
    (lambda x: x.flatten(), "a victim gave"), (lambda x: x.flatten(1) * math.nan, "gave nan")])
def test_accuracy_refuses_scores_that_are_none(scores, message):
    with pytest.raises(BadInput, match=message):
        train.accuracy(scores, images(4), torch.zeros(4))


@pytest.mark.parametrize("name", [
    path.stem for path in Path(own.__file__).parent.glob("*.py")
    if re.search("^if __name__", path.read_text(encoding="utf-8"), re.M)])
def test_studies_say_how_they_are_run(name):
    done = subprocess.run([sys.executable, f"studies/{name}.py"], cwd=HERE, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and f"python -m studies.{name}`" in done.stderr
    assert done.stderr.count("\n") == 1
