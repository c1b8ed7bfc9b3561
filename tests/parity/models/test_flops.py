"""The FLOP counter against PyTorch's, on diffusers' network of the same shape; nothing is run."""

import jax
import pytest
from peers import peer

from jdiff import models
from jdiff.models.cond_unet import CondUNet, sd15
from jdiff.models.flops import flops, training_flops

torch, diffusers = peer("torch"), peer("diffusers")
flop_counter = peer("torch.utils.flop_counter")


@pytest.mark.parametrize("training", [False, True])
def test_stable_diffusion_takes_as_many_operations(training):
    with torch.device("meta"), flop_counter.FlopCounterMode(display=False) as theirs:
        network = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text = torch.zeros(2, 77, 768)
        y = network(torch.zeros(2, 4, 64, 64), torch.zeros(2), text).sample
        if training:
            y.sum().backward()
    apply, params = models.abstract(lambda rngs: CondUNet(**sd15(), rngs=rngs))
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
    inputs = shape(2, 64, 64, 4), shape(2), {"text": shape(2, 77, 768)}
    count = training_flops if training else flops
    assert count(apply, params, *inputs) == theirs.get_total_flops()
