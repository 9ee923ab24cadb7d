"""The run that a study looks at: its command line, its data and what the story made of it."""
import argparse
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch

import le
import train
from unet import BadInput, as_float, seed_of
from studies import own, protections, rotation, siamese


def parser_of(name, doc):
    """The command line of a study; further options are those of train.py."""
    return le.Parser(prog=f"studies.{name}", description=doc, allow_abbrev=False,
                     epilog="Further options are those of train.py, and must be those of the run.",
                     formatter_class=argparse.RawDescriptionHelpFormatter)


@contextmanager
def opened(parser, argv, alone=()):
    """The study's own options, the run's configuration, its sets and class names. Only the studies
    named in `alone` do without a run."""
    register()
    with le.one_line_errors(parser.prog):
        options, others = parser.parse_known_args(argv)
        with own.entries(others) as arguments:
            _, c = train.parse(arguments)
            if not (c.run / "ddpm.pt").exists() and getattr(options, "name", "") not in alone:
                command = "train.py" if c.data in ("shapes", "cifar10") else "-m studies.own"
                raise BadInput(f"{c.run}: no run yet; first `python {command}` with the same "
                               "options")
            data = train.load_data(c)
            train.claim(c)
            yield options, c, *data


def register():
    """Let options name the protections and victims of the studies."""
    protections.register()
    rotation.register()
    siamese.register()


def networks(c, sets, perceptual=False):
    """The U-Net of the run and its perceptual distance, which is None where its sampler does
    without, unless a study's own samplers are `perceptual`."""
    if perceptual:
        c = SimpleNamespace(**vars(c) | dict(sampler=dict(perceptual_weight=1.0)))
    return train.train_ddpm(c, sets), train.train_vgg(c, sets)


def versions(c, name, sets):
    """Clean images, the UEs of a protection of the run and the LEs made from them."""
    ue = train.protect(c, name, sets)
    learnable = train.make_learnable(c, name, ue, *networks(c, sets))
    return dict(clean=sets["protected"][0], UE=ue, LE=learnable)


def repaired(c, key, net, distance, ue, sampler, purifier=le.purify):
    """LEs by another U-Net, sampler or purifier than the run's."""
    seeds = [seed_of(c.seed, place) for place in range(len(ue))]
    made = train.cached(c, key, purifier, net=net, distance=distance, images=ue, sampler=sampler,
                        seeds=seeds)
    return as_float(made["images"])


def compared_otherwise(sampler):
    """The sampler that compares grey where this one compares colour, and the reverse."""
    return replace(sampler, compare="colour" if sampler.compare == "grey" else "grey")


def only_one(c, default):
    """The run's protection, if it has only one, or the study's own."""
    return c.protections[0] if len(c.protections) == 1 else default


def slug(text):
    """A file name for a label."""
    return "-".join("".join(ch if ch.isalnum() or ch == "." else " " for ch in text).split())


def of_seed(c, name, k):
    """The run with the k-th seed after its own, and what it calls its `name`; the first is the
    story's own."""
    other = SimpleNamespace(**vars(c) | dict(seed=c.seed + k))
    return other, f"{name}-{k}" if k else name


def network_of(c, kind, name, images, sets, k=0):
    """The network of a victim of the k-th seed."""
    other, numbered = of_seed(c, name, k)
    victim = train.victim_of(other, kind)
    return train.fitted(other, f"{kind}-{numbered}", victim, images, sets)[0]


def spread(c, kind, name, images, sets, victims=3):
    """Accuracies (victims,) of victims of several seeds, trained on the images."""
    return spread_over(c, kind, name, [images], sets, victims)


def spread_over(c, kind, name, variants, sets, victims):
    """The same where each victim is trained on the next of the variants of the images, in turn."""
    accuracies = []
    for k in range(victims):
        images = variants[k % len(variants)]
        other, numbered = of_seed(c, name, k)
        accuracies.append(train.train_victim(other, kind, numbered, images, sets))
    return torch.tensor(accuracies)


def judged(c, key, victim, images, sets, victims=3):
    """`spread` of a victim that is no entry of VICTIMS."""
    accuracies = []
    for k in range(victims):
        other, numbered = of_seed(c, key, k)
        net, _ = train.fitted(other, numbered, victim, images, sets)
        accuracies.append(train.score_of(c, victim, net, sets))
    return torch.tensor(accuracies)


def shown(accuracies, digits=1):
    """Mean and spread of victims' accuracies, as a text with so many digits after the point."""
    accuracies = torch.as_tensor(accuracies)
    spread = f" ± {accuracies.std():.{digits}f}" if len(accuracies) > 1 else ""
    return f"{accuracies.mean():.{digits}f}{spread}"


def accuracies_on(c, kind, prefix, found, sets, count):
    """{what: mean and spread} of victims trained on each of the images in `found`."""
    row = {}
    for what, images in found.items():
        key = what if what == "clean" else f"{prefix}-{slug(what.lower())}"
        row[what] = shown(spread(c, kind, key, images, sets, count))
    return row


def repaired_each(c, key, net, distance, variants, sampler, purifier=le.purify):
    """LEs of each of the variants of UEs, by its own seed."""
    learnable = []
    for k, ue in enumerate(variants):
        other, name = of_seed(c, key, k)
        learnable.append(repaired(other, name, net, distance, ue, sampler, purifier))
    return learnable


def by_sampler(c, sets, name, cases, samplers, distance, count, purifier=le.purify):
    """Rows, a sampler each, of the accuracy on what it makes of each case: (variants, U-Net)."""
    rows = []
    for label, sampler in samplers.items():
        row = {"sampler": label}
        for what, (variants, net) in cases.items():
            key = f"{name}-{slug(what)}-{slug(label)}"
            learnable = repaired_each(c, f"{key}-images", net, distance, variants, sampler,
                                      purifier)
            row[what] = shown(spread_over(c, "classifier", f"{key}-LE", learnable, sets, count))
        rows.append(row)
    return rows


def chosen(rows, only):
    """Those rows of a dict that --only names, or all."""
    if only and only not in rows:
        raise BadInput(f"--only {only}: expected one of {', '.join(rows)}")
    return {only: rows[only]} if only else rows


def print_table(heading, rows):
    """A table of rows, {column: value}, in Markdown, under a heading."""
    print(f"\n{heading}\n\n| {' | '.join(rows[0])} |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
