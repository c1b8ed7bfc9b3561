"""Cascades: stages of growing resolution, each conditioned on the (augmented) image before it."""
