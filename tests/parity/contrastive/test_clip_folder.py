"""The scorer of a CLIP folder against transformers' CLIPModel, all of its weights random."""

import made_tokenizers as made
import numpy as np
import pytest
from peers import peer

from jdiff.contrastive import scorer
from jdiff.errors import UserError

torch = peer("torch")
transformers = peer("transformers")

TEXTS = ["a red heart", "two cats, and a dog on a very long walk through the town", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPModel with its tokenizer, as transformers writes it."""
    where = tmp_path_factory.mktemp("clip")
    made.clip(where)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=common | {"vocab_size": 587, "max_position_embeddings": 77,
                              "bos_token_id": 585, "eos_token_id": 586, "pad_token_id": 586},
        vision_config=common | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(where)
    return where


def test_vectors_and_scores_are_those_of_transformers(folder):
    judge = scorer.load(folder, batch=2)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.CLIPTokenizerFast.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor(((images / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        theirs = model(input_ids=tokens["input_ids"], pixel_values=pixels)
    seen, read = judge.images(images), judge.texts(TEXTS)
    np.testing.assert_allclose(seen, theirs.image_embeds.numpy(), atol=2e-5)
    np.testing.assert_allclose(read, theirs.text_embeds.numpy(), atol=2e-5)
    cosines = (theirs.image_embeds * theirs.text_embeds).sum(-1).numpy()
    wanted = 100 * np.maximum(cosines, 0)
    np.testing.assert_allclose(scorer.clip_score(seen, read), wanted, atol=5e-3)


def test_a_text_tower_alone_is_no_scorer(folder, tmp_path):
    made.clip(tmp_path)
    full = transformers.CLIPModel.from_pretrained(folder)
    text = transformers.CLIPTextModel(full.config.text_config)
    text.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not compare texts and images"):
        scorer.load(tmp_path)
