"""A small CLIP of captioned emoji, 64 x 64: what tells how well a drawing matches its caption.

    jdiff prepare emoji minilm
    jdiff encode --data=emoji --size=64 --resample=box --text=minilm --length=32 \\
        --name=emoji64_minilm
    jdiff train --config=configs/emoji_clip.py --workdir=runs/emoji_clip

Radford et al. 2021 (2103.00020) in small: a convolutional image tower, two transformer blocks over
the states of a frozen MiniLM, the symmetric InfoNCE loss over 1,024 pairs, and a learned
temperature of at most 100. Pictures are moved by up to an eighth of their side; they are not
mirrored (flags and letters, and captions that say "facing right").

Trained on the training split. Evaluated by retrieval in the test split, whose subjects are in no
picture of training: a picture is to find its caption among all 2,033, and "the same thing" is a
caption that differs in the drawing style and in tones of skin alone, of which there are 249 kinds.
Beside each figure stand that of chance and that of as many pictures of the training split. There is
no published figure.

`--config=configs/emoji_clip.py:small` is for 32 x 32 pixels (--size=32, --name=emoji32_minilm) with
narrower towers, batches of 256 and 1,500 steps: twelve minutes on two cores.
"""

import ml_collections

from jdiff.contrastive.experiment import defaults
from jdiff.errors import choose

#: What the captions of emoji may differ in and mean the same thing: style, and tones of skin.
SAME = r"^.*? emoji of an? |, (medium )?(light |dark |medium )?skin tone"
#: Pixels, fields of the towers, pairs a step, steps.
SIZES = {
    "full": (64, {"dim": 256, "channels": 96, "multipliers": (1, 2, 4), "blocks": 2,
                  "text_tokens": 256, "text_depth": 2, "dropout": 0.1, "dtype": "bfloat16"},
             1024, 10_000),
    "small": (32, {"dim": 128, "channels": 32, "multipliers": (1, 2, 4), "stem": 2, "blocks": 1,
                   "text_tokens": 128, "text_depth": 1, "dropout": 0.1},
              256, 1500),
}  # fmt: skip


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    pixels, towers, batch, steps = SIZES[choose("configs/emoji_clip.py: size", size, SIZES)]
    c = defaults()
    c.name = f"emoji CLIP {pixels} px"
    c.data.name = f"emoji{pixels}_minilm"
    c.data.threads = 2 if size == "small" else 8
    c.model.update(towers)
    c.loss.shift = 0.125
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = steps // 20
    c.optimizer.clip = 1.0
    c.ema = {"ema": {"kind": "constant", "decay": 0.999 if size == "full" else 0.99}}
    c.train.batch_size = batch
    c.train.steps = steps
    c.train.sample_every = steps // 5
    c.train.checkpoint_every = steps // 5
    c.evaluation.same = SAME
    return c
