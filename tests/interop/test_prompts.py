"""Images by prompts from a folder that holds no torch: what is drawn, in how many programs."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_folder
from rich.console import Console

from jdiff import cli, grids, guidance, interop, sample, solvers
from jdiff.errors import UserError
from jdiff.interop.pipeline import between

KEY = jax.random.key(0)
PROMPTS = ["a cat", "two dogs and a bird", "the sea at night"]
ASKED = {"steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipe(folder):
    return interop.load(folder)


@pytest.fixture
def traced(monkeypatch):
    """How often each network was traced."""
    counts = {}
    for name, method in (("unet", "__call__"), ("vae", "decode"), ("text_encoder", "read")):
        model = tiny_folder.PARTS[name][1]
        monkeypatch.setattr(model, method, _counted(counts, name, getattr(model, method)))
    return counts


def _counted(counts, name, run):
    def counted(self, *args, **options):
        counts[name] = counts.get(name, 0) + 1
        return run(self, *args, **options)

    return counted


def test_any_prompts_scale_and_key_are_one_program(pipe, folder, traced, tmp_path):
    first = pipe(KEY, PROMPTS, **ASKED)
    assert first.shape == (3, 16, 16, 3) and first.dtype == jnp.float32
    assert np.abs(first).max() <= 1 and np.std(first) > 0.05
    once = dict(traced)
    others = ["a red sofa", "", "an old man with a hat, painting stars " * 3]
    second = pipe(jax.random.key(1), others, "a bird", steps=3, guidance_scale=5)
    assert np.abs(second - first).max() > 0.1

    # num, batch: the samples are the same, whatever comes with them; the last batch is padded.
    more = pipe(KEY, PROMPTS[:2], num=2, batch=3, **ASKED)
    np.testing.assert_allclose(more[:2], pipe(KEY, [PROMPTS[0]] * 3, **ASKED)[:2], atol=1e-5)
    assert more.shape[0] == 4 and np.abs(more[0] - more[1]).max() > 0.1
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True)
    np.testing.assert_array_equal(first, pipe(KEY, PROMPTS, progress=console, **ASKED))
    assert "3/3" in shown.getvalue()

    # What is saved opens as the same pipeline.
    interop.save(pipe, tmp_path / "copy")
    copy = interop.load(tmp_path / "copy")
    assert copy.index == pipe.index and copy.unread == {}
    np.testing.assert_array_equal(first, copy(KEY, PROMPTS, **ASKED))
    assert traced == once  # in all of these


def test_a_pipeline_is_these_lines(pipe, traced):
    """Texts, a guided denoiser, jdiff's sample over any solver and grid, and the decoder."""
    drawn = pipe(KEY, PROMPTS, solver=solvers.dpmpp_2m(), grid=grids.karras, **ASKED)
    once = dict(traced)

    text = pipe.prompts.encode([*PROMPTS, ""])["text"]
    cond = {"text": text[:3], "null text": jnp.repeat(text[3:], 3, 0)}
    denoise = pipe.denoiser(scale=3.0, null={"text": guidance.per_sample("null text")})
    times = grids.karras(denoise.schedule, 3)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, i), 0))(jnp.arange(3))
    noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 4)))(keys)
    latents = sample(KEY, denoise, x=noise, cond=cond, times=times, solver=solvers.dpmpp_2m())
    images = jnp.clip(pipe.autoencoder.decode(latents), -1, 1)
    np.testing.assert_allclose(images, drawn, atol=1e-5)
    assert traced == once


def test_split_over_devices(pipe):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    drawn = pipe(KEY, PROMPTS, sharding=split, **ASKED)  # three on two devices: padded
    np.testing.assert_allclose(drawn, pipe(KEY, PROMPTS, **ASKED), atol=1e-4)


def test_dtypes_reach_every_part(folder):
    pipe = interop.load(folder, compute="bfloat16", dtype="bfloat16", remat="full")
    assert {part.fields["dtype"] for part in pipe.components.values()} == {"bfloat16"}
    leaves = jax.tree.leaves([part.params for part in pipe.components.values()])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert pipe.network.fields["remat"] == "full"  # of the network that is sampled from alone
    decoded = jax.eval_shape(pipe.autoencoder.decode, jnp.zeros((1, 8, 8, 4)))
    assert decoded.dtype == jnp.float32 and decoded.shape == (1, 16, 16, 3)
    few = interop.load(folder, only=["unet"])
    assert list(few.components) == ["unet"]
    with pytest.raises(UserError, match="text_encoder was not read: load the folder without only="):
        few(KEY, "a cat")


def test_parts_of_a_grid_follow_each_other(pipe):
    times = pipe.sampler.times(10)
    schedule = pipe.sampler.schedule
    first, second = between(times, schedule, 0, 0.6), between(times, schedule, 0.6, 1)
    assert first[-1] == second[0]
    np.testing.assert_array_equal(np.concatenate([first, second[1:]]), times)
    # Told of step 401 and above: denoising_end=0.6 of 1000 steps.
    assert len(first) == 7 and first[-2] - 1 >= 400 > first[-1] - 1
    for start, end, message in ((0.7, 0.2, "0 <= start < end"), (0.98, 0.99, "no step of 10")):
        with pytest.raises(UserError, match=message):
            between(times, schedule, start, end)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts is an empty list"),
        ({"prompts": b"a cat"}, r"prompts: bytes given.*text\.decode\(\)"),
        ({"prompts": ["a", b"b"]}, r"prompts\[1\] is bytes"),
        ({"prompts": 3}, "prompts: int given"),
        ({"negative": ["a"]}, "negative: 1 texts for 3 prompts"),
        ({"size": 17}, r"size=17 x 17: sides are multiples of 2.*the nearest: 16 x 16"),
        ({"size": (0, 16)}, "the nearest: 2 x 16"),
        ({"crop": (0, 0)}, "'crop' given; it has none of its own"),
        ({"texts": {"wieghts": "scale"}}, "Did you mean 'weights'"),
        ({"texts": {"length": 40}}, "a text's length is CLIP's own here"),
        ({"solver": solvers.heun}, "call one"),
    ],
)
def test_what_cannot_be_drawn_is_said(pipe, change, message):
    asked = {"prompts": PROMPTS, **change}
    with pytest.raises(UserError, match=message):
        pipe(KEY, asked.pop("prompts"), asked.pop("negative", None), **{**ASKED, **asked})


def test_folders_that_lack_a_part(folder, tmp_path):
    def broken(name, index=None, without=None):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        path = copy / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (index or {})))
        if without:
            shutil.rmtree(copy / without)
        return copy

    for name, arguments, message in (
        ("a", {"without": "vae"}, "vae is missing: model_index.json names it"),
        ("b", {"without": "text_encoder"}, "text_encoder is missing"),
        ("c", {"without": "tokenizer"}, "tokenizer is missing: text_encoder reads"),
        (
            "d",
            {"index": {"_class_name": "StableDifusionPipeline"}},
            "mean 'StableDiffusionPipeline'",
        ),
        ("e", {"index": {"text_encoder": ["x", "CLIPTextModl"]}}, "Did you mean 'CLIPTextModel'"),
        ("f", {"index": {"vae": [None, None]}}, "names no vae"),
        ("g", {"without": "scheduler"}, "scheduler_config.json is not there"),
    ):
        with pytest.raises(UserError, match=message):
            interop.load(broken(name, **arguments))(KEY, "a cat", **ASKED)
    other = broken("h")
    tokens = other / "tokenizer" / "vocab.json"
    vocab = json.loads(tokens.read_text())
    tokens.write_text(json.dumps(vocab | {f"new{i}": len(vocab) + i for i in range(20)}))
    with pytest.raises(UserError, match="does not fit its encoder"):
        interop.load(other)(KEY, "a cat", **ASKED)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jdiff.cache.enable", lambda: None)
    out, model = tmp_path / "grid.png", f"--model={folder}"
    words = ["generate", *PROMPTS, model, "--steps=3", "--guidance_scale=3", f"--out={out}"]
    assert cli.main(words) == 0
    assert out.read_bytes()[:4] == b"\x89PNG" and str(out) in capsys.readouterr().out.replace(
        "\n", ""
    )
    for more, message in (
        (["--solver=dpmp_2m"], "Did you mean 'dpmpp_2m'"),
        (["--grid=karas"], "Did you mean 'karras'"),
        (["--size=big"], "a size is 512, or 512x768"),
        (["--solver_args=eta=1"], "give --solver=NAME too"),
        (["--negative"], "expected one argument"),
        (["--out=a.jpg"], "must end in .png"),
        (["--size=15"], "multiples of 2"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["generate", "a cat", f"--model={tmp_path / 'none'}"]) == 2
    assert "is not a folder" in capsys.readouterr().err
