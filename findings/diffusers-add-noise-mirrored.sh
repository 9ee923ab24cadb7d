#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0: scheduler.add_noise(images, noise, t), the first step of diffusion purification and of training.
#
# Every scheduler here has the default schedule (linear, 1000 steps), so t means one noise strength.
# GUESS, before running: sqrt(kept) * image + sqrt(1 - kept) * noise, kept = alphas_cumprod[t], from every scheduler, to 1 %. (And,
# written down before set_timesteps was tried: the same after it, or an error for a t outside its list.)
# BEHAVIOUR: DDPM and DDIM do so. A fresh DPMSolverMultistep, UniPC or DEIS adds the noise of 999 - t: its timesteps run down, its sigmas
# up, until set_timesteps is called. At t = 1 the image is gone; at t = 998 it is hardly touched. After set_timesteps(50), any t that is
# not one of the fifty gets the noise of the smallest, t = 20 (the image at t = 900 has 10 levels of 255 of noise, not 127); Euler raises
# IndexError for it. No warning, no log line; after set_timesteps(1000) t = 1..999 are right. A comment in add_noise names training as the use
# where set_timesteps is not called; pull request 6006 of huggingface/diffusers made that run. No issue on it was found.
# OUTPUT SEEN:
#   diffusers 0.42.1 torch 2.13.0+cpu
#   noise in levels of 255, by hand            t=1: 1.9 t=10: 6.0 t=50: 22.1 t=100: 41.3 t=500: 122.4 t=900: 127.5 t=998: 127.5
#   DDPM, fresh                                t=1: 1.9 t=10: 6.0 t=50: 22.1 t=100: 41.3 t=500: 122.4 t=900: 127.5 t=998: 127.5
#   DDPM, set_timesteps(50)                    t=1: 1.9 t=10: 6.0 t=50: 22.1 t=100: 41.3 t=500: 122.4 t=900: 127.5 t=998: 127.5
#   DDIM, fresh                                t=1: 1.9 t=10: 6.0 t=50: 22.1 t=100: 41.3 t=500: 122.4 t=900: 127.5 t=998: 127.5
#   DDIM, set_timesteps(50)                    t=1: 1.9 t=10: 6.0 t=50: 22.1 t=100: 41.3 t=500: 122.4 t=900: 127.5 t=998: 127.5
#   DPMSolverMultistep, fresh                  t=1: 127.5 t=10: 127.5 t=50: 127.5 t=100: 127.5 t=500: 122.4 t=900: 40.9 t=998: 1.9
#   DPMSolverMultistep, set_timesteps(50)      t=1: 10.1 t=10: 10.1 t=50: 10.1 t=100: 41.3 t=500: 122.4 t=900: 10.1 t=998: 10.1
#   UniPCMultistep, fresh                      t=1: 127.5 t=10: 127.5 t=50: 127.5 t=100: 127.5 t=500: 122.4 t=900: 40.9 t=998: 1.9
#   UniPCMultistep, set_timesteps(50)          t=1: 10.1 t=10: 10.1 t=50: 10.1 t=100: 41.3 t=500: 122.4 t=900: 10.1 t=998: 10.1
#   DEISMultistep, fresh                       t=1: 127.5 t=10: 127.5 t=50: 127.5 t=100: 127.5 t=500: 122.4 t=900: 40.9 t=998: 1.9
#   DEISMultistep, set_timesteps(50)           t=1: 10.1 t=10: 10.1 t=50: 10.1 t=100: 41.3 t=500: 122.4 t=900: 10.1 t=998: 10.1
#   smallest of the fifty: t = 20 ; timesteps outside the list that get its noise: 950
#   EulerDiscrete, set_timesteps(50), t=900: IndexError: index 0 is out of bounds for dimension 0 with size 0
#   as described: noise of 999 - t before set_timesteps, of the smallest t for 950 of 1000 after it, in silence
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 HF_HOME=$tmp/hf HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq --no-compile diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 pillow==13.0.0
cat > "$tmp/check.py" <<'PY'
import logging, warnings
import torch
import diffusers
from diffusers import (DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler,
                       UniPCMultistepScheduler)

print("diffusers", diffusers.__version__, "torch", torch.__version__)
spoken = []                                                                         # whatever the library says while it adds noise
class Ear(logging.Handler):
    def emit(self, record):
        spoken.append(record.getMessage())
logging.getLogger("diffusers").addHandler(Ear())

every = torch.arange(1000)
kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
by_hand = torch.stack([kept.sqrt(), (1 - kept).sqrt()], 1)                          # what is left of the image, how much noise
one, none = torch.ones(1000, 1), torch.zeros(1000, 1)

def factors(scheduler, ts=every):
    n = len(ts)
    del spoken[:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = torch.cat([scheduler.add_noise(one[:n], none[:n], ts), scheduler.add_noise(none[:n], one[:n], ts)], 1).double()
    assert not spoken and not caught, (spoken, caught)
    return got

shown = [1, 10, 50, 100, 500, 900, 998]
def show(what, table):
    print(f"{what:42}", *(f"t={t}: {127.5 * table[t, 1]:.1f}" for t in shown))
def near(a, b):
    return (a - b).abs().max() < 1e-3

show("noise in levels of 255, by hand", by_hand)
for make in (DDPMScheduler, DDIMScheduler):
    for steps in (None, 50):
        scheduler = make()
        if steps:
            scheduler.set_timesteps(steps)
        show(f"{make.__name__[:-9]}, " + (f"set_timesteps({steps})" if steps else "fresh"), factors(scheduler))
        assert near(factors(scheduler), by_hand)
for make in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler):
    name, scheduler = make.__name__[:-9], make()
    assert near(scheduler.alphas_cumprod, kept)
    fresh = factors(scheduler)
    show(f"{name}, fresh", fresh)
    assert near(fresh, by_hand.flip(0)) and not near(fresh, by_hand)
    scheduler.set_timesteps(1000)
    assert near(factors(scheduler)[1:], by_hand[1:])                                # its list leaves out t = 0
    scheduler.set_timesteps(50)
    fifty = factors(scheduler)
    show(f"{name}, set_timesteps(50)", fifty)
    listed = torch.isin(every, scheduler.timesteps)
    last = scheduler.timesteps[-1]
    assert listed.sum() == 50 and near(fifty[listed], by_hand[listed]) and near(fifty[~listed], by_hand[last].expand(950, 2))
print("smallest of the fifty: t =", last.item(), "; timesteps outside the list that get its noise:", (~listed).sum().item())
euler = EulerDiscreteScheduler()
euler.set_timesteps(50)
try:
    euler.add_noise(one[:1], none[:1], torch.tensor([900]))
    raise SystemExit("Euler takes it now")
except IndexError as error:
    print("EulerDiscrete, set_timesteps(50), t=900: IndexError:", error)
print("as described: noise of 999 - t before set_timesteps, of the smallest t for 950 of 1000 after it, in silence")
PY
"$tmp/venv/bin/python" "$tmp/check.py"
