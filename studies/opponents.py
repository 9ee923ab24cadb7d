"""Other victims; an owner who answers: `python -m studies.scenarios victims`, owner or reply."""
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import le
import train
import unet
from attacks import PROTECTIONS, VIEWS, Victim, class_scores, min_min, partner_scores
from studies.prior import foreign, prior
from studies.run import (accuracies_on, by_sampler, compared_otherwise, judged, networks, of_seed,
                         repaired_each, shown, slug, spread, spread_over, versions)


# -- Victims that the protection did not expect ----------------------------------------------------

class Transformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021) whose patches of 4x4 pixels are read by
    convolutions, with which it learns from few images (Xiao et al. 2021): (B, 3, H, W) -> (B, c,
    H / 4, W / 4)."""

    def __init__(self, c, size, depth=4):
        super().__init__()
        self.patches = nn.Sequential(train.conv_norm(3, c // 2, 3, 2), nn.ReLU(),
                                     train.conv_norm(c // 2, c, 3, 2), nn.ReLU(),
                                     nn.Conv2d(c, c, 1))
        self.place = nn.Parameter(0.02 * torch.randn((size // 4) ** 2, c))
        layer = nn.TransformerEncoderLayer(c, 4, 2 * c, 0.0, F.gelu, batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(c),
                                            enable_nested_tensor=False)

    def forward(self, x):
        patches = self.patches(x)
        tokens = self.layers(patches.flatten(2).mT + self.place)
        return tokens.mT.reshape(patches.shape)


def plain(c):
    """Three times two convolutions, without shortcuts: (B, 3, H, W) -> (B, c, H / 8, W / 8)."""
    layers = []
    for c_in, c_out in ((3, c // 4), (c // 4, c // 2), (c // 2, c)):
        layers += [train.conv_norm(c_in, c_out, 3), nn.ReLU(), train.conv_norm(c_out, c_out, 3),
                   nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers)


def encoder(kind, size, widths, classes):
    """A network like train.ResNet with other layers between the image and the mean of its maps."""
    net = train.ResNet(widths=widths[-1:], blocks=1, strides=(), classes=classes)
    net.levels = plain(widths[-1]) if kind == "plain" else Transformer(widths[-1], size)
    return net


def contrastive(kind, size, widths, classes):
    """train.SimCLR with such an encoder."""
    net = train.SimCLR(widths=widths, blocks=1, strides=(2,) * (len(widths) - 1), classes=classes)
    net.encoder = encoder(kind, size, widths, classes)
    return net


def fit(victim, **how):
    """`train.fit`, by a function of this file, so that the cache sees its code."""
    return train.fit(victim, **how)


def opponent(c, sets, architecture, kind, scores):
    """A victim with another network than the story's."""
    config = dict(kind=kind, size=c.size, widths=c.resnet["widths"],
                  classes=train.count_classes(sets))
    return Victim(partial(train.new_network, architecture, config), scores)


def opponents(c, sets):
    """{name: (kind, victim, settings of its training)}. Transformers take time, small steps."""
    plain_network = opponent(c, sets, encoder, "plain", class_scores)
    transformer = opponent(c, sets, encoder, "transformer", class_scores)
    patient = c.classifier | dict(epochs=2 * c.classifier["epochs"], lr=0.05)
    views = partial(partner_scores, view=VIEWS[c.contrast["view"]],
                    temperature=c.contrast["temperature"])
    simclr = opponent(c, sets, contrastive, "plain", views)
    return {
        "plain network": ("classifier", plain_network, c.classifier),
        "transformer": ("classifier", transformer, patient),
        "SimCLR, plain network": ("simclr", simclr, c.simclr)}


def victims(c, sets, count):
    """Noise is made against a ResNet; does it hold against others, and do LEs help them?"""
    c.evaluate = "validation"
    rows = []
    for name in c.protections:
        found = versions(c, name, sets)
        kind = PROTECTIONS[name].victim
        surrogate = accuracies_on(c, kind, name, found, sets, count)
        rows.append({"victim": f"ResNet, {name}"} | surrogate)
        for other, (learns, victim, training) in opponents(c, sets).items():
            if learns != kind:
                continue
            row = {"victim": f"{other}, {name}"}
            for what, images in found.items():
                version = what if what == "clean" else f"{name}-{what.lower()}"
                key = f"victims-{slug(other)}-{version}"
                row[what] = shown(judged(c, key, fit, victim, training, images, sets, count))
            rows.append(row)
    return rows


# -- The owner answers -----------------------------------------------------------------------------

def scores_after_a_stride(net, x, labels, generator, prior, level):
    """The choice of a classifier that sees what the U-Net makes of the diffused images."""
    x = 2 * x - 1
    eps = torch.randn(x.shape, generator=generator).to(x)
    xt = unet.q_sample(x, level, eps)
    x0 = unet.predict_x0(xt, level, prior(xt, level)).clamp(-1, 1)
    return class_scores(net, x0 / 2 + 0.5, labels, generator)


def through_the_sampler(images, labels, victim, *, prior, level, **how):
    """Error-minimizing noise that is to survive the sampler's first stride, without guidance."""
    scores = partial(scores_after_a_stride, prior=prior, level=level)
    return min_min(images, labels, Victim(victim.network, scores), **how)


def published(**inputs):
    """`train.published`, by a function of this file, so that the cache sees its code."""
    return train.published(through_the_sampler, **inputs)


def noises(c, sets, protection, what, known, epsilon, count):
    """UEs of a protection, at epsilon of 255, that knows a U-Net or (None) no sampler: of several
    seeds, since another noise made in the same way may protect by many points more or less."""
    images, labels = sets["protected"]
    how = c.noise[protection] | dict(epsilon=epsilon / 255)
    if known is None:
        make = train.published
        how["protection"] = PROTECTIONS[protection].make
    else:
        make = published
        how |= dict(prior=known, level=c.sampler["t_star"])
    victim = train.victim_of(c, "classifier", sets)
    ues = []
    for k in range(count):
        other, name = of_seed(c, f"owner-{epsilon:g}-{slug(what)}", k)
        made = train.cached(other, name, make, images=images, labels=labels, victim=victim,
                            seed=other.seed, **how)
        ues.append(le.as_float(made["images"]))
    return ues


def known_priors(c, images, net):
    """{what the owner knows: the U-Net that his noise must survive}."""
    return {
        "as before": None,
        "knows the sampler": prior(c, "owner-prior", images),
        "knows its U-Net": net}


def owner(c, sets, count, protection="em-class"):
    """Does noise survive that is larger, or knows the sampler? By a U-Net that the owner trains on
    the images before they are protected, or by the unauthorized user's own. Each victim has a
    noise of its own."""
    c.evaluate = "validation"
    net, distance = networks(c, sets)
    images, _ = sets["protected"]
    on_clean = spread(c, "classifier", "clean", images, sets, count)
    ours = le.Sampler(**c.sampler)
    rows = []
    for epsilon in (c.epsilon, 2 * c.epsilon):
        for what, known in known_priors(c, images, net).items():
            key = f"owner-{epsilon:g}-{slug(what)}"
            ues = noises(c, sets, protection, what, known, epsilon, count)
            learnable = repaired_each(c, f"{key}-images", net, distance, ues, ours)
            on_ue = spread_over(c, "classifier", f"{key}-UE", ues, sets, count)
            on_le = spread_over(c, "classifier", f"{key}-LE", learnable, sets, count)
            rows.append({
                "noise": f"{what}, {epsilon:g}/255",
                "PSNR UE": f"{train.psnr(torch.stack(ues), images):.1f} dB",
                "clean": shown(on_clean),
                "UE": shown(on_ue),
                "LE": shown(on_le)})
    return rows


def reply(c, sets, count, protection="em-class"):
    """Do other samplers undo what this one does not? Noise that knows it, and any noise by a U-Net
    that has seen other images; beside them, what they cost where nothing had to be mended. Each
    victim has a noise of its own."""
    c.evaluate = "validation"
    net, distance = networks(c, sets)
    priors = known_priors(c, sets["protected"][0], net)
    cases = {}
    for what in ("as before", "knows the sampler"):
        cases[what] = noises(c, sets, protection, what, priors[what], c.epsilon, count), net
    ues, _ = cases["as before"]
    for what, images in foreign(c, len(sets["unprotected"][0])).items():
        cases[f"U-Net of {what}"] = ues, prior(c, f"shift-{what}", images)
    ours = le.Sampler(**c.sampler)
    otherwise = compared_otherwise(ours)
    rounds, label = (4, "four rounds") if ours.rounds == 1 else (1, "one round")
    samplers = {
        "as it is": ours,
        label: replace(ours, rounds=rounds),
        f"on {otherwise.compare}": otherwise,
        f"{label}, on {otherwise.compare}": replace(otherwise, rounds=rounds)}
    return by_sampler(c, sets, "reply", cases, samplers, distance, count)
