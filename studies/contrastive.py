"""Why contrastive noise is hard to make: `python -m studies.scenarios code`, or `longer`."""
from functools import partial

import torch

import train
from attacks import VIEWS, Victim, partner_scores
from studies.run import judged, shown, slug, spread


def coded_view(x, generator, view, codes):
    """The view of an image, with a code of its own added after it (codes) or not (None)."""
    seen = view(x[:, :3], generator)
    return seen + x[:, 3:, :seen.shape[2], :seen.shape[3]] if codes else seen


def fit_coded(victim, **how):
    """`train.fit`, by a function of this file, so that the cache sees its code."""
    return train.fit(victim, **how)


def code(c, sets, count):
    """Blocks of +-8/255 that say the class, added before the views or after them.

    A positive control: SimCLR can be fooled by a code; what destroys it is the augmentation.
    """
    c.evaluate, rows = "validation", []
    images, labels = sets["protected"]
    g = torch.Generator().manual_seed(c.seed)
    n, size = train.count_classes(sets), images.shape[-1]
    blocks = torch.randint(0, 2, (n, 3, size // 4, size // 4), generator=g) * 2.0 - 1
    pattern = (blocks * c.epsilon / 255).repeat_interleave(4, 2).repeat_interleave(4, 3)[labels]
    config = c.resnet | dict(classes=n)
    for view_name in VIEWS:
        row = {"views": view_name}
        carried = torch.cat([images, pattern], 1)          # the code travels as three more channels
        for what, x, after in (("clean", images, False), ("code before", images + pattern, False),
                               ("code after", carried, True)):
            view = partial(coded_view, view=VIEWS[view_name], codes=after)
            victim = Victim(partial(train.new_network, train.SimCLR, config), partial(
                partner_scores, view=view, temperature=c.contrast["temperature"]))
            key = f"code-{view_name}-{slug(what)}"
            score = judged(c, key, fit_coded, victim, c.simclr, x, sets, c.seed)
            row[what] = f"{score:.1f}"
        rows.append(row)
    return rows


def longer(c, sets, count, protection="cp-class"):
    """Does a victim that trains for longer get over the noise, or only then fall for it?"""
    c.evaluate, rows = "validation", []
    ue = train.protect(c, protection, sets)
    for epochs in (30, 60, 120):
        c.simclr["epochs"] = epochs
        clean = spread(c, "simclr", f"longer-{epochs}-clean", sets["protected"][0], sets, count)
        poisoned = spread(c, "simclr", f"longer-{epochs}-ue", ue, sets, count)
        rows.append({"epochs": epochs, "clean": shown(clean), "UE": shown(poisoned)})
    return rows
