"""Networks against the same in PyTorch and in bare jax: forward, train step, compile time, loading.

    python benchmarks/models.py
    python benchmarks/models.py --only dit-s/2 compile loading
    python benchmarks/models.py --quick          # tiny, in seconds: a DiT, and loading

A rival's row is jdiff's time over the rival's: at most 1.4 for PyTorch (diffusers, same threads on
CPU; torch.compile and bfloat16 on GPU), at most 1.05 for bare jax (benchmarks/bare.py, whose
outputs are first compared with jdiff's). On CPU depths and images are reduced, in float32; a GPU
runs the published sizes in bfloat16 with cuDNN's attention, and tells the model FLOPs utilisation.
A train step is the loss, its gradient and AdamW. PyTorch's rows are left out without the extra
`parity`.
"""

import argparse
import dataclasses
import functools
import gc
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import bare
import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import race, table, verdict

from jdiff import models
from jdiff.interop import component, load_component, save_component
from jdiff.interop.families import BY_CLASS
from jdiff.models.cond_unet import CondUNet, sd15
from jdiff.models.flops import PEAKS, mfu, training_flops
from jdiff.models.mmdit import MMDiT, sd3_medium

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch a share
GPU = jax.default_backend() == "gpu"
DTYPE = jnp.bfloat16 if GPU else jnp.float32
OPTIMIZER = optax.adamw(1e-4)
LIMITS = {"PyTorch": 1.4, "bare jax": 1.05}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network of a size, and its rivals."""

    module: type
    fields: dict[str, Any]
    shape: tuple[int, ...]  # of x
    cond: dict[str, tuple[int, ...]]  # shapes without the batch
    bare: Callable
    peer: str  # diffusers' class
    call: Callable[..., Any]  # (their network, x, t, cond) -> their output
    kernel: str = "xla"  # of attention, on CPU

    def build(self, rngs):
        """The module."""
        return self.module(**self.fields, dtype=DTYPE, rngs=rngs)

    def inputs(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """x, t and cond."""
        random, batch = np.random.default_rng(0), self.shape[0]
        normal = lambda *shape: random.normal(size=shape).astype(np.float32)
        cond = {name: normal(batch, *shape) for name, shape in self.cond.items()}
        if "label" in cond:
            cond["label"] = random.integers(0, self.fields["num_classes"], batch).astype(np.int32)
        return normal(*self.shape), random.integers(1, 999, batch).astype(np.float32), cond


def dit(name: str, batch: int, size: int = 32, **changes) -> Case:
    fields = models.dit_imagenet(name, **changes)
    call = lambda net, x, t, cond: net(x, timestep=t.long(), class_labels=cond["label"].long())
    return Case(
        models.DiT, fields, (batch, size, size, 4), {"label": ()}, bare.dit,
        "DiTTransformer2DModel", call,
    )  # fmt: skip


def adm(batch: int, size: int = 64, **changes) -> Case:
    fields = models.adm_imagenet64(dropout=0.0) | changes
    call = lambda net, x, t, cond: net(x, t, class_labels=cond["label"].long())
    return Case(
        models.UNet, fields, (batch, size, size, 3), {"label": ()}, bare.adm, "UNet2DModel", call
    )


def sd(batch: int, size: int = 64, kernel: str = "xla", **changes) -> Case:
    fields = sd15(**{"widths": (320, 640, 1280, 1280)} | changes)
    call = lambda net, x, t, cond: net(x, t, cond["text"])
    cond = {"text": (77, fields["text_width"])}
    return Case(
        CondUNet, fields, (batch, size, size, 4), cond, bare.sd, "UNet2DConditionModel", call,
        kernel,
    )  # fmt: skip


def sd3(batch: int, size: int = 128, length: int = 333, kernel: str = "xla", **changes) -> Case:
    fields = sd3_medium() | {"patch": 2, "image_size": 128, "positions": 192}
    fields |= {"text_width": 4096, "pooled_width": 2048} | changes
    call = lambda net, x, t, cond: net(x, cond["text"], cond["pooled"], t)
    cond = {"text": (length, fields["text_width"]), "pooled": (fields["pooled_width"],)}
    return Case(
        MMDiT, fields, (batch, size, size, 16), cond, bare.mmdit, "SD3Transformer2DModel", call,
        kernel,
    )  # fmt: skip


def quick_cases() -> dict[str, Case]:
    """Tiny ones: that everything runs, and that the bare networks compute the same."""
    small = {"width": 64, "heads": 2}
    text = {"text_width": 32, "pooled_width": 16}
    return {
        "unet-sd15": sd(1, 16, widths=(32, 64), depths=(1, 0), heads=(8, 8), text_width=32),
        "unet-adm64": adm(
            1, 16, image_size=16, channels=128, multipliers=(1, 1), blocks=1, attention_sizes=(8,)
        ),
        "dit-s/2": dit("S/2", 1, 8, depth=2, **small),
        "dit-xl/2": dit("XL/2", 1, 8, depth=2, scan=True, **small),
        "mmdit-sd3": sd3(1, 16, 5, depth=2, **small, **text),
    }


def cpu_cases() -> dict[str, Case]:
    """Published widths, but for the U-Nets; few blocks, few images."""
    return {
        "unet-sd15": sd(2, 32, widths=(128, 256, 512, 512), kernel="by_head"),
        "unet-adm64": adm(2, channels=128, blocks=1),
        "dit-s/2": dit("S/2", 4),
        "dit-b/2": dit("B/2", 4, depth=6),
        "dit-xl/2": dit("XL/2", 2, depth=4),
        "mmdit-sd3": sd3(2, 24, 77, depth=2),
    }


def gpu_cases() -> dict[str, Case]:
    """Published sizes."""
    return {
        "unet-sd15": sd(16),
        "unet-adm64": adm(64),
        "dit-s/2": dit("S/2", 256),
        "dit-b/2": dit("B/2", 256),
        "dit-xl/2": dit("XL/2", 128),
        "mmdit-sd3": sd3(8),
    }


def with_kernel(apply: models.Apply, case: Case) -> models.Apply:
    kernel = "cudnn" if GPU else case.kernel
    return apply if kernel == "xla" else apply.with_attention(kernel)


def make_step(apply: Callable) -> Callable:
    """A train step ((params, opt), inputs, target) -> (params, opt), donated."""

    def step(state, inputs, target):
        params, opt = state
        loss = lambda params: jnp.mean(jnp.square(apply(params, *inputs) - target))
        updates, opt = OPTIMIZER.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, updates), opt

    return jax.jit(step, donate_argnums=0)


def trainer(apply: Callable, params: Any, inputs: tuple, target: np.ndarray) -> Callable:
    """Calls without arguments that each take a train step."""
    step, params = make_step(apply), jax.tree.map(jnp.copy, params)
    held = [(params, OPTIMIZER.init(params))]

    def run():
        held[0] = step(held[0], inputs, target)
        return jax.tree.leaves(held[0])[0]

    return run


def peer(case: Case) -> tuple[Callable, Callable]:
    """(forward, train step) of diffusers' network, as calls without arguments."""
    import diffusers
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    f, cls = case.fields, getattr(diffusers, case.peer)
    if case.module is models.DiT:
        config = {"num_attention_heads": f["heads"], "num_layers": f["depth"]}
        config |= {"attention_head_dim": f["width"] // f["heads"], "sample_size": case.shape[1]}
        config |= {"in_channels": 4, "out_channels": 8, "patch_size": f["patch"]}
    else:
        config = BY_CLASS[case.peer].config(f)
    device = torch.device("cuda" if GPU else "cpu")
    network = cls.from_config(config).to(device)
    x, t, cond = jax.tree.map(lambda a: torch.from_numpy(a).to(device), case.inputs())
    x = x.permute(0, 3, 1, 2).contiguous()
    if GPU:
        torch.set_float32_matmul_precision("high")
        network = torch.compile(network)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=GPU)
    half = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=GPU)
    wait = torch.cuda.synchronize if GPU else lambda: None

    def forward():
        with torch.no_grad(), half():
            case.call(network, x, t, cond)
        wait()

    def step():
        optimizer.zero_grad()
        with half():
            out = case.call(network, x, t, cond).sample.float()
        out.square().mean().backward()
        optimizer.step()
        wait()

    return forward, step


def rows_of(name: str, case: Case, rounds: int) -> list[tuple[str, str, str, str]]:
    """jdiff's rows against both rivals."""
    inputs = jax.tree.map(jnp.asarray, case.inputs())
    apply, params = models.init(case.build, jax.random.key(0))
    apply, by_hand = (
        with_kernel(apply, case),
        functools.partial(case.bare, case.fields, dtype=DTYPE),
    )
    # Nothing may hide behind weights that start at zero.
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda w: w + 0.02 * jnp.asarray(random.standard_normal(w.shape, np.float32)), params
    )
    ours, hand = jax.jit(apply), jax.jit(by_hand)
    out = np.asarray(ours(params, *inputs))
    error = np.abs(out - np.asarray(hand(params, *inputs))).max() / np.abs(out).max()
    if not error < (0.05 if GPU else 1e-3):
        raise SystemExit(f"{name}: the bare network differs by {error:.1e}")
    target = np.zeros_like(out)
    forward = {"jdiff": lambda: ours(params, *inputs), "bare jax": lambda: hand(params, *inputs)}
    train = {
        "jdiff": lambda: trainer(apply, params, inputs, target),
        "bare jax": lambda: trainer(by_hand, params, inputs, target),
    }
    try:
        forward["PyTorch"], their_step = peer(case)
        train["PyTorch"] = lambda: their_step
    except ImportError as error:
        print(f"left out: PyTorch ({error})")
    rows = []
    for what in ("forward", "train step"):
        if what == "forward":
            seconds = race(forward, rounds)
        elif GPU:  # one after the other: it holds the states of one of them, and its times are calm
            seconds = {}
            for rival, make in train.items():
                seconds |= race({rival: make()}, rounds)
                gc.collect()
        else:
            seconds = race({rival: make() for rival, make in train.items()}, rounds)
        for rival in list(seconds)[1:]:
            ratio, limit = seconds["jdiff"] / seconds[rival], LIMITS[rival]
            ms = f"{1e3 * seconds['jdiff']:.3g} / {1e3 * seconds[rival]:.3g} ms"
            rows.append((f"{name} {what}: jdiff / {rival} ({ms})", f"{ratio:.3f}", str(limit),
                         verdict(ratio, limit)))  # fmt: skip
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    if peak := next((chip for chip in PEAKS if chip in kind), None):
        plain = models.abstract(case.build)[0]
        used = mfu(training_flops(plain, params, *inputs), seconds["jdiff"], peak)
        limit, judged = "", ""
        if name == "dit-xl/2":
            limit, judged = "at least 50%", verdict(used, 0.5, at_least=True)
        rows.append((f"{name} train step: MFU", f"{used:.1%}", limit, judged))
    return rows


def compile_rows(quick: bool) -> list[tuple[str, str, str, str]]:
    """What the compilation of a deep scanned train step takes over that of a shallow one."""
    jax.config.update("jax_enable_compilation_cache", False)
    seconds = {}
    for name in ("S/2", "XL/2"):
        changes = {"width": 64, "heads": 2} if quick else {}
        case = dit(name, 4, scan=True, **changes)
        apply, params = models.abstract(case.build)
        state = (params, jax.eval_shape(OPTIMIZER.init, params))
        target = jax.ShapeDtypeStruct((*case.shape[:-1], 8), jnp.float32)
        seconds[name] = math.inf
        for _ in range(2 if quick else 3):  # the first of all also warms jax up
            jax.clear_caches()
            start = time.perf_counter()
            make_step(with_kernel(apply, case)).lower(state, case.inputs(), target).compile()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    ratio = seconds["XL/2"] / seconds["S/2"]
    what = f"compile time of a scanned train step: DiT-XL/2 / DiT-S/2 ({seconds['XL/2']:.1f} / "
    return [(f"{what}{seconds['S/2']:.1f} s)", f"{ratio:.2f}", "1.5", verdict(ratio, 1.5))]


def loading_rows(quick: bool, rounds: int) -> list[tuple[str, str, str, str]]:
    """What opening a checkpoint takes over reading its bytes and copying them once."""
    widths = (32, 64, 64, 64) if quick else (192, 384, 704, 704)  # 1.1 GB in float32
    fields = sd15(widths=widths)
    _, shapes = models.abstract(lambda rngs: CondUNet(**fields, rngs=rngs))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
    with tempfile.TemporaryDirectory() as folder:
        save_component(component("UNet2DConditionModel", params, **fields), folder)
        files = list(pathlib.Path(folder).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        del params
        gc.collect()

        def raw():
            return [np.fromfile(file, np.uint8).copy() for file in files]

        seconds = race({"raw": raw, "jdiff": lambda: load_component(folder).params}, rounds)
    rate = {who: size / s / 1e9 for who, s in seconds.items()}
    share = rate["jdiff"] / rate["raw"]
    what = f"loading {size / 1e9:.2f} GB over reading and copying it ({rate['jdiff']:.2f} / "
    judged = ("", "") if quick else ("at least 70%", verdict(share, 0.7, at_least=True))
    return [(f"{what}{rate['raw']:.2f} GB/s)", f"{share:.0%}", *judged)]


def main() -> None:
    cases = gpu_cases() if GPU else cpu_cases()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*cases, "compile", "loading"]
    p.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    p.add_argument("--only", nargs="+", choices=names, help="these rows")
    p.add_argument("--rounds", type=int, default=5, help="repetitions, the best counts (default 5)")
    a = p.parse_args()
    cases, rounds = (quick_cases(), 1) if a.quick else (cases, a.rounds)
    chosen = a.only or (["dit-s/2", "loading"] if a.quick else names)
    for name in chosen:
        if name in cases:
            title = f"{name}, x {list(cases[name].shape)}, {jnp.dtype(DTYPE).name}"
            table(title, rows_of(name, cases[name], rounds))
            gc.collect()
    rows = compile_rows(a.quick) if "compile" in chosen else []
    rows += loading_rows(a.quick, rounds) if "loading" in chosen else []
    if rows:
        table("compilation and loading", rows)


if __name__ == "__main__":
    main()
