"""Every field of an autoencoder's config, with its default; a file in configs/ edits it."""

import ml_collections
from ml_collections import config_dict

from jdiff.defaults import common


def defaults() -> ml_collections.ConfigDict:
    """Every field of an autoencoder's config; those of `jdiff.defaults.common` among them."""
    c = common("autoencoder")
    c.model.name = "kl"  # kl, vq or fsq: jdiff.first_stage.networks.BY_NAME

    c.loss = ml_collections.ConfigDict()
    c.loss.pixels = "l1"  # l1, l2 or logit_laplace
    c.loss.perceptual = 1.0  # weight of LPIPS, after `jdiff prepare lpips`; 0: none
    c.loss.kl = 1e-6  # weight of the KL divergence to N(0, I), of a "kl"
    c.loss.adversarial = 0.5  # weight of the discriminator's verdict, beside its ratio; 0: none
    c.loss.start = 0  # the step at which the discriminator begins

    c.discriminator = ml_collections.ConfigDict()
    c.discriminator.loss = "hinge"  # or "non_saturating"
    c.discriminator.channels = 64  # of the first layer
    c.discriminator.layers = 3  # that halve the image
    c.discriminator.learning_rate = config_dict.placeholder(float)  # None: config.optimizer's

    c.sampling.batch = 64
    return c
