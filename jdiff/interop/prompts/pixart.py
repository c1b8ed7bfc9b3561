"""PixArt alpha and sigma: T5 with its mask, and, of alpha at 1024 px, the picture's size."""

from collections.abc import Sequence

from jdiff.interop.prompts.base import Entries, Parts, Prompts, full


class PixArt(Prompts):
    """PixArtAlphaPipeline and PixArtSigmaPipeline.

    Texts are put in lower case and stripped, as in training. Two defaults of diffusers are not
    followed. Where BeautifulSoup and ftfy are installed it also cleans captions (clean_caption: no
    addresses, no Chinese characters, ...). And it draws the nearest size of the training
    (use_resolution_binning) and resizes that to the size asked for, which is drawn itself here.
    """

    classes = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    long = ("text_encoder",)

    @classmethod
    def open(cls, parts: Parts) -> "PixArt":
        """text_encoder: T5, 120 tokens of alpha, 300 of sigma."""
        length = 300 if parts.index["_class_name"] == "PixArtSigmaPipeline" else 120
        encoders = {"text_encoder": parts.encoder(length=length, masked=True)}
        return cls(encoders, parts.index, parts.network.config)

    @property
    def steps(self) -> int:
        """diffusers' own."""
        return 20

    @property
    def guidance_scale(self) -> float:
        """diffusers' own."""
        return 4.5

    def encode(self, texts: Sequence[str]) -> Entries:
        """text `[N, L, D]` and text_mask `[N, L]`."""
        read = self.encoders["text_encoder"].encode([text.lower().strip() for text in texts])
        return {"text": read["text"], "text_mask": read["mask"]}

    def told(
        self, prompts: Sequence[str], negative: Sequence[str] | None, size: tuple[int, int],
        guidance_scale: float, guided: bool,
    ) -> tuple[Entries, Entries]:  # fmt: skip
        """The texts, and the size and shape where the network is told of them."""
        cond, null = self.pair(prompts, negative, guided)
        told = self.config.get("use_additional_conditions")
        if self.config["sample_size"] == 128 if told is None else told:
            height, width = size
            cond["resolution"] = full(len(prompts), size)
            cond["aspect_ratio"] = full(len(prompts), height / width)
        return cond, null
