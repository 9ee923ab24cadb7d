"""What learnable examples are worth, and when they fail: after `python train.py`.

    python -m studies.scenarios NAME [--victims 3]

cross     each protection before the victim that it was not made against
longer    contrastive noise, and SimCLR that trains for 30, 60 and 120 epochs
probe     SimCLR's probe trained on clean labelled images, or on the published ones themselves
code      why views matter: a perfect code for each class, added before the views or after them
worth     n labelled images of one's own: alone, with UEs, with LEs, with clean images
part      only a part of what is published is protected, and nobody knows which
others    protections for which nothing here was tuned (studies/protections.py)

Each prints a table, with the spread over the victims, and writes NAME.json and NAME.png to the
run's folder.
"""
import json
from dataclasses import replace
from functools import partial

import torch

import le
import train
from attacks import PROTECTIONS, VIEWS, Victim, partner_scores
from le import BadInput
from studies.ablation import SIMPLE
from studies.drawing import grid, plot_columns
from studies.protections import OTHERS
from studies.run import networks, opened, parser_of, spread, trained

OTHER = {"classifier": "simclr", "simclr": "classifier"}


def shown(accuracies):
    spread = f" ± {accuracies.std():.1f}" if len(accuracies) > 1 else ""
    return f"{accuracies.mean():.1f}{spread}"


def versions(c, name, sets):
    """Clean images, the UEs of a protection and the LEs made from them."""
    ue = train.protect(c, name, sets)
    return dict(clean=sets["protected"][0], ue=ue, le=train.purify(c, name, ue, *networks(c, sets)))


def cross(c, sets, victims):
    """Whoever protects against one kind of learner is not protected against the other."""
    rows = []
    for name in c.protections:
        kind = OTHER[PROTECTIONS[name].victim]
        row = {"protection": name, "victim": kind}
        for what, images in versions(c, name, sets).items():
            key = what if what == "clean" else f"{name}-{what}"
            row[what] = shown(spread(c, kind, key, images, sets, victims))
        rows.append(row)
    return rows


def longer(c, sets, victims, protection="cp-class"):
    """Does a victim that trains for longer get over the noise, or only then fall for it?"""
    c.evaluate, rows = "validation", []
    ue = train.protect(c, protection, sets)
    for epochs in (30, 60, 120):
        c.simclr["epochs"] = epochs
        clean = spread(c, "simclr", f"longer-{epochs}-clean", sets["protected"][0], sets, victims)
        poisoned = spread(c, "simclr", f"longer-{epochs}-ue", ue, sets, victims)
        rows.append({"epochs": epochs, "clean": shown(clean), "ue": shown(poisoned)})
    return rows


def probe(c, sets, victims):
    """An encoder of clean images; its probe learns from published images and their labels."""
    c.evaluate, labels, rows = "validation", sets["protected"][1], []
    net = trained(c, "simclr", "clean", sets["protected"][0], sets)
    for name in c.protections:
        row = {"protection": name}
        for what, images in versions(c, name, sets).items():
            accuracy = train.linear_probe(net.encoder, (images, labels), sets[c.evaluate])
            row[f"probe on {what}"] = f"{accuracy:.1f}"
        rows.append(row)
    return rows


def coded_view(x, generator, view, codes):
    """The view of an image, with a code of its own added after it (codes) or not (None)."""
    seen = view(x[:, :3], generator)
    return seen + x[:, 3:, :seen.shape[2], :seen.shape[3]] if codes else seen


def fit_coded(victim, **how):
    """`train.fit`, by a function of this file, so that the cache sees its code."""
    return train.fit(victim, **how)


def code(c, sets, victims):
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
            made = train.cached(c, f"code-{view_name}-{what.replace(' ', '-')}", fit_coded,
                                victim=victim, images=x, labels=labels, seed=c.seed, **c.simclr)
            net = victim.network(c.seed).eval()
            net.load_state_dict(made["weights"])
            score = train.linear_probe(net.encoder, sets["unprotected"], sets["validation"])
            row[what] = f"{score:.1f}"
        rows.append(row)
    return rows


def worth(c, sets, victims, protection="em-sample"):
    """The unauthorized user has n labelled images, and the U-Net that all of them trained."""
    c.evaluate, rows = "validation", []
    found = versions(c, protection, sets)
    (own, own_labels), labels = sets["unprotected"], sets["protected"][1]
    for n in (64, 256, 1024, len(own)):
        row = {"own images": n}
        for what in ("alone", "ue", "le", "clean"):
            more = found[what] if what != "alone" else own[:0]
            both = torch.cat([own[:n], more])
            answers = torch.cat([own_labels[:n], labels[:len(more)]])
            mixed = sets | {"protected": (both, answers)}
            key = f"worth-{protection}-{n}-{what}"
            row[f"own + {what}" if what != "alone" else "own alone"] = shown(
                spread(c, PROTECTIONS[protection].victim, key, both, mixed, victims))
        rows.append(row)
    return rows


def part(c, sets, victims, protection="em-sample"):
    """Everything is purified, protected or not, since nobody knows which is."""
    c.evaluate, rows = "validation", []
    found = versions(c, protection, sets)
    kind, (clean, labels) = PROTECTIONS[protection].victim, sets["protected"]
    purified_clean = train.purify(c, "nothing", clean, *networks(c, sets))
    for share in (0, 20, 50, 80, 100):
        n = len(clean) * share // 100
        key = f"part-{protection}-{share}"
        mix = torch.cat([found["ue"][:n], clean[n:]])
        purified = torch.cat([found["le"][:n], purified_clean[n:]])
        rest = sets | {"protected": (clean[n:], labels[n:])}
        row = {"protected": f"{share} %",
               "mix": shown(spread(c, kind, f"{key}-mix", mix, sets, victims)),
               "mix purified": shown(spread(c, kind, f"{key}-purified", purified, sets, victims))}
        row["clean part alone"] = "-" if share == 100 else shown(
            spread(c, kind, f"{key}-rest", clean[n:], rest, victims))
        rows.append(row)
    return rows


def others(c, sets, victims):
    """UEs, LEs by our sampler and by the released schedule, and what needs no network."""
    c.evaluate, rows, looks = "validation", [], []
    net, distance = networks(c, sets)
    released = le.SAMPLERS["released"]
    samplers = {"released, 20 levels": replace(released, t_star=20, steps=20),
                "released, 36 levels": released}
    for name, protection in OTHERS.items():
        found = versions(c, name, sets)
        looks += [(f"{name}: {what}", found[what][:8]) for what in ("ue", "le")]
        row = {"protection": name, "PSNR UE": f"{train.psnr(found['ue'], found['clean']):.1f} dB"}
        for label, sampler in samplers.items():
            made = train.cached(c, f"others-{name}-{sampler.t_star}", train.purified,
                                purifier=le.purify, net=net, distance=distance, images=found["ue"],
                                sampler=sampler, seed=c.seed)
            found[label] = le.as_float(made["images"])
        for label in ("JPEG 10", "median 3x3"):
            found[label] = SIMPLE[label](found["ue"], None)
        for what, images in found.items():
            key = "clean" if what == "clean" else f"others-{name}-{what.replace(' ', '-')}"
            row[what] = shown(spread(c, protection.victim, key, images, sets, victims))
        rows.append(row)
    grid(c.run / "others-images.png", looks, margin=260)
    return rows


SCENARIOS = dict(cross=cross, code=code, longer=longer, probe=probe, worth=worth, part=part,
                 others=others)


def main(argv=None):
    PROTECTIONS.update(OTHERS)
    train.DEFAULTS["noise"] |= {name: protection.settings for name, protection in OTHERS.items()}
    parser = parser_of("scenarios", __doc__)
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("--victims", type=int, default=3, help="default 3")
    with opened(parser, argv, alone=("code", "longer")) as (options, c, sets, _):
        if options.victims < 1:
            raise BadInput(f"--victims {options.victims}: expected 1 or more")
        rows = SCENARIOS[options.name](c, sets, options.victims)
        path = c.run / f"{options.name}.json"
        path.write_text(json.dumps(rows, indent=1) + "\n")
        plot_columns(path.with_suffix(".png"), rows)
        print("\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
