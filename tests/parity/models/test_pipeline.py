"""Whole folders against diffusers: ten guided steps from the same noise and conditions.

DiT's pipeline runs as it is, but for the autoencoder's decoding; those of Stable Diffusion and of
SD3 import transformers, so their loops are written out here.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    assert_same_files,
    channels_first,
    channels_last,
    distance,
    images,
    randomise,
)
from peers import peer

from jdiff import interop
from jdiff.errors import UserError

torch = peer("torch")
diffusers = peer("diffusers")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

STEPS, SCALE = 10, 4.0
KEY = jax.random.key(0)
NOISE = images(2, 8, 8, 4, seed=7)
TEXT, EMPTY = images(2, 5, 12, seed=1), images(1, 5, 12, seed=2)
POOLED, NO_POOLED = images(2, 10, seed=3), images(1, 10, seed=4)


def _folder(path, name, network, scheduler):
    """A pipeline's folder without its encoders."""
    network.save_pretrained(path / name)
    scheduler.save_pretrained(path / "scheduler")
    index = {
        "_class_name": "AnyPipeline",
        name: ["diffusers", type(network).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "requires_safety_checker": True,
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def _run(scheduler, call):
    """diffusers' loop: the null and the condition in one batch."""
    x = channels_first(NOISE) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            null, cond = call(both, t.expand(4)).chunk(2)
            x = scheduler.step(null + SCALE * (cond - null), t, x).prev_sample
    return channels_last(x)


def _two(null, cond):
    return torch.tensor(np.concatenate([np.repeat(null, 2, 0), cond]))


def test_stable_diffusion(tmp_path):
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, sample_size=8,
        attention_head_dim=2, cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
    folder = _folder(tmp_path, "unet", randomise(unet, std=0.05), scheduler)
    scheduler.set_timesteps(STEPS)
    text = _two(EMPTY, TEXT)
    theirs = _run(scheduler, lambda x, t: unet(x, t, text).sample)

    pipeline = interop.load(folder)
    assert pipeline.unread == {} and pipeline.shape() == (8, 8, 4)
    ours = pipeline.sample(
        KEY, {"text": TEXT}, null={"text": EMPTY}, scale=SCALE, steps=STEPS, noise=NOISE
    )
    assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("dynamic", [False, True])
def test_stable_diffusion_3(dynamic, tmp_path):
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=6, num_layers=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    folder = _folder(tmp_path, "transformer", randomise(network), scheduler)
    mu = 0.5 + (16 - 256) * 0.65 / (4096 - 256)  # of 4 x 4 tokens
    scheduler.set_timesteps(STEPS, **({"mu": mu} if dynamic else {}))
    scheduler.init_noise_sigma, scheduler.scale_model_input = 1.0, lambda x, t: x
    text, pooled = _two(EMPTY, TEXT), _two(NO_POOLED, POOLED)
    theirs = _run(scheduler, lambda x, t: network(x, text, pooled, t).sample)

    pipeline = interop.load(folder)
    ours = pipeline.sample(
        KEY, {"text": TEXT, "pooled": POOLED}, null={"text": EMPTY, "pooled": NO_POOLED},
        scale=SCALE, steps=STEPS, noise=NOISE,
    )  # fmt: skip
    assert distance(ours, theirs) < 1e-4


@pytest.fixture
def dit(tmp_path):
    """`(DiT's pipeline, its folder)`: a learned variance, and an autoencoder."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
    pipeline = diffusers.DiTPipeline(
        randomise(network, std=0.05), vae, diffusers.DDIMScheduler(clip_sample=False)
    )
    pipeline.save_pretrained(tmp_path / "theirs")
    return pipeline, tmp_path / "theirs"


def test_dits_pipeline(dit, monkeypatch):
    theirs, folder = dit
    found = []
    decode = lambda x: found.append(x) or types.SimpleNamespace(sample=x)
    theirs.vae.decode = decode
    where = f"{type(theirs).__module__}.randn_tensor"
    monkeypatch.setattr(where, lambda **_: channels_first(NOISE))
    theirs.set_progress_bar_config(disable=True)
    labels = [3, 999]
    theirs(labels, guidance_scale=SCALE, num_inference_steps=STEPS, output_type="pt")

    pipeline = interop.load(folder)
    assert pipeline.unread == {} and list(pipeline.components) == ["transformer", "vae"]
    ours = pipeline.sample(
        KEY, {"label": jnp.asarray(labels)}, null={"label": 1000}, scale=SCALE, steps=STEPS,
        noise=NOISE,
    )  # fmt: skip
    assert distance(ours / theirs.vae.config.scaling_factor, channels_last(found[0])) < 1e-4


def test_a_saved_pipeline_is_what_was_read_and_opens_there(dit, tmp_path):
    theirs, folder = dit
    pipeline = interop.load(folder)
    interop.save(pipeline, tmp_path / "ours")
    assert_same_files(tmp_path / "ours" / "transformer", folder / "transformer")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        one, other = ((f / name).read_text() for f in (tmp_path / "ours", folder))
        assert json.loads(one) == json.loads(other)
    back = diffusers.DiTPipeline.from_pretrained(tmp_path / "ours")
    assert back.scheduler.to_json_string() == theirs.scheduler.to_json_string()
    for one, other in ((back.vae, theirs.vae), (back.transformer, theirs.transformer)):
        for key, value in other.state_dict().items():
            assert torch.equal(value, one.state_dict()[key]), key


def test_what_a_pipeline_lacks_is_said(dit, tmp_path):
    _, folder = dit
    pipeline = interop.load(folder)
    with pytest.raises(UserError, match="scale=4.0 needs null="):
        pipeline.denoiser(scale=4.0)
    with pytest.raises(UserError, match="neither a model_index.json"):
        interop.load(tmp_path)
    assert isinstance(interop.load(folder / "transformer"), interop.Component)
    index = json.loads((folder / "model_index.json").read_text())
    for change, message in (
        ({"transformer": ["diffusers", "DiTTransformer3DModel"]}, "Did you mean 'DiTTransformer2D"),
        ({"transformer": [None, None]}, "neither a unet nor a transformer"),
        ({"scheduler": [None, None]}, "no scheduler"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=message):
            interop.load(folder)
