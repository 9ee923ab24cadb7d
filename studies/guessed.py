"""Outcomes that were guessed before they were measured: after `python train.py`, or its `ddpm`.

    python -m studies.guessed NAME [--victims 1] [--most 3000] --data cifar10 --root FILE

Each asks a question, which its function states, of the protections that --protections names, `none`
among them; accuracies are on clean validation images. The guesses are in studies/README.md.

left        the share of a perturbation that is left in the files that are published
files       what such files teach
relearned   what LEs of such files teach
means       the difference that a class's mean makes, taken away
draws       LEs by several draws of the sampler's noise
mixture     two protections: each on half of the images, or both on each
student     one change to the quick look
smooth      samplers for noise that all images share
"""
import sys
from dataclasses import replace
from functools import partial
from inspect import signature
from types import SimpleNamespace

if not __package__:
    print("expected `python -m studies.guessed`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import torch

import train
from attacks import PROTECTIONS, publish
from le import Sampler
from perceptual import psnr
from unet import BadInput
from studies.ablation import by_pillow
from studies.drawing import grid
from studies.formats import FORMATS
from studies.pictures import of_each_class, visible
from studies.prior import prior
from studies.replies import unshared
from studies.run import (chosen, judged, networks, of_seed, opened, parser_of, print_table,
                         repaired, shown, slug, spread)
from studies.untuned import protected_part
from studies.variants import (NONE, DetailSampler, less_class_means, mixtures, scores_of_a_draw,
                              share_left)


# -- What the experiments have in common: `pair` is the run's U-Net and its perceptual distance ----

def taught(c, sets, name, what, images, count):
    """What victims of a protection learn from images, which are called `what`; as a text."""
    return shown(spread(c, train.kind_of(c, name), f"{name}-{what}", images, sets, count))


def purified(c, name, what, ue, pair, sampler=None):
    """LEs of UEs, by the run's sampler or another."""
    return repaired(c, f"{name}-{what}", *pair, ue, sampler or Sampler(**c.sampler))


def named(label, plain, ending):
    """What images are called: as in the story where nothing is changed."""
    return ending if label == plain else f"{slug(label)}-{ending}"


def changed(c, option, value):
    """The run with another value of an option of two words; --limit shortens it, too."""
    group, key = option.split(".")
    if c.limit and key in train.COUNTS:
        value = min(value, c.limit)
    return SimpleNamespace(**vars(c) | {group: vars(c)[group] | {key: value}})


def first_ones(c, sets, most):
    """The run with no protected images but the first, in a folder of its own; 0 is all."""
    if not most:
        return c, sets
    other = SimpleNamespace(**vars(c) | dict(run=c.run / f"first-{most}"))
    other.run.mkdir(exist_ok=True)
    return other, protected_part(sets, most)[1]


# -- Files -----------------------------------------------------------------------------------------

def left(c, sets, pair, count, only=None):
    """How much of a perturbation is left in the files that are published? The share of it that is
    in the difference between the files of UEs and of originals; no victim is trained. Beside it,
    how far the originals are from their files, on average, of 255."""
    clean = sets["protected"][0]
    rows = []
    for how, write in chosen(FORMATS, only).items():
        originals = by_pillow(write, clean)
        row = {"UEs as": how, "originals": f"{255 * (originals - clean).abs().mean():.2f}"}
        for name in c.protections:
            ue = train.protect(c, name, sets)
            row[name] = f"{share_left(ue - clean, by_pillow(write, ue) - originals):.2f}"
        rows.append(row)
    return rows


def files(c, sets, pair, count, only=None, learnable=False):
    """What do such files teach, before anybody purifies; or LEs of them, where these are asked?"""
    heading, ending = ("LEs of UEs as", "le") if learnable else ("UEs as", "ue")
    rows = []
    for how, write in chosen(FORMATS, only).items():
        row = {heading: how}
        what = named(how, "they are", ending)
        for name in c.protections:
            images = by_pillow(write, train.protect(c, name, sets))
            if learnable:
                images = purified(c, name, what, images, pair)
            row[name] = taught(c, sets, name, what, images, count)
        rows.append(row)
    return rows


# -- Means, draws, mixtures ------------------------------------------------------------------------

def means(c, sets, pair, count):
    """Does it take a network to undo noise of a class? The mean of each class, taken away; the
    picture means.png in the run's folder shows it beside the noise, one class a column."""
    clean, labels = sets["protected"]
    rows, pictures = [], [("original", clean)]
    for name in c.protections:
        ue = train.protect(c, name, sets)
        row = {"protection": name, "UE": taught(c, sets, name, "ue", ue, count)}
        pictures.append((f"noise of {name} x16", visible(ue - clean)))
        for most in (600, 60):
            what = f"less the means of {most}"
            images = less_class_means(ue, labels, *sets["unprotected"], most)
            row[what] = taught(c, sets, name, slug(what), images, count)
            pictures.append((f"its means of {most} at most x16", visible(ue - images)))
        rows.append(row)
    grid(c.run / "means.png", [(what, of_each_class(sets, images)) for what, images in pictures])
    return rows


def draws(c, sets, pair, count, n=8):
    """Is it worth it to draw the sampler's noise more than once? The mean of several LEs, or
    another one of each image in each epoch."""
    rows = []
    for name in c.protections:
        ue = train.protect(c, name, sets)
        made = []
        for k in range(n):
            other, what = of_seed(c, "le", k)
            made.append(purified(other, name, what, ue, pair))
        kind = train.kind_of(c, name)
        victim = train.victim_of(c, kind)
        scores = partial(scores_of_a_draw, scores=victim.scores_and_answers)
        of_any = replace(victim, scores_and_answers=scores)
        key = f"{kind}-{name}-any-of-{n}"
        mean = publish(torch.stack(made).mean(0), 0)
        rows.append({
            "protection": name,
            "one draw": taught(c, sets, name, "le", made[0], count),
            f"mean of {n}": taught(c, sets, name, f"mean-of-{n}", mean, count),
            "another each epoch": shown(judged(c, key, of_any, torch.cat(made, 1), sets, count))})
    return rows


def mixture(c, sets, pair, count):
    """Is what is left of two protections their sum, the larger, or less? Judged by a classifier."""
    if len(c.protections) != 2:
        raise BadInput(f"--protections {','.join(c.protections)}: expected two")
    c.victim = c.victim or "classifier"
    clean = sets["protected"][0]
    first, second = c.protections
    found = {name: train.protect(c, name, sets) for name in c.protections}
    both = mixtures(clean, found[first] - clean, found[second] - clean)
    found |= {f"{first} and {second}, {how}": ue for how, ue in both.items()}
    rows = []
    for what, ue in found.items():
        learnable = purified(c, slug(what), "le", ue, pair)
        rows.append({
            "images bear": what,
            "UE": shown(spread(c, c.victim, f"{slug(what)}-ue", ue, sets, count)),
            "LE": shown(spread(c, c.victim, f"{slug(what)}-le", learnable, sets, count))})
    return rows


# -- Other settings, other samplers ----------------------------------------------------------------

CHANGES = {"sampler.t_star": 50, "unet.width": 16, "ddpm.steps": 500, "sampler.rounds": 4}


def student(c, sets, pair, count, only=None, protection="em-class"):
    """What does one change to the quick look do to its LEs?"""
    clean = sets["protected"][0]
    ue = train.protect(c, protection, sets)
    labels = {"nothing": None} | {f"--{key} {value}": key for key, value in CHANGES.items()}
    rows = []
    for label, option in chosen(labels, only).items():
        other, (net, distance) = c, pair
        if option:
            other = changed(c, option, CHANGES[option])
        if option and not option.startswith("sampler"):
            net = prior(other, f"student-{slug(label)}", sets["unprotected"][0])
        what = named(label, "nothing", "le")
        learnable = purified(other, protection, what, ue, (net, distance))
        rows.append({
            "changed": label,
            "LE": taught(c, sets, protection, what, learnable, count),
            "PSNR LE": f"{psnr(learnable, clean):.1f} dB"})
    return rows


def smooth(c, sets, pair, count, only=None):
    """Which sampler undoes noise that all images share, and what does it cost the other kinds?"""
    ours = Sampler(**c.sampler)
    top = c.ddpm["levels"]
    samplers = {
        "as it is": ours,
        "without what is smooth": DetailSampler(**c.sampler),
        f"level {top}": replace(ours, t_star=top),
        "the mean first": ours}
    rows = []
    for label, sampler in chosen(samplers, only).items():
        row = {"LEs by": label}
        for name in c.protections:
            ue = train.protect(c, name, sets)
            if label == "the mean first":
                ue = unshared(ue, sets["unprotected"][0])
            what = named(label, "as it is", "le")
            learnable = purified(c, name, what, ue, pair, sampler)
            row[name] = taught(c, sets, name, what, learnable, count)
        rows.append(row)
    return rows


EXPERIMENTS = dict(left=left, files=files, relearned=partial(files, learnable=True), means=means,
                   draws=draws, mixture=mixture, student=student, smooth=smooth)


def main(argv=None):
    PROTECTIONS["none"] = NONE
    parser = parser_of("guessed", __doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--victims", type=int, default=1, help="default 1")
    parser.add_argument("--most", type=int, default=0, help="so many protected images; 0: all")
    parser.add_argument("--only", metavar="ROW", help="one row of the table, where they are named")
    with opened(parser, argv) as (options, c, sets, _):
        if options.victims < 1 or options.most < 0:
            raise BadInput(f"--victims {options.victims}, --most {options.most}: expected 1 or "
                           "more, and 0 or more")
        experiment, one = EXPERIMENTS[options.name], {}
        if "only" in signature(experiment).parameters:
            one = dict(only=options.only)
        elif options.only:
            raise BadInput(f"--only: the rows of {options.name} are those of --protections")
        c.evaluate = "validation"
        pair = networks(c, sets)
        c, sets = first_ones(c, sets, options.most)
        print_table(options.name, experiment(c, sets, pair, options.victims, **one))


if __name__ == "__main__":
    main()
