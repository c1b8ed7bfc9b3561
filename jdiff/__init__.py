"""jdiff: diffusion and flow models in JAX."""
