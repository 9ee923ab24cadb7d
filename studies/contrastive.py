"""Why contrastive noise is hard to make: `python -m studies.scenarios code`, or `longer`."""
from dataclasses import replace
from functools import partial

import torch

import train
from attacks import VIEWS
from studies.opponents import coded_view
from studies.run import judged, shown, slug, spread


def class_codes(classes, size, epsilon, seed):
    """A pattern (3, size, size) of blocks of 4x4 pixels of +-epsilon for each class."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (classes, 3, size // 4, size // 4), generator=generator)
    blocks = epsilon * (2 * signs - 1)
    return blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)


def coded(c, sets):
    """The protected images, and their codes as they may be published or stay beside them."""
    images, labels = sets["protected"]
    classes = c.classes
    codes = class_codes(classes, images.shape[-1], c.epsilon / 255, c.seed)[labels]
    return {
        "clean": images,
        "code before": images + codes,
        "code after": torch.cat([images, codes], 1)}


def reading(c, view, kind="simclr"):
    """A victim that sees the images through a view, and a code beside them as it is."""
    victim = train.victim_of(c, kind)
    return replace(victim, choice=victim.choice | dict(view=partial(coded_view, view=view)))


def code(c, sets, count):
    """Blocks of +-8/255 that say the class, added before the views or after them.

    A positive control: SimCLR, or --victim, can be fooled by a code; what destroys it is the
    augmentation.
    """
    c.evaluate = "validation"
    kind = c.victim or "simclr"
    rows = []
    for name, view in VIEWS.items():
        victim, row = reading(c, view, kind), {"views": name}
        for what, x in coded(c, sets).items():
            key = f"code-{kind}-{name}-{slug(what)}"
            accuracies = judged(c, key, victim, x, sets, count)
            row[what] = shown(accuracies)
        rows.append(row)
    return rows


def longer(c, sets, count, protection="cp-class"):
    """Does a victim that trains for longer get over the noise, or only then fall for it? The code
    after the views is what any noise of a class can take at most."""
    c.evaluate = "validation"
    images = {"clean": sets["protected"][0], "UE": train.protect(c, protection, sets)}
    bound = coded(c, sets)["code after"]
    rows = []
    for epochs in (30, 120):
        c.simclr["epochs"] = min(epochs, c.limit or epochs)
        row = {"epochs": epochs}
        for what, x in images.items():
            key = f"longer-{epochs}-{what.lower()}"
            row[what] = shown(spread(c, "simclr", key, x, sets, count))
        victim = reading(c, VIEWS[c.simclr["view"]])
        row["code after"] = shown(judged(c, f"longer-{epochs}-code", victim, bound, sets, count))
        rows.append(row)
    return rows
