"""Tests of purifying one's own images: studies/purify.py, and arrays.py of any size."""
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import unet
from le import Sampler, purify
from studies import arrays
from studies import purify as own_images
from studies.test_files import picture
from studies.test_published import stored
from test_le import FREE, JOINT, TINY, checkpoint, images, nets, refusal, same, seeded
from unet import UNet, as_bytes, seed_of


# -- Images of any size ----------------------------------------------------------------------------

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


def test_purify_any_blends_tiles_without_seams_and_counts_them():
    for patch, size in (2, (280, 150)), (3, (33, 132)), (3, (7, 40)):  # tiles of 128, and of 126
        net = UNet(**TINY | dict(patch=patch)).eval().requires_grad_(False)  # predicts no noise
        x, counted = torch.full((2, 3, *size), 0.5), []
        sampler = replace(FREE, t_star=1, steps=1, rounds=1)  # no diffusion to speak of
        y = arrays.purify_any(net, None, x, sampler, [0, 1], report=counted.append)
        assert y.shape == x.shape and (y - 0.5).abs().max() < 0.06 and y.std() > 0
        assert counted == [2 * (i + 1) for i in range(arrays.count_tiles(*size, net.multiple))]


def test_purify_any_weighs_tiles_by_how_far_a_pixel_is_from_their_edges(nets):
    x = images(1, 44)[:, :, :32]
    left, right = [purify(*nets, x[..., j:j + 32], JOINT, [5 * 1_000_003 + k])
                   for k, j in enumerate((0, 12))]
    weight = torch.tensor([min(i + 1, 32 - i, 8) for i in range(32)])
    a, b = weight[12:], weight[:20]                        # where they overlap
    middle = (a * left[..., 12:] + b * right[..., :20]) / (a + b)
    expected = torch.cat([left[..., :12], middle, right[..., 20:]], dim=3)
    made = arrays.purify_any(*nets, x, JOINT, [5], tile=32, overlap=8)
    assert (made - expected).abs().max() <= 0.501 / 255


# -- studies/purify.py -----------------------------------------------------------------------------

@pytest.fixture
def checkpoints(nets, tmp_path):
    """The options that name two small checkpoints, and a short way."""
    unet.save(tmp_path / "unet.pt", checkpoint(nets[0]))
    unet.save(tmp_path / "vgg.pt", checkpoint(nets[1].vgg))
    found = ["--unet", str(tmp_path / "unet.pt"), "--perceptual", str(tmp_path / "vgg.pt")]
    return [*found, "--t_star", "12", "--steps", "2", "--pixel_above", "6"]


def files_in(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def purified(*arguments, code=0):
    """Run the program; it is to end with this exit code."""
    try:
        own_images.main([str(argument) for argument in arguments])
        assert code == 0
    except SystemExit as stop:
        assert stop.code == code


def test_main_purifies_a_folder_to_pngs_and_says_what_it_leaves_out(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep" / "er").mkdir(parents=True)
    picture("RGB").save(source / "a.png")
    picture("RGB").save(source / "a.jpg")                  # beside a.png
    picture("RGBA").save(source / "deep" / "b.png")
    picture("L").save(source / "deep" / "er" / "c.bmp")
    picture("LA").save(source / "d.PNG")
    picture("CMYK").save(source / "e.jpg", icc_profile=b"of CMYK")
    picture("RGB", (7, 5)).save(source / "f.webp", lossless=True)
    (source / "notes.txt").write_text("not an image")
    (source / "g").symlink_to(tmp_path / "others")         # an image, and a way back
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "loop").symlink_to(source)
    frames = [picture("RGB").rotate(90)]
    picture("RGB").save(tmp_path / "others" / "h.gif", save_all=True, append_images=frames)
    purified(source, out, *checkpoints)
    said = capsys.readouterr().out
    assert "2 that are not images" in said and "notes.txt" in said and "loop" in said
    assert f"1 with several frames, of which the first is taken: {source / 'g' / 'h.gif'}" in said
    made = {name: Image.open(path) for name, path in files_in(out).items()}
    assert {name: (image.mode, image.size) for name, image in made.items()} == {
        "a.png": ("RGB", (40, 36)), "a.jpg.png": ("RGB", (40, 36)), "d.PNG.png": ("LA", (40, 36)),
        "deep/b.png": ("RGBA", (40, 36)), "deep/er/c.bmp.png": ("L", (40, 36)),
        "e.jpg.png": ("RGB", (40, 36)), "f.webp.png": ("RGB", (7, 5)),
        "g/h.gif.png": ("RGB", (40, 36))}
    assert "icc_profile" not in made["e.jpg.png"].info
    alpha = made["deep/b.png"].getchannel("A").tobytes()
    assert alpha == picture("RGBA").getchannel("A").tobytes()
    assert made["a.png"].tobytes() != picture("RGB").tobytes()
    purified(source / "a.png", tmp_path / "one.png", *checkpoints)
    assert (tmp_path / "one.png").read_bytes() == (out / "a.png").read_bytes()
    (tmp_path / "others" / "results").symlink_to(out)
    said = refusal(own_images.main, [source, out, *checkpoints], capsys)
    assert "expected a place to which no link leads" in said


def test_main_makes_again_what_is_damaged_or_of_another_source_or_seed(
        tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abcd":
        picture("RGB").save(source / f"{name}.png")
    purified(source, out, *checkpoints)
    first = {name: path.read_bytes() for name, path in files_in(out).items()}
    (out / "a.png").write_bytes(first["a.png"][:100])      # half a file, and an empty one
    (out / "b.png").write_bytes(b"")
    picture("RGB").save(out / "c.png")                     # somebody's own
    own = (out / "c.png").read_bytes()
    (source / "0.png").write_bytes((source / "a.png").read_bytes()[:54])
    purified(source, out, *checkpoints, code=1)
    said = capsys.readouterr()
    assert "1 files could not be read" in said.err and "0.png: not a readable image" in said.err
    assert "2 of 5 are there already and are kept; 1 do not say what they" in said.out
    second = {name: path.read_bytes() for name, path in files_in(out).items()}
    assert second == first | {"c.png": own}
    (source / "0.png").unlink()
    picture("RGB").rotate(180).save(source / "a.png")
    purified(source, out, *checkpoints)
    said = capsys.readouterr().out
    assert "3 of 4 are there" in said and "made again where source changed" in said
    assert (out / "a.png").read_bytes() != first["a.png"]
    purified(source / "d.png", out / "d.png", *checkpoints, "--seed", 1, "--steps", 3)
    assert "made again where sampler, seed changed" in capsys.readouterr().out
    assert (out / "d.png").read_bytes() != first["d.png"]


def test_main_takes_any_seed_copies_what_is_no_array_and_says_what_an_array_is_of(
        tmp_path, checkpoints, nets, capsys):
    source, out = tmp_path / "in.pt", tmp_path / "out.pt"
    others = dict(classes=["cat", "dog"], note=None, meta=dict(epsilon=8))
    x, seed = images(3, 16), 2 ** 31 - 1
    torch.save(dict(first=x[:1], rest=x[1:], **others), source)
    purified(source, out, *checkpoints, "--seed", seed)
    made = torch.load(out)
    seeds = [seed_of(seed, place) for place in range(3)]   # each image's own, of all arrays
    sampler = Sampler(t_star=12, steps=2, pixel_above=6)
    expected = arrays.purify_any(*nets, x, sampler, seeds)
    same(torch.cat([made.pop("first"), made.pop("rest")]), expected)
    assert made == others
    again = {2 ** 31 - 1: "is there already and is kept\n", 1: "made again, as seed changed"}
    for seed, said in again.items():
        capsys.readouterr()
        purified(source, out, *checkpoints, "--seed", seed)
        assert f"out.pt: {said}" in capsys.readouterr().out
    purified(source, out, *checkpoints, "--seed", 1, "--key", "rest")
    said = capsys.readouterr().out
    assert "made again, as keys changed" in said and "first: float32" in said
    (tmp_path / "out.pt.json").unlink()
    purified(source, out, *checkpoints)
    assert "kept, though no out.pt.json says what it was made of" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_main_takes_an_array_the_same_after_an_interruption(tmp_path, checkpoints, suffix,
                                                            monkeypatch):
    x, source, out = images(70, 16), tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    stored(source, x if suffix == ".pt" else as_bytes(x).permute(0, 2, 3, 1).numpy())
    command = [source, out, *checkpoints]
    purified(*command)
    others, whole = arrays.images_in(out)
    made = whole["data" if suffix == ".npz" else ""]
    assert made.shape == x.shape and not torch.equal(made, x)
    assert suffix != ".npz" or (others["labels"] == np.arange(3)).all()
    out.unlink()

    def stopped(label):
        def report(done, total):
            if done == 70:
                raise KeyboardInterrupt
        return report
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "Progress", stopped)
        patch.setattr(arrays.purify_array, "__defaults__", ((), 0))
        patch.setattr(arrays, "BATCH", 8)
        purified(*command, code=130)
        assert not out.exists()
        purified(*command, "--seed", 1, code=130)          # which does not take what is done
    assert len(list(tmp_path.glob("*.partial"))) == 2
    purified(*command)
    same(arrays.images_in(out)[1]["data" if suffix == ".npz" else ""], made)
    assert len(list(tmp_path.glob("*.partial"))) == 1


def test_main_shows_progress_within_one_photograph(tmp_path, checkpoints, monkeypatch):
    picture("RGB", (300, 200)).save(tmp_path / "a.jpg")
    seen = []
    monkeypatch.setattr(own_images, "Progress", lambda label: lambda *counts: seen.append(counts))
    purified(tmp_path / "a.jpg", tmp_path / "b.png", *checkpoints)
    assert seen == [(i + 1, 6) for i in range(6)]


@pytest.mark.parametrize("arguments, message", [
    (["nowhere", "out"], "nowhere: no such file"),
    (["in", "in/out"], "expected a place outside in"),
    (["in", "in"], "expected a place outside in"),
    (["in", "out"], "--unet is missing; `python -m studies.own ddpm"),
    (["in", "out", "--unet", "x.pt"], "--perceptual is missing: the vgg.pt of a run"),
    (["in", "out", "--unet", "x.pt", "--perceptual", "y.pt"], "x.pt"),
    (["in", "out", "--steps", "0"], "steps"),
    (["in", "out", "--pixel_weight", "nan"], "weights"),
    (["in", "out", "--seed", "-1"], "--seed -1"),
    (["in", "out", "--key", "x"], "--key x: expected a file of arrays, not in"),
    (["in", "out", "--fast"], "--fast"),
    (["in/a.npy", "out.npz"], "both end in"),
    (["in/a.png", "out.jpg"], "an image and a .png"),
    (["in/a.png", "in"], "an image and a .png"),
    (["in", "in/a.png"], "expected a place outside in"),
])
def test_main_refuses_bad_input_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    np.save("in/a.npy", np.zeros((1, 8, 8, 3), np.uint8))
    picture("RGB").save("in/a.png")
    said = refusal(own_images.main, arguments, capsys)
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_main_refuses_targets_that_are_taken(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    picture("RGB").save(source / "a.jpg")
    (out / "a.jpg.png").mkdir(parents=True)
    command = [source, out, *checkpoints]
    assert "a.jpg.png: a folder" in refusal(own_images.main, command, capsys)
    (out / "a.jpg.png").rmdir()
    picture("RGB").save(source / "a.jpg.png")
    assert "would both become" in refusal(own_images.main, command, capsys)


def test_main_takes_names_of_any_bytes_and_length(tmp_path, checkpoints, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in (b"\xff\xfe.jpg", "ü.png".encode(), b"l" * 251 + b".jpg"):
        with open(os.path.join(os.fsencode(source), name), "wb") as file:
            picture("RGB").save(file, "PNG")               # the content decides, not the name
    said = refusal(own_images.main, [source, out, *checkpoints], capsys, code=1)
    assert "its name leaves no room" in said
    assert sorted(os.listdir(os.fsencode(out))) == [b"\xc3\xbc.png", b"\xff\xfe.jpg.png"]
