"""Coloured pictures in two styles, and captions that name both with their embeddings."""

import numpy as np

WORDS = ("black", "blue", "green", "cyan", "red", "magenta", "yellow", "white")
SIDE, TOKENS, WIDTH = 8, 3, 12
STYLE = "^(plain|bright) "


def told(caption):
    """The embedding of a caption: a vector for each of its words, drawn from the word."""
    text, mask = np.zeros((TOKENS, WIDTH), np.float32), np.zeros(TOKENS, bool)
    for i, word in enumerate(caption.split()):
        text[i] = np.random.default_rng(sum(map(ord, word))).normal(size=WIDTH)
        mask[i] = True
    return {"text": text, "text_mask": mask, "pooled": text.mean(axis=0)}


def pictures(split):
    """(picture, caption): the corners of the cube of colours, in two styles, with some noise."""
    rng = np.random.default_rng(len(split))
    for i in range(64 if split == "train" else 32):
        colour, style = i % 8, (i // 8) % 2
        levels = np.array([colour >> 2 & 1, colour >> 1 & 1, colour & 1]) * 200 + 20.0
        image = np.broadcast_to(levels, (SIDE, SIDE, 3)).copy()
        image[: SIDE // 2] = 128 * style  # the style shows in the upper half
        image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        yield image, f"{('plain', 'bright')[style]} {WORDS[colour]}"
