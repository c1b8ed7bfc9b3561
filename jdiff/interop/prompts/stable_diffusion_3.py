"""Stable Diffusion 3 and 3.5: two CLIPs and T5, one behind the other."""

from collections.abc import Sequence

from jdiff.interop.prompts.base import Entries, Parts, Prompts
from jdiff.texts import combine


class StableDiffusion3(Prompts):
    """StableDiffusion3Pipeline. A folder without T5 (text_encoder_3 null) has zeros in its place.

    T5 is not told which tokens are padding, and the network sees all of them, as in training.
    """

    classes = ("StableDiffusion3Pipeline",)
    long = ("text_encoder_3",)

    @classmethod
    def open(cls, parts: Parts) -> "StableDiffusion3":
        """text_encoder and text_encoder_2 (CLIP), text_encoder_3 (T5, 256 tokens) if there."""
        clips = ("text_encoder", "text_encoder_2")
        encoders = {name: parts.encoder(name, layer=-2, masked=False) for name in clips}
        if parts.has("text_encoder_3"):
            encoders["text_encoder_3"] = parts.encoder("text_encoder_3", length=256, masked=False)
        return cls(encoders, parts.index, parts.network.config)

    @property
    def steps(self) -> int:
        """diffusers' own."""
        return 28

    @property
    def guidance_scale(self) -> float:
        """diffusers' own."""
        return 7.0

    def encode(self, texts: Sequence[str]) -> Entries:
        """text `[N, 77 + 256, D]` and pooled `[N, P1 + P2]`."""
        read = [encoder.encode(texts) for encoder in self.encoders.values()]
        joined = combine.sd3(*read, width=self.config.get("joint_attention_dim", 4096))
        return {"text": joined["text"], "pooled": joined["pooled"]}
