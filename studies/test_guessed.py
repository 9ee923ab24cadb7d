"""Tests of `python -m studies.guessed`, and of what it makes of images. Found by `python -m pytest`
with the others."""
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, JpegImagePlugin

import le
from attacks import publish
from le import purify
from studies import formats, guessed, variants
from studies.ablation import by_pillow
from studies.formats import FORMATS
from test_le import (SMALL, TINY, awake, close, configured, images, refusal, same, seeded, silent,
                     small_run)
from unet import UNet

# -- Images ----------------------------------------------------------------------------------------

def test_unprotected_gives_the_images_back():
    x = images(3, 8)
    same(variants.unprotected(x, None, None, epsilon=1, seed=0, report=silent), x)


def test_share_left_is_of_the_perturbation_and_of_nothing_beside_it():
    before = torch.tensor([1.0, -1.0, 1.0, -1.0])
    beside = torch.tensor([3.0, 3.0, 3.0, 3.0])
    assert variants.share_left(before, before) == 1
    assert variants.share_left(before, before / 4 + beside) == 0.25
    assert variants.share_left(before, beside) == 0


def test_less_class_means_restores_what_bears_one_image_for_its_class():
    originals = 0.25 + images(8) / 2
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    noise = torch.tensor([8.0, -4.0]).view(2, 1, 1, 1)[labels] / 255
    ue = publish(originals, noise)
    others = originals.flip(0)                             # of each class the same mean
    restored = variants.less_class_means(ue, labels, others, labels.flip(0), 600)
    same(restored, publish(originals, 0))


def test_less_class_means_looks_at_the_first_images_of_a_class_only():
    grey = torch.tensor([10.0, 20.0, 90.0, 30.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2) / 255
    labels = torch.tensor([0, 0, 0, 1])
    others = torch.tensor([25.0, 35.0, 200.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2) / 255
    made = variants.less_class_means(grey, labels, others, torch.tensor([0, 0, 0]), 2)
    # class 0: 30 - 15 more in each; of class 1 there are no others, so that nothing is known
    assert (255 * made[:, 0, 0, 0]).round().tolist() == [25, 35, 105, 30]


def test_mixtures_by_hand():
    x = torch.full((3, 3, 1, 1), 100.0) / 255
    first, second = torch.full_like(x, 8 / 255), torch.full_like(x, -4 / 255)
    made = variants.mixtures(x, first, second)
    found = {what: (255 * ue[:, 0, 0, 0]).round().tolist() for what, ue in made.items()}
    assert found == {"half and half": [108, 96, 108], "both, half of each": [102, 102, 102],
                     "both": [104, 104, 104]}


# -- Formats ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("label, quantum, sampling", [
    # of libjpeg's table, whose first entry is 16: 16 x 10 / 100 and 16 x 50 / 100, rounded; Pillow
    # calls 4:4:4 0 and 4:2:0 2
    ("JPEG 95, 4:4:4", 2, 0), ("JPEG 95, 4:2:0", 2, 2), ("JPEG 75, 4:4:4", 8, 0),
    ("JPEG 75, 4:2:0", 8, 2)])
def test_formats_of_JPEG_have_the_quality_and_sampling_of_their_names(monkeypatch, label, quantum,
                                                                      sampling):
    opened, seen = Image.open, []

    def watched(content):
        image = opened(content)
        seen.append((image.quantization[0][0], JpegImagePlugin.get_sampling(image)))
        return image
    monkeypatch.setattr(formats.Image, "open", watched)
    by_pillow(FORMATS[label], images(1, 16))
    assert seen == [(quantum, sampling)]


def test_formats_without_JPEG(monkeypatch):
    opened, seen = Image.open, []

    def watched(content):
        image = opened(content)
        seen.append((image.format, len(content.getvalue())))
        return image
    monkeypatch.setattr(formats.Image, "open", watched)
    x = images(1)
    for label in ("WebP 80", "AVIF 75", "AVIF 50"):
        if label[:4] == "AVIF" and not formats.Image.registered_extensions().get(".avif"):
            continue                                       # older versions of Pillow
        assert by_pillow(FORMATS[label], x).shape == x.shape
    same(by_pillow(FORMATS["they are"], x), x)
    assert [kind for kind, _ in seen] in (["WEBP"], ["WEBP", "AVIF", "AVIF"])
    assert seen[1:] == sorted(seen[1:], reverse=True)      # less quality takes fewer bytes


def test_thumbnail_keeps_what_is_smooth_and_nothing_that_is_as_fine_as_a_pixel():
    flat = torch.full((1, 3, 16, 16), 80 / 255)
    fine = flat + 40 / 255 * (1 - 2 * (torch.arange(16) % 2))
    same(by_pillow(formats.thumbnail, flat), flat)
    inner = (by_pillow(formats.thumbnail, fine) - flat)[..., 4:-4]
    assert inner.abs().max() <= 3 / 255


# -- What victims and purifiers see ----------------------------------------------------------------

def test_scores_of_a_draw_are_of_the_image_by_any_of_its_draws():
    n, size = 5, 400
    image = torch.arange(size).view(size, 1, 1, 1, 1).float()
    draw = torch.arange(n).view(1, n, 1, 1, 1) / 10
    colour = torch.arange(3).view(1, 1, 3, 1, 1) / 100
    x = (image + draw + colour).flatten(1, 2)              # (400, 15, 1, 1)
    generator, seen = torch.Generator().manual_seed(0), []

    def scores(net, chosen, labels, given):
        seen.append(chosen)
        assert given is generator and labels == "labels" and net == "net"
        return "scores", "answers"
    for _ in range(2):
        found = variants.scores_of_a_draw("net", x, "labels", generator, scores)
        assert found == ("scores", "answers")
    drawn = []
    for chosen in seen:
        k = ((chosen[:, 0] - torch.arange(size).view(-1, 1, 1)) * 10).round()
        close(chosen, (image + k[:, None, None] / 10 + colour)[:, 0], atol=1e-3)
        drawn.append(k.flatten().long())
        assert drawn[-1].bincount(minlength=n).min() > 50  # 80 of 400 each are expected
    assert not torch.equal(*drawn)                         # another one whenever it is seen


def test_seen_by_a_detail_sampler_by_hand():
    x = torch.tensor([[1.0, 2.0, 5.0, 5.0], [3.0, 6.0, 5.0, 5.0]]).expand(1, 3, 2, 4).clone()
    x[:, 0] += 3                                           # colour alone
    x[:, 1] -= 3
    expected = torch.tensor([[-2.0, -1.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])
    close(variants.DetailSampler(smooth=2).seen(x), expected.expand(1, 3, 2, 4))


DETAIL = variants.DetailSampler(t_star=12, rounds=2, steps=3, pixel_weight=1e4, pixel_above=0,
                                perceptual_weight=0.0)


def test_seen_by_a_detail_sampler_is_a_symmetric_projection():
    x, y = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
    close(DETAIL.seen(DETAIL.seen(x)), DETAIL.seen(x))
    close((DETAIL.seen(x) * y).sum(), (x * DETAIL.seen(y)).sum())


def test_purify_by_a_detail_sampler_pulls_by_the_gradient_of_the_distance_of_details(monkeypatch):
    net, x, seen, x0s = awake(UNet(**TINY)), images(2), [], []
    clean = le.posterior
    monkeypatch.setattr(le, "joint_conditioned_mean",
                        lambda mean, var, t, gradient: seen.append((t, gradient)) or mean)
    monkeypatch.setattr(le, "posterior", lambda x0, xt, t, s: x0s.append(x0)
                        or clean(x0, xt, t, s))
    purify(net, None, x, DETAIL)
    assert [t for t, _ in seen] == 2 * [12, 8]
    for x0, (t, gradient) in zip([x0s[0], x0s[1], x0s[3], x0s[4]], seen):
        x0 = x0.clone().requires_grad_()
        apart = DETAIL.seen(x0) - DETAIL.seen(2 * x - 1)
        distance = DETAIL.pixel_weight * apart.square().mean((1, 2, 3)).sum()
        expected, = torch.autograd.grad(distance, x0)
        close(gradient, expected, atol=1e-4)


# -- The command -----------------------------------------------------------------------------------

@pytest.fixture
def ask(tmp_path, small_run, capsys):
    """A function that asks a question of a copy of the toy run, and gives what is printed."""
    run = Path(shutil.copytree(small_run, tmp_path / "run"))

    def asked(*arguments):
        guessed.main([*arguments, *SMALL, "--out", str(run)])
        return capsys.readouterr().out
    return asked


@pytest.fixture
def watched(monkeypatch):
    """What is purified, by name: the UEs, the pair, the sampler and the purifier."""
    seen = {}

    def repaired(c, key, net, distance, ue, sampler, purifier=purify):
        seen[key, c.seed] = ue, net, sampler, purifier
        return ue
    monkeypatch.setattr(guessed, "repaired", repaired)
    monkeypatch.setattr(guessed, "spread", lambda *given: torch.tensor([50.0]))
    return seen


def test_changed_leaves_the_run_as_it_was_and_keeps_to_its_limit():
    c = configured("--limit", 3)
    other = guessed.changed(c, "ddpm.steps", 500)
    assert other.ddpm == c.ddpm | dict(steps=3)
    other = guessed.changed(c, "unet.width", 16)
    assert other.unet["width"] == 16 and c.unet["width"] == 32


def test_main_left_files_and_relearned(ask, watched):
    said = ask("left", "--protections", "em-class", "--only", "they are")
    assert "| they are | 0.00 | 1.00 |" in said
    said = ask("left", "--protections", "em-class", "--only", "a thumbnail")
    assert "| UEs as | originals | em-class |" in said and "| 1.00 |" not in said
    said = ask("files", "--protections", "none,em-class", "--only", "a thumbnail")
    assert "| UEs as | none | em-class |" in said
    assert "| a thumbnail | 50.0 | 50.0 |" in said
    ask("relearned", "--protections", "em-class")
    assert len(watched) == len(FORMATS)
    ue = watched["em-class-le", 0][0]
    for how, write in FORMATS.items():
        key = "em-class-le" if how == "they are" else f"em-class-{guessed.slug(how)}-le"
        same(watched[key, 0][0], by_pillow(write, ue))


def test_main_means_judges_what_less_class_means_makes(ask, monkeypatch):
    seen = {}
    monkeypatch.setattr(guessed, "spread", lambda c, kind, key, x, sets, count: seen.update(
        {key: x}) or torch.tensor([50.0]))
    monkeypatch.setattr(guessed, "less_class_means",
                        lambda x, labels, others, theirs, most: x * most)
    monkeypatch.setattr(guessed, "grid", lambda path, rows: seen.update({path.name: rows}))
    said = ask("means", "--protections", "em-class", "--most", "3")
    assert "| em-class | 50.0 | 50.0 | 50.0 |" in said
    ue = seen["em-class-ue"]
    assert len(ue) == 3
    for most in (600, 60):
        same(seen[f"em-class-less-the-means-of-{most}"], most * ue)
    (_, clean), (_, noise), (_, first), (text, last) = seen["means.png"]
    close(noise, 0.5 + 16 * (ue - clean))                  # three images, of three classes
    close(first, 0.5 - 16 * 599 * ue)
    close(last, 0.5 - 16 * 59 * ue)
    assert text == "its means of 60 at most x16"


def test_main_draws_are_of_seeds_of_their_own(ask, watched, monkeypatch):
    stacked = []
    monkeypatch.setattr(guessed, "judged", lambda c, key, victim, x, sets, count: stacked.append(
        (key, victim.scores_and_answers, x)) or torch.tensor([40.0]))
    said = ask("draws", "--protections", "em-class")
    assert "| em-class | 50.0 | 50.0 | 40.0 |" in said
    assert [seed for _, seed in watched] == list(range(8))
    (key, scores, x), = stacked
    assert scores.func is variants.scores_of_a_draw and x.shape[1] == 24


def test_main_mixture_purifies_five_kinds_and_judges_by_a_classifier(ask, watched):
    said = ask("mixture", "--protections", "em-class,cp-class")
    assert "| em-class and cp-class, half and half | 50.0 | 50.0 |" in said
    assert len(watched) == 5


def test_main_student_changes_what_the_row_says(ask, watched, monkeypatch):
    trained = []
    monkeypatch.setattr(guessed, "prior", lambda c, name, x: trained.append(
        (c.unet["width"], c.ddpm["steps"])) or name)
    said = ask("student")
    assert said.count("| 50.0 |") == 5
    samplers = {key[0]: (net, sampler) for key, (_, net, sampler, _) in watched.items()}
    ours = samplers["em-class-le"][1]
    assert samplers["em-class-sampler.t-star-50-le"][1] == replace(ours, t_star=50)
    assert samplers["em-class-sampler.rounds-4-le"][1] == replace(ours, rounds=4)
    assert samplers["em-class-unet.width-16-le"] == ("student-unet.width-16", ours)
    assert trained == [(16, 4), (8, 4)]


def test_main_smooth_gives_each_row_its_sampler(ask, watched):
    ask("smooth", "--protections", "em-class")
    ours = watched["em-class-le", 0]
    assert watched["em-class-level-100-le", 0][2].t_star == 100
    assert type(watched["em-class-without-what-is-smooth-le", 0][2]) is variants.DetailSampler
    assert (watched["em-class-the-mean-first-le", 0][0] != ours[0]).any()


@pytest.mark.parametrize("arguments, message", [
    (["means", "--only", "x"], "those of --protections"), (["files", "--only", "GIF"], "expected"),
    (["files", "--victims", "0"], "expected 1 or more"), (["mixture"], "expected two")])
def test_main_guessed_says_in_one_line_what_is_wrong(small_run, capsys, arguments, message):
    said = refusal(guessed.main, [*arguments, *SMALL, "--out", small_run], capsys)
    assert message in said.splitlines()[-1]
