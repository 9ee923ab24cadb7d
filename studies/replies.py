"""Other victims, an owner who answers, and noise that all images share: `python -m
studies.scenarios` victims, owner, reply or mean."""
from dataclasses import replace

import torch

import le
import train
from attacks import PROTECTIONS, publish
from perceptual import psnr
from unet import DEVICE, as_float, on_device
from studies.opponents import contrastive, encoder, through_the_sampler
from studies.prior import foreign, prior
from studies.run import (accuracies_on, by_sampler, compared_otherwise, judged, networks, of_seed,
                         repaired_each, shown, slug, spread, spread_over, versions)


# -- Victims that the protection did not expect ----------------------------------------------------

def opponents(c, sets):
    """{name: (kind, victim)}. Transformers take time, small steps."""
    classifier = train.victim_of(c, "classifier")
    simclr = train.victim_of(c, "simclr")
    config = classifier.config | dict(size=c.size, kind="plain")
    plain = replace(classifier, network=encoder, config=config)
    transformer = replace(plain, config=config | dict(kind="transformer"))
    probed = replace(simclr, network=contrastive, config=config)
    patient = plain.training | dict(epochs=2 * plain.training["epochs"], lr=0.05)
    return {
        "plain network": ("classifier", plain),
        "transformer": ("classifier", replace(transformer, training=patient)),
        "SimCLR, plain network": ("simclr", probed)}


def victims(c, sets, count):
    """Noise is made against a ResNet; does it hold against others, and do LEs help them?"""
    c.evaluate = "validation"
    rows = []
    for name in c.protections:
        found = versions(c, name, sets)
        kind = train.kind_of(c, name)
        surrogate = accuracies_on(c, kind, name, found, sets, count)
        rows.append({"victim": f"ResNet, {name}"} | surrogate)
        for other, (learns, victim) in opponents(c, sets).items():
            if learns != kind:
                continue
            row = {"victim": f"{other}, {name}"}
            for what, images in found.items():
                version = what if what == "clean" else f"{name}-{what.lower()}"
                key = f"victims-{slug(other)}-{version}"
                row[what] = shown(judged(c, key, victim, images, sets, count))
            rows.append(row)
    return rows


# -- The owner answers -----------------------------------------------------------------------------

def noises(c, sets, what, known, epsilon, count):
    """UEs of em-class, at epsilon of 255, that knows a U-Net or (None) no sampler: of several
    seeds, since another noise made in the same way may protect by many points more or less."""
    images, labels = sets["protected"]
    how = c.noise["em-class"] | dict(epsilon=epsilon / 255)
    make = PROTECTIONS["em-class"].make
    if known is not None:
        make = through_the_sampler
        how |= dict(prior=known, level=c.sampler["t_star"])
    victim = replace(train.victim_of(c, "classifier"), training={})
    ues = []
    for k in range(count):
        other, name = of_seed(c, f"owner-{epsilon:g}-{slug(what)}", k)
        made = train.cached(other, name, make, images=on_device(images), labels=labels.to(DEVICE),
                            victim=victim, seed=other.seed, **how)
        ues.append(as_float(made["images"]))
    return ues


def known_priors(c, images, net):
    """{what the owner knows: the U-Net that his noise must survive}."""
    return {
        "as before": None,
        "knows the sampler": prior(c, "owner-prior", images),
        "knows its U-Net": net}


def owner(c, sets, count):
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
            ues = noises(c, sets, what, known, epsilon, count)
            learnable = repaired_each(c, f"{key}-images", net, distance, ues, ours)
            on_ue = spread_over(c, "classifier", f"{key}-UE", ues, sets, count)
            on_le = spread_over(c, "classifier", f"{key}-LE", learnable, sets, count)
            rows.append({
                "noise": f"{what}, {epsilon:g}/255",
                "PSNR UE": f"{psnr(torch.stack(ues), images):.1f} dB",
                "clean": shown(on_clean),
                "UE": shown(on_ue),
                "LE": shown(on_le)})
    return rows


def reply(c, sets, count):
    """Do other samplers undo what this one does not? Noise that knows it, and any noise by a U-Net
    that has seen other images; beside them, what they cost where nothing had to be mended. Each
    victim has a noise of its own."""
    c.evaluate = "validation"
    net, distance = networks(c, sets)
    priors = known_priors(c, sets["protected"][0], net)
    cases = {}
    for what in ("as before", "knows the sampler"):
        cases[what] = noises(c, sets, what, priors[what], c.epsilon, count), net
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


# -- What all protected images share ---------------------------------------------------------------

def unshared(ue, unprotected):
    """UEs (N, 3, H, W) less the image by which their mean differs from that of other images, as 8
    bits: a perturbation that all of them bear is that difference, nearly."""
    return publish(ue, unprotected.mean(0) - ue.mean(0))


def mean(c, sets, count):
    """Does it take a network to undo noise that all images share? One mean image, taken away."""
    rows = []
    for name in c.protections:
        found = versions(c, name, sets)
        found["less the mean"] = unshared(found["UE"], sets["unprotected"][0])
        kind = train.kind_of(c, name)
        rows.append({"protection": name} | accuracies_on(c, kind, name, found, sets, count))
    return rows
