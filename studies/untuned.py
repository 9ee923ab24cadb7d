"""Protections for which nothing here was tuned, and what undoes them: `python -m studies.scenarios`
others or mend."""
from dataclasses import replace

import le
import train
from studies.ablation import SIMPLE
from studies.protections import OTHERS
from studies.purifiers import recoloured, weighted
from studies.run import by_sampler, compared_otherwise, networks, repaired, shown, slug, spread


def protected_part(sets, most):
    """The first protected images, and the sets with no others."""
    images, labels = [part[:most] for part in sets["protected"]]
    return images, sets | {"protected": (images, labels)}


def asked_for(c, default):
    """Those of OTHERS that --protections names; the default, if it names none of them."""
    return [name for name in OTHERS if name in c.protections] or default


def others(c, sets, count, most=3000):
    """What undoes protections for which nothing was tuned? What needs no network; our sampler, as
    it is and with one thing changed; the released one, which takes its time, so for `most` images.
    """
    c.evaluate = "validation"
    clean, sets = protected_part(sets, most)
    net, distance = networks(c, sets, perceptual=True)
    ours = le.Sampler(**c.sampler)
    released = le.SAMPLERS["released"]
    otherwise = compared_otherwise(ours)
    samplers = {
        "LE": ours,
        f"LE, on {otherwise.compare}": otherwise,
        "LE, half the level": replace(ours, t_star=ours.t_star // 2),
        "LE, one round": replace(ours, rounds=1),
        "released, 20 levels": replace(released, t_star=20, steps=20),
        "released, 36 levels": released}
    purified_clean = repaired(c, "others-clean-images", net, distance, clean, ours)
    rows = {}
    for name in asked_for(c, OTHERS):
        kind = train.kind_of(c, name)
        ue = train.protect(c, name, sets)
        found = {"clean": clean, "clean, purified": purified_clean, "UE": ue}
        for label in ("JPEG 10", "median 3x3"):
            found[label] = SIMPLE[label](ue, None)
        for label, sampler in samplers.items():
            key = f"others-{name}-{slug(label)}-images"
            found[label] = repaired(c, key, net, distance, ue, sampler)
        for what, images in found.items():
            prefix = "others" if "clean" in what else f"others-{name}"
            key = f"{prefix}-{slug(what)}"
            row = rows.setdefault(what, {"images": what})
            row[name] = shown(spread(c, kind, key, images, sets, count))
    return list(rows.values())


def mend(c, sets, count, most=3000):
    """What would undo targeted poisons, and what does it cost where nothing had to be mended? Or
    others, which --protections names.
    """
    c.evaluate = "validation"
    clean, sets = protected_part(sets, most)
    net, distance = networks(c, sets)
    cases = {"clean": ([clean], net)}
    for name in asked_for(c, ("patches", "targeted")):
        cases[name] = [train.protect(c, name, sets)], net
    ours = le.Sampler(**c.sampler)
    samplers = {
        "as it is": ours,
        "half the weight": weighted(ours, 1 / 2),
        "a quarter of the weight": weighted(ours, 1 / 4),
        "unguided, one round of ten": replace(weighted(ours, 0), t_star=3 * ours.t_star // 4,
                                              rounds=1, steps=10)}
    rows = by_sampler(c, sets, "mend", cases, samplers, distance, count)
    return rows + by_sampler(c, sets, "mend", cases, {"colours anew, then unguided": ours},
                             distance, count, recoloured)
