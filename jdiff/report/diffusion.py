"""What the page of a denoiser's run says that pages of other kinds do not."""

import json

from jdiff.report.facts import Facts
from jdiff.report.words import Words


def page(facts: Facts) -> Words:
    """The words of a denoiser's run, or of a super-resolution stage's."""
    config, data = facts.config_of, facts.run.get("data", {})
    classes = data.get("num_classes")
    latent = bool((data.get("encoded") or {}).get("autoencoder"))
    enlarges = config.get("low_res.factor") is not None
    same = (
        "held-out images: input enlarged, sample, truth; the same noise at every step"
        if enlarges else "the same noise and labels at every step"
    )  # fmt: skip
    name = str(facts.workdir)
    return Words(
        parts=(config.get("model.name"), config.get("schedule.name")),
        same=same,
        python=_enlarge(name) if enlarges else _sample(name, classes, latent),
        commands=(("draw samples", "sample"),),
    )


def _sample(workdir: str, classes: int | None, latent: bool) -> str:
    guided = ', guidance={"scale": 2.0}' if classes else ""
    cond = f',\n           cond={{"label": jax.numpy.arange(64) % {classes}}}' if classes else ""
    return (
        "import jax, jdiff\n"
        "from jdiff import runs, sample\n\n"
        f"run = jdiff.load_run({json.dumps(workdir)})\n"
        f"denoise, solver, times = runs.sampler(run{guided})\n"
        "x = sample(jax.random.key(0), denoise, solver=solver, times=times,\n"
        f"           shape=run.info.shape, num=64{cond})"
        + ("\nimages = run.autoencoder.decode(x)" if latent else "")
    )


def _enlarge(workdir: str) -> str:
    return (
        "import jdiff\n"
        "from jdiff import generate, real\n\n"
        f"run = jdiff.load_run({json.dumps(workdir)})\n"
        "upsample, batch = generate.upsampler(run)\n"
        'rows = real.rows(run, real.source(run, "held-out"), batch=batch)\n'
        "some = next(generate.enlarged(run, rows, upsample, batch))  # .large, .sample, .truth"
    )
