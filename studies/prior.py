"""What the unauthorized user's images must be like: `python -m studies.scenarios few`, or `shift`.

The perceptual distance is the run's, so it has seen all unprotected images and their labels; the
U-Net needs no labels.
"""
from pathlib import Path

import torch

import le
import train
import unet
from attacks import PROTECTIONS
from le import on_device
from studies.drawing import grid
from studies.run import first_of_each, networks, repaired, shown, slug, spread


def prior(c, name, images):
    """The U-Net of the story, trained on other images for as many steps."""
    net = train.new_network(train.UNet, c.unet | dict(size=images.shape[-1]), c.seed)
    train.cached(c, name, train.train_unet, net=net, images=images, seed=c.seed, **c.ddpm)
    return on_device(unet.load(c.run / f"{name}.pt"))


@torch.no_grad()
def denoising_psnr(net, images, sampler):
    """PSNR in dB of x0 predicted from x_t, averaged over the levels that the sampler visits."""
    levels = []
    for t in unet.visited_levels(sampler.t_star, sampler.steps)[:-1]:
        eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(t))
        x0 = []
        for x, noise in zip(images.split(500), eps.split(500)):
            xt = on_device(unet.q_sample(2 * x - 1, t, noise))
            x0.append(unet.predict_x0(xt, t, net(xt, t)).clamp(-1, 1).cpu())
        levels.append(train.psnr(torch.cat(x0) / 2 + 0.5, images))
    return sum(levels) / len(levels)


def row_of(c, study, key, net, distance, sets, ue, protection, count):
    """What a U-Net is worth as a prior: a row without its name, and the LEs. Clean images and UEs
    are the study's, whichever the U-Net."""
    kind, sampler = PROTECTIONS[protection].victim, le.Sampler(**c.sampler)
    made = repaired(c, f"{key}-le", net, distance, ue, sampler)
    accuracies = [spread(c, kind, name, images, sets, count) for name, images in (
        (f"{study}-clean", sets["protected"][0]), (f"{study}-ue", ue), (f"{key}-le", made))]
    clean, on_ue, on_le = [part.mean().item() for part in accuracies]
    share = train.recovery(clean, on_ue, on_le)
    row = {"denoising": f"{denoising_psnr(net, sets['validation'][0], sampler):.1f} dB"}
    row |= dict(zip(("clean", "UE", "LE"), map(shown, accuracies), strict=True))
    return row | {"recovery": "-" if share is None else f"({share:.2f})"}, made


def few(c, sets, count, protection="em-sample"):
    """How few unprotected images do?"""
    c.evaluate, rows = "validation", []
    images, ue = sets["unprotected"][0], train.protect(c, protection, sets)
    net, distance = networks(c, sets)
    for n in sorted({min(n, len(images)) for n in (64, 256, 1024, len(images))}):
        own = net if n == len(images) else prior(c, f"few-{n}", images[:n])
        row, _ = row_of(c, "few", f"few-{n}", own, distance, sets, ue, protection, count)
        rows.append({"images": n} | row)
    return rows


def foreign(c, n):
    """Photographs for who works on shapes, and shapes for who works on photographs."""
    if c.data != "shapes":
        return {"shapes": train.shapes(n, c.seed, c.size)[0]}
    if Path(c.root).exists():
        return {"photographs": train.cifar10(c.root)[0][0][:n]}
    print(f"photographs are left out: expected {train.CIFAR10[0]} at {c.root}")
    return {}


def shift(c, sets, count, protection="em-sample"):
    """The protected half of the classes, purified by what has seen other images."""
    c.evaluate, rows = "validation", []
    half = train.count_classes(sets) // 2
    images, labels = sets["unprotected"]
    ue = train.protect(c, protection, sets)[sets["protected"][1] < half]
    net, distance = networks(c, sets)
    judged = {name: (x[y < half], y[y < half]) for name, (x, y) in sets.items()}
    others = {"other classes": images[labels >= half], "half the contrast": 0.25 + images / 2,
              "negatives": 1 - images} | foreign(c, len(images))
    places = first_of_each(judged["protected"][1], 5)
    looks = [("original", judged["protected"][0][places]), ("UE", ue[places])]
    for what in ("like them", *others):
        key = f"shift-{slug(what)}"
        own = prior(c, key, others[what]) if what in others else net
        row, made = row_of(c, "shift", key, own, distance, judged, ue, protection, count)
        rows.append({"the prior has seen": what} | row)
        looks.append((f"LE, {what}", made[places]))
    grid(c.run / "shift-images.png", looks, margin=200)
    return rows
