"""What learnable examples are worth, and when they fail: after `python train.py`.

    python -m studies.scenarios NAME [--victims 3] [--protections ONE]

Each asks a question, which its function states. What came out, on shapes if nothing else is said:

cross     the victim that a protection was not made against loses 20 to 66 points of 99
code      a perfect code for the class costs SimCLR 52 points after the views, 4 before them
longer    on photographs contrastive noise takes nothing of SimCLR, after 30 epochs or 120
probe     a linear probe of good features loses 5 points at most by published labels
worth     64 labelled images of one's own teach 18 %, with LEs 96 (photographs: 23, 66)
part      where half is protected, purifying all of it brings 2 points (photographs: 9)
ceiling   clean images that are purified, too, teach 1 point less (photographs: 1)
mean      one mean image, taken away, undoes noise that all photographs share
others    LEs undo three of five protections of photographs for which nothing was tuned
mend      with a quarter of the weight they undo targeted poisons, and lose the picture, too
few       256 unprotected images do for the U-Net; 64 bring half of it back
shift     a U-Net that has seen photographs only brings half of shapes' accuracy back
strides   one network evaluation brings 20 % to 96, and four bring it to 98
victims   other networks than the noise was made against are fooled, and taught, as well
owner     noise that knows the sampler takes 25 points of LEs' 97 (photographs: 5 of 65)
reply     other samplers undo a part of that

A table, with the spread over the victims, is printed, and NAME.json and NAME.png are written to the
run's folder. `all` asks one after the other, and goes on where it was cut off.
"""
import json
import re
import sys
from copy import deepcopy
from dataclasses import replace
from inspect import signature

if not __package__:
    print("expected `python -m studies.scenarios`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import torch

import le
import train
from unet import BadInput
from studies.replies import mean, owner, reply, victims
from studies.contrastive import code, longer
from studies.drawing import plot_columns, plot_rows
from studies.prior import counts_up_to, few, prior, shift
from studies.run import (accuracies_on, network_of, networks, only_one, opened, parser_of,
                         print_table, repaired, shown, slug, spread, versions)
from studies.untuned import mend, others

OTHER = {"classifier": "simclr", "simclr": "classifier", "rotation": "classifier"}


def cross(c, sets, count):
    """Each protection before a victim that it was not made against, --victim or another."""
    rows = []
    for name in c.protections:
        kind = c.victim or OTHER.get(train.PROTECTIONS[name].victim, "classifier")
        found = versions(c, name, sets)
        rows.append({"protection": name, "victim": kind}
                    | accuracies_on(c, kind, name, found, sets, count))
    return rows


def probe(c, sets, count):
    """Encoders of clean images; their probes learn from published images and their labels."""
    c.evaluate = "validation"
    clean, labels = sets["protected"]
    nets = [network_of(c, "simclr", "clean", clean, sets, k) for k in range(count)]
    rows = []
    for name in c.protections:
        row = {"protection": name}
        for what, images in versions(c, name, sets).items():
            row[f"probe on {what}"] = shown([
                train.linear_probe(net, (images, labels), sets[c.evaluate])
                for net in nets])
        rows.append(row)
    return rows


def worth(c, sets, count, protection="em-sample"):
    """The unauthorized user has n labelled images, and for the U-Net all others without labels, or
    none. LEs by pixel distance: the run's perceptual one has learned from labels he lacks. Victims
    of few images train for as many steps as the story's.
    """
    c.evaluate = "validation"
    own, own_labels = sets["unprotected"]
    clean, labels = sets["protected"]
    ue = train.protect(c, protection, sets)
    epochs = c.classifier["epochs"]
    net, _ = networks(c, sets)
    rows = []
    pixels = replace(le.Sampler(**c.sampler), perceptual_weight=0.0, pixel_above=0)
    by_all = repaired(c, f"worth-{protection}-le", net, None, ue, pixels)
    for n in counts_up_to(len(own)):
        by_few = by_all
        if n < len(own):
            learned = prior(c, f"few-{n}", own[:n])
            by_few = repaired(c, f"worth-{protection}-{n}-le", learned, None, ue, pixels)
        row = {"own images": n}
        added = {"alone": own[:0], "and UE": ue, "and LE": by_all, "and LE, U-Net of own": by_few,
                 "and clean": clean}
        for what, more in added.items():
            both = torch.cat([own[:n], more])
            answers = torch.cat([own_labels[:n], labels[:len(more)]])
            mixed = sets | {"protected": (both, answers)}
            c.classifier["epochs"] = max(epochs, epochs * len(clean) // len(both))
            column = "and LE" if more is by_all else what  # of all, the same LEs
            kind = "worth" if what in ("alone", "and clean") else f"worth-{protection}"
            key = f"{kind}-{n}-{slug(column)}"
            row[what] = shown(spread(c, "classifier", key, both, mixed, count))
        rows.append(row)
    return rows


def part(c, sets, count, protection="em-sample"):
    """Everything is purified, protected or not, since nobody knows which is."""
    c.evaluate = "validation"
    found = versions(c, protection, sets)
    kind = train.kind_of(c, protection)
    clean, labels = sets["protected"]
    purified_clean = train.make_learnable(c, "nothing", clean, *networks(c, sets))
    ends = accuracies_on(c, kind, protection, found, sets, count)
    none = shown(spread(c, kind, f"part-{protection}-0-purified", purified_clean, sets, count))
    rows = [{"protected": "0 %", "mix": ends["clean"], "mix purified": none,
             "clean part alone": ends["clean"]}]
    for share in (20, 50, 80):
        n = len(clean) * share // 100
        key = f"part-{protection}-{share}"
        mix = torch.cat([found["UE"][:n], clean[n:]])
        purified = torch.cat([found["LE"][:n], purified_clean[n:]])
        rest = sets | {"protected": (clean[n:], labels[n:])}
        rows.append({
            "protected": f"{share} %",
            "mix": shown(spread(c, kind, f"{key}-mix", mix, sets, count)),
            "mix purified": shown(spread(c, kind, f"{key}-purified", purified, sets, count)),
            "clean part alone": shown(spread(c, kind, f"{key}-rest", clean[n:], rest, count))})
    return [*rows, {"protected": "100 %", "mix": ends["UE"], "mix purified": ends["LE"],
                    "clean part alone": "-"}]


def ceiling(c, sets, count):
    """What do clean images teach that go through the same sampler? LEs can hardly teach more."""
    clean = sets["protected"][0]
    found = {"clean": clean, "purified": train.make_learnable(c, "nothing", clean,
                                                              *networks(c, sets))}
    kinds = dict.fromkeys(train.kind_of(c, name) for name in c.protections)
    return [{"victim": kind} | accuracies_on(c, kind, "nothing", found, sets, count)
            for kind in kinds]


def strides(c, sets, count):
    """How many network evaluations does an image need?"""
    c.evaluate = "validation"
    net, distance = networks(c, sets)
    ues = {name: train.protect(c, name, sets) for name in c.protections}
    rows = []
    for steps in (0, 1, 2, 4, 8, 36):
        row = {"evaluations": steps * c.sampler["rounds"]}
        for name, images in ues.items():
            key = f"strides-{name}-{steps}"
            if steps:
                sampler = replace(le.Sampler(**c.sampler), steps=steps)
                images = repaired(c, f"{key}-le", net, distance, images, sampler)
            kind = train.kind_of(c, name)
            row[name] = shown(spread(c, kind, key, images, sets, count))
        rows.append(row)
    return rows


SCENARIOS = dict(cross=cross, code=code, longer=longer, probe=probe, worth=worth, part=part,
                 ceiling=ceiling, mean=mean, others=others, mend=mend, few=few, shift=shift,
                 victims=victims, owner=owner, reply=reply, strides=strides)


def draw(name, rows):
    """A scenario's picture, under the first sentence of its function."""
    question = re.split(r"(?<=[.?]) ", " ".join(SCENARIOS[name].__doc__.split()))[0]
    counted = re.match(r"\d", str(next(iter(rows[0].values()))))
    plot = plot_columns if counted else plot_rows
    return plot(rows, f"{question} Accuracy on clean images, %")


def ask(name, c, sets, victims):
    """Make a scenario's table, and write it and its picture to the run's folder."""
    one, asks = {}, signature(SCENARIOS[name]).parameters
    if "protection" in asks:
        one = dict(protection=only_one(c, asks["protection"].default))
    rows = SCENARIOS[name](c, sets, victims, **one)
    path = c.run / f"{name}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(name, rows).save(path.with_suffix(".png"))
    print_table(", ".join([name, *one.values()]), rows)


def main(argv=None):
    parser = parser_of("scenarios", __doc__)
    parser.add_argument("name", choices=[*SCENARIOS, "all"])
    parser.add_argument("--victims", type=int, default=3, help="default 3")
    with opened(parser, argv, alone=("code", "longer")) as (options, c, sets, _):
        if options.victims < 1:
            raise BadInput(f"--victims {options.victims}: expected 1 or more")
        for name in SCENARIOS if options.name == "all" else [options.name]:
            ask(name, deepcopy(c), sets, options.victims)  # each changes settings for itself


if __name__ == "__main__":
    main()
