"""Pictures of a run, after `python train.py`; they are written to its folder.

    python -m studies.pictures             all of them
    python -m studies.pictures forward     the noise drowns the perturbation before the picture

overview     original, UE, noise x16 and LE of each class; of others by --protections targeted
forward      a UE at levels 0, 10, 36, 100, ...; what is left without the picture; the noise alone
strip        a UE on its way to an LE: x_t at every level that the sampler visits
curves       loss of classifiers and of SimCLR, by epoch, on clean images, UEs and LEs
confusion    what classifiers trained on clean images, UEs and LEs take clean images for
neighbours   the unprotected images that SimCLR finds most like a test image
scenarios    answers of `studies.scenarios` worth, few and part, where they have been asked
"""
import json
import sys
from functools import partial

if not __package__:
    print("expected `python -m studies.pictures`, from the project's folder", file=sys.stderr)
    sys.exit(2)

import torch
import torch.nn.functional as F

import le
import train
import unet
from unet import on_device
from studies.drawing import beside, grid, plot, plot_columns
from studies.run import network_of, networks, opened, parser_of, versions


def first_of_each(labels, most=10):
    """Where the first image of each class is, for at most so many classes."""
    return [(labels == k).nonzero()[0, 0].item() for k in labels.unique()][:most]


def of_each_class(sets, images):
    """The first of each class among the protected images, or UEs or LEs of them."""
    return images[first_of_each(sets["protected"][1])]


def visible(change):
    """What was added to images or taken away, x16, on grey."""
    return 0.5 + 16 * change


def side_by_side(sets, pictures):
    """[(what, images (K, 3, H, W))]: the original of each class; then, of each protection in
    {name: (UEs, LEs)}, the UEs, their noise x16, and the LEs."""
    originals = of_each_class(sets, sets["protected"][0])
    rows = [("original", originals)]
    for name, (ue, learnable) in pictures.items():
        rows.append((f"{name} UE", ue))
        rows.append(("its noise x16", visible(ue - originals)))
        rows.append((f"{name} LE", learnable))
    return rows


def against(c, kind):
    """The protections of the run that are made against a kind of victim."""
    return [name for name in c.protections if train.kind_of(c, name) == kind]


def versions_of(c, sets, names):
    """{the story's name of a victim: the images that it learns from} for these protections."""
    images = {}
    for name in names:
        found = versions(c, name, sets)
        images["clean"] = found["clean"]
        images[f"{name}-ue"] = found["UE"]
        images[f"{name}-le"] = found["LE"]
    return images


def overview(c, sets, classes, path):
    """One class a column; each protection that --protections names."""
    shown = {}
    for name in c.protections:
        found = versions(c, name, sets)
        ue = of_each_class(sets, found["UE"])
        learnable = of_each_class(sets, found["LE"])
        shown[name] = ue, learnable
    labels = of_each_class(sets, sets["protected"][1])
    titles = [str(classes[k])[:10] for k in labels]
    grid(path, side_by_side(sets, shown), titles)


def rms(x):
    """Root mean square."""
    return x.square().mean().sqrt().item()


def forward_rows(original, ue, eps, t):
    """What noise eps (3, H, W) of level t makes of a UE: the noisy UE; what is left of it without
    the original, which is perturbation and noise; and the noise alone. All in pixels of [0, 1]."""
    noisy = unet.q_sample(ue[None] * 2 - 1, t, eps[None])[0]
    alpha_bar = unet.ALPHA_BAR[t]
    picture = alpha_bar.sqrt().item() * (original * 2 - 1)
    noise = (1 - alpha_bar).sqrt().item() * eps
    return noisy / 2 + 0.5, (noisy - picture) / 2, noise / 2


def forward(c, sets, classes, path, levels=(0, 10, 36, 100, 300, 1000), scale=3):
    """Noise on a UE: at level 10 one sees the perturbation in it, at level 36 hardly, and at level
    100, where the picture can still be seen, no longer. Two rows have one scale."""
    name = c.protections[0]
    original = sets["protected"][0][:3][-1]                # the third, where there are three
    ue = train.protect(c, name, sets)[:3][-1]
    generator = torch.Generator().manual_seed(c.seed)
    eps = torch.randn(original.shape, generator=generator)
    around_its_mean = original - original.mean((1, 2), keepdim=True)
    rows = {f"{name} UE and noise": [], f"without the picture, x{scale}": [],
            f"the noise alone, x{scale}": []}
    sizes = {"rms of the picture": [], "of the perturbation": [], "of the noise": []}
    for t in levels:
        noisy, left, noise = forward_rows(original, ue, eps, t)
        images = noisy, 0.5 + scale * left, 0.5 + scale * noise
        for row, image in zip(rows.values(), images):
            row.append(image)
        kept = unet.ALPHA_BAR[t].sqrt().item()
        parts = kept * around_its_mean, left - noise, noise
        for row, part in zip(sizes.values(), parts):
            row.append(f"{rms(part):.3f}")
    titles = [f"level {t}" for t in levels]
    grid(path, list(rows.items()), titles, list(sizes.items()), zoom=4)


def normal_like(x, generator):
    return torch.randn(x.shape, generator=generator).to(x)


def strip(c, sets, classes, path):
    """One UE of each protection, in the sampler's last round."""
    sampler = le.Sampler(**c.sampler)
    net, distance = networks(c, sets)
    visited = unet.visited_levels(sampler.t_star, sampler.steps)[:-1]
    original = sets["protected"][0][:3][-1]
    rows = []
    for name in c.protections:
        ue = train.protect(c, name, sets)[:3][-1]
        y = on_device(ue[None] * 2 - 1)
        draw = partial(normal_like, y, torch.Generator().manual_seed(c.seed))
        with torch.no_grad():
            way = list(le.denoise(net, distance, y, sampler, draw))
        last_round = way[-sampler.steps - 1:]
        images = [xt[0].cpu() / 2 + 0.5 for xt in last_round]
        rows.append((name, [original, ue, *images]))
    levels = [f"t = {t}" for t in visited]
    grid(path, rows, ["original", "UE", *levels, "LE"])


def curves(c, sets, classes, path):
    """One picture for each kind of victim; the second one's name ends in -simclr."""
    draw_curves(c, sets, "classifier", path,
                "loss of classifiers: on UEs it falls before there is time to learn")
    draw_curves(c, sets, "simclr", path.with_stem(f"{path.stem}-simclr"),
                "NT-Xent of SimCLR: on UEs it falls before there is time to learn")


def draw_curves(c, sets, kind, path, title):
    series = []
    for name, images in versions_of(c, sets, against(c, kind)).items():
        victim = train.victim_of(c, kind)
        _, losses = train.fitted(c, f"{kind}-{name}", victim, images, sets)
        points = [(epoch, loss, 0, "") for epoch, loss in enumerate(losses, 1)]
        series.append((name, points))
    if series:
        values = [loss for _, points in series for _, loss, *_ in points]
        low = min(values)
        high = min(max(values), low + 2.2)
        plot(series, "epoch", title, (low - 0.05, high)).save(path)


def confusion(c, sets, classes, path):
    """Rows are classes, columns answers; blue is often."""
    images, labels = sets[c.evaluate]
    n = len(classes)
    blue = torch.tensor([0.0, 0.45, 0.7]).view(3, 1, 1)
    matrices = {}
    names = against(c, "classifier")[:1]
    for name, version in versions_of(c, sets, names).items():
        net = network_of(c, "classifier", name, version, sets)
        answers = train.in_parts(net, images).argmax(1)
        counts = (n * labels + answers).bincount(minlength=n * n).view(n, n)
        share = counts / counts.sum(1, keepdim=True).clamp_min(1)
        matrices[name] = 0.94 + (blue - 0.94) * share
    rows = []
    for i in range(n):
        cells = [matrix[:, i:i + 1] for matrix in matrices.values()]
        rows.append((str(classes[i])[:16], cells))
    if matrices:
        grid(path, rows, list(matrices), zoom=24)


def directions(encoder, images):
    """Features (N, c) of unit length."""
    return F.normalize(train.in_parts(encoder.features, images), dim=1)


def neighbours(c, sets, classes, path, count=4):
    """Of three test images: `count` neighbours each, by an encoder of clean images, UEs and LEs."""
    known, _ = sets["unprotected"]
    count = min(count, len(known))
    test, labels = sets[c.evaluate]
    asked = test[first_of_each(labels, 3)]
    rows = []
    names = against(c, "simclr")[:1]
    for name, version in versions_of(c, sets, names).items():
        encoder = network_of(c, "simclr", name, version, sets)
        cosines = directions(encoder, asked) @ directions(encoder, known).T
        row = []
        for image, nearest in zip(asked, cosines.topk(count).indices):
            row += [image, *known[nearest], torch.ones_like(image)]
        rows.append((f"by SimCLR on {name}", row))
    if rows:
        titles = ["test\nimage", "nearest"] + [""] * count
        grid(path, rows, 3 * titles)


QUESTIONS = {"worth": "what LEs add to n images of one's own: accuracy, %",
             "few": "n unprotected images for the U-Net: accuracy, %",
             "part": "a share of what is published is protected: accuracy, %"}


def scenarios(c, sets, classes, path):
    """What `studies.scenarios` found, of these questions, where it has been asked."""
    plots = []
    for name, title in QUESTIONS.items():
        answer = c.run / f"{name}.json"
        if answer.exists():
            rows = json.loads(answer.read_text(encoding="utf-8"))
            plots.append(plot_columns(rows, title, (620, 400)))
    if plots:
        beside(plots).save(path)


PICTURES = dict(overview=overview, forward=forward, strip=strip, curves=curves, confusion=confusion,
                neighbours=neighbours, scenarios=scenarios)


def main(argv=None):
    parser = parser_of("pictures", __doc__)
    parser.add_argument("picture", choices=("all", *PICTURES))
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-"):
        argv.insert(0, "all")
    with opened(parser, argv) as (options, c, sets, classes):
        for name, picture in PICTURES.items():
            if options.picture in ("all", name):
                path = c.run / f"{name}.png"
                for old in c.run.glob(f"{name}*.png"):
                    old.unlink()
                picture(c, sets, classes, path)
                drawn = sorted(map(str, c.run.glob(f"{name}*.png")))
                says = ", ".join(drawn) or f"{name}: there is nothing to draw yet"
                print(says, file=sys.stderr)


if __name__ == "__main__":
    main()
