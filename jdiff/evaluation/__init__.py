"""Measures of generated images: feature extractors, streamed statistics, metrics.

Who may live here: functions of images, features and probabilities. Nothing that knows a diffusion
model, a run or a training loop.
"""
