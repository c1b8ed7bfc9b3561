"""Text encoders: strings to arrays that networks are conditioned on.

Who may live here: text networks (clip, t5, qwen, bert: `base` says what one is), tokenizers, and
what stands on both.
"""
