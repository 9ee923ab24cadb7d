"""What the unauthorized user's images must be like: `python -m studies.scenarios few`, or `shift`.

The perceptual distance is the run's, so it has seen all unprotected images and their labels; the
U-Net needs no labels.
"""
from pathlib import Path
from types import SimpleNamespace

import torch

import le
import train
import unet
from perceptual import psnr
from unet import on_device
from studies.drawing import grid
from studies.pictures import first_of_each
from studies.run import networks, repaired, shown, slug, spread


def prior(c, name, images):
    """The U-Net of the story, trained on other images for as many steps, in a folder of its own."""
    other = SimpleNamespace(**vars(c) | dict(run=c.run / name))
    other.run.mkdir(exist_ok=True)
    return train.train_ddpm(other, {"unprotected": (images, None)})


def counts_up_to(most):
    """64, 256, 1024 images and all of them, as far as there are."""
    return [n for n in (64, 256, 1024) if n < most] + [most]


@torch.no_grad()
def predicted_x0(xt, net, t):
    return unet.predict_x0(xt, t, net(xt, t)).clamp(-1, 1)


def denoising_psnr(net, images, sampler):
    """PSNR in dB of x0 predicted from x_t, averaged over the levels that the sampler visits."""
    found = []
    for t in unet.visited_levels(sampler.t_star, sampler.steps)[:-1]:
        generator = torch.Generator().manual_seed(t)
        eps = torch.randn(images.shape, generator=generator)
        xt = unet.q_sample(2 * images - 1, t, eps)
        x0 = torch.cat([predicted_x0(on_device(part), net, t).cpu() for part in xt.split(500)])
        found.append(psnr(x0 / 2 + 0.5, images))
    return sum(found) / len(found)


def row_of(c, study, key, net, distance, sets, ue, protection, count):
    """What a U-Net is worth as a prior: a row without its name, and the LEs. Clean images and UEs
    are the study's, whichever the U-Net."""
    kind = train.kind_of(c, protection)
    sampler = le.Sampler(**c.sampler)
    learnable = repaired(c, f"{key}-le", net, distance, ue, sampler)
    clean = spread(c, kind, f"{study}-clean", sets["protected"][0], sets, count)
    on_ue = spread(c, kind, f"{study}-ue", ue, sets, count)
    on_le = spread(c, kind, f"{key}-le", learnable, sets, count)
    share = train.recovery(clean.mean().item(), on_ue.mean().item(), on_le.mean().item())
    row = {
        "denoising": f"{denoising_psnr(net, sets['validation'][0], sampler):.1f} dB",
        "clean": shown(clean),
        "UE": shown(on_ue),
        "LE": shown(on_le),
        "recovery": "-" if share is None else f"{share:.2f}"}
    return row, learnable


def few(c, sets, count, protection="em-sample"):
    """How few unprotected images do?"""
    c.evaluate = "validation"
    images = sets["unprotected"][0]
    ue = train.protect(c, protection, sets)
    net, distance = networks(c, sets)
    rows = []
    for n in counts_up_to(len(images)):
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
    print(f"photographs are left out: expected {train.CIFAR10} at {c.root}")
    return {}


def shift(c, sets, count, protection="em-sample"):
    """The protected half of the classes, purified by what has seen other images."""
    c.evaluate = "validation"
    half = c.classes // 2
    images, labels = sets["unprotected"]
    net, distance = networks(c, sets)
    others = {
        "other classes": images[labels >= half],
        "half the contrast": 0.25 + images / 2,
        "negatives": 1 - images} | foreign(c, len(images))

    ue = train.protect(c, protection, sets)[sets["protected"][1] < half]
    judged = {name: (x[y < half], y[y < half]) for name, (x, y) in sets.items()}
    originals, answers = judged["protected"]
    places = first_of_each(answers, 5)
    looks = [
        ("original", originals[places]),
        ("UE", ue[places])]
    rows = []
    for what in ("like them", *others):
        key = f"shift-{slug(what)}"
        own = prior(c, key, others[what]) if what in others else net
        row, learnable = row_of(c, "shift", key, own, distance, judged, ue, protection, count)
        rows.append({"the U-Net has seen": what} | row)
        looks.append((f"LE, {what}", learnable[places]))
    grid(c.run / "shift-images.png", looks)
    return rows
