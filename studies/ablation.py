"""Countermeasures side by side: the same unlearnable examples and U-Net, after `python train.py`.

    python -m studies.ablation                       every question
    python -m studies.ablation --only "JPEG 10"      one row
    python -m studies.ablation --protection cp-class

Accuracies are those of three victims, on clean validation images. A table, ablation-PROTECTION.json
and .png, accuracy against fidelity, and a picture for each question, are in the run's folder. In
two hours of one core it shows em-sample undone to 97 % by features alone and by both conditions, 95
by pixels alone, 92 by none, 90 and 93 by the released schedules, and 64 by JPEG.
"""
import io
import json
import re
import sys
from dataclasses import replace

if not __package__:
    print("expected `python -m studies.ablation`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from PIL import Image, ImageFilter

import attacks
import le
import train
import unet
from perceptual import psnr
from unet import BadInput, as_bytes, as_float, on_device
from studies.drawing import grid, plot
from studies.pictures import first_of_each
from studies.purifiers import deterministic, weighted
from studies.run import (chosen, compared_otherwise, networks, only_one, opened, parser_of,
                         repaired, slug, spread)


# -- What needs no network -------------------------------------------------------------------------

def none(images, sampler):
    return images


def grayscale(images, sampler):
    return attacks.luma(images).expand_as(images)


def by_pillow(change, images):
    """The images after a function of a Pillow image."""
    arrays = as_bytes(images).permute(0, 2, 3, 1).numpy()
    made = [change(Image.fromarray(pixels)) for pixels in arrays]
    made = torch.from_numpy(np.stack(made))
    return as_float(made.permute(0, 3, 1, 2))


def compressed(image, quality=10):
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return np.array(Image.open(content))


def jpeg(images, sampler):
    return by_pillow(compressed, images)


def filtered(image):
    return np.array(image.filter(ImageFilter.MedianFilter(3)))


def median(images, sampler):
    return by_pillow(filtered, images)


def noise(images, sampler):
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + unet.sigma(sampler.t_star) / 2 * eps).clamp(0, 1)  # as the sampler adds


SIMPLE = {"none": none, "grayscale": grayscale, "JPEG 10": jpeg, "median 3x3": median,
          "noise": noise}


# -- Samplers --------------------------------------------------------------------------------------

def questions(joint):
    """{question: {name: a countermeasure in SIMPLE, or a Sampler}}."""
    released, otherwise = le.SAMPLERS["released"], compared_otherwise(joint)
    top = joint.t_star
    # photographs do without the perceptual condition
    seen = replace(joint, perceptual_below=top, perceptual_weight=joint.perceptual_weight
                   or le.Sampler().perceptual_weight)
    return {
        "what needs no network": dict.fromkeys(SIMPLE),
        "either condition, or both": {
            "unguided": weighted(joint, 0),
            "unguided, DDIM": weighted(joint, 0),          # its strides: see `row_of`
            "pixel only": replace(joint, perceptual_weight=0.0, pixel_above=0),
            "perceptual only": replace(seen, pixel_weight=0.0),
            "joint": joint},
        "the released schedule": {
            "joint": joint,
            "released, 20 levels": replace(released, t_star=20, steps=20),
            "released, 36 levels": released},
        "which target": {"joint": joint, "joint, x_t and a noisy UE": replace(joint, target="xt")},
        "in turn, or both throughout": {
            "joint": joint, "joint, both": replace(seen, pixel_above=0)},
        "colours or grey": {"joint": joint, f"joint, on {otherwise.compare}": otherwise},
        "few levels, many rounds": {
            "joint": joint,
            "joint, half the steps": replace(joint, steps=max(1, joint.steps // 2)),
            "joint, twice the steps": replace(joint, steps=min(top, 2 * joint.steps)),
            "joint, two rounds of half": replace(joint, rounds=2 * joint.rounds,
                                                 steps=max(1, joint.steps // 2))},
        "how much weight": {
            f"joint, weights x {factor}" if factor != 1 else "joint": weighted(joint, factor)
            for factor in (0.25, 0.5, 1, 2, 4)}}


def row_of(c, sets, net, distance, name, label, sampler, ue, clean, lost):
    """A row of the table, and the images that a countermeasure leaves."""
    key, originals = f"ablation-{name}-{slug(label)}", sets["protected"][0]
    if sampler is None:
        made, evaluations = SIMPLE[label](ue, le.Sampler(**c.sampler)), 0
    else:
        purifier = deterministic if label == "unguided, DDIM" else le.purify
        made = repaired(c, key, net, distance, ue, sampler, purifier)
        evaluations = sampler.rounds * sampler.steps
    accuracies = spread(c, train.kind_of(c, name), key, made, sets)
    lost = clean - accuracies if lost is None else lost    # the first row: nothing is done
    row = dict(countermeasure=label, accuracy=accuracies.mean().item(),
               spread=accuracies.std().item(), psnr=psnr(made, originals),
               evaluations=evaluations)
    if lost.mean() > 1:                                    # as in the story's table
        row["recovery"] = (1 - (clean - accuracies) / lost).mean().item()
    if distance is not None:
        pairs = zip(made.split(500), originals.split(500))
        with torch.no_grad():
            apart = torch.cat([distance(on_device(a), on_device(b)) for a, b in pairs])
        row["perceptual"] = apart.mean().item()
    return row, made, lost


def ablate(c, sets, name, only):
    """The rows of the table for a protection; writes the picture of each question."""
    originals, labels = sets["protected"]
    places, kind = first_of_each(labels, 6), train.kind_of(c, name)
    ue = train.protect(c, name, sets)
    asked = questions(le.Sampler(**c.sampler))
    every = {label: sampler for part in asked.values() for label, sampler in part.items()}
    wanted = {"none": None} | chosen(every, only)
    clean = spread(c, kind, "clean", originals, sets)
    net, distance = networks(c, sets, perceptual=True)
    rows, looks, lost = {}, {}, None
    for label, sampler in wanted.items():
        rows[label], made, lost = row_of(c, sets, net, distance, name, label, sampler, ue, clean,
                                         lost)
        text = f"{label}: {rows[label]['accuracy']:.1f}"
        left = 0.5 + 8 * (made[places] - originals[places])
        looks[label] = text, [*made[places], *left]
        print(f"{name}, {text}", flush=True)
    for question, part in asked.items():
        if set(part) <= set(looks):
            path = c.run / f"ablation-{name}-{slug(question)}.png"
            grid(path, [looks[label] for label in part])
    return dict(clean=clean.mean().item(), rows=list(rows.values()))


def table(result):
    lines = ["| countermeasure | accuracy | recovery | PSNR | perceptual distance | evaluations |",
             "|---|---|---|---|---|---|"]
    for r in result["rows"]:
        share = f"{r['recovery']:.2f}" if "recovery" in r else "-"
        lines.append(f"| {r['countermeasure']} | {r['accuracy']:.1f} ± {r['spread']:.1f} "
                     f"| {share} | {r['psnr']:.1f} dB | {r.get('perceptual', 0):.3f} "
                     f"| {r['evaluations']} |")
    return "\n".join(lines)


def trade_off(result, path):
    """Accuracy against fidelity: the joint sampler by its weight, and every other."""
    by_name = {r["countermeasure"]: r for r in result["rows"] if r["evaluations"]}
    points = {label: (r["psnr"], r["accuracy"], 0, re.sub("joint, |weights ", "", label))
              for label, r in by_name.items()}
    weights = ["unguided", "joint, weights x 0.25", "joint, weights x 0.5", "joint",
               "joint, weights x 2", "joint, weights x 4"]
    series = [("joint, by weight", [points[label] for label in weights if label in points])]
    series += [("", [point]) for label, point in points.items() if label not in weights]
    low = min(r["accuracy"] for r in by_name.values())
    title = "accuracy, %: more weight makes truer images, and in the end protected ones again"
    plot(series, "PSNR to the original, dB", title, (low - 2, 100)).save(path)


def main(argv=None):
    parser = parser_of("ablation", __doc__)
    parser.add_argument("--protection", choices=[*train.PROTECTIONS, "published"],
                        help="default em-sample, or the run's, if it has one only")
    parser.add_argument("--only", metavar="ROW", help="one row of the table")
    with opened(parser, argv) as (options, c, sets, _):
        c.evaluate = "validation"                          # what is chosen by looking at it
        name = options.protection or only_one(c, "em-sample")
        if name not in train.PROTECTIONS:
            raise BadInput("--protection published: expected --published beside it")
        result = ablate(c, sets, name, options.only)
        print(f"\n{name}, clean {result['clean']:.1f}\n\n{table(result)}")
        if not options.only:
            path = c.run / f"ablation-{name}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            trade_off(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
