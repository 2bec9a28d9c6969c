"""CLIP alignment from a local folder, against transformers itself."""

import json

import pytest
import torch

from amg.evaluate.clip import load_clip, load_open_clip_alignment

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP model with random weights, its tokenizer and its own mean and deviation."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**size, **text, "pad_token_id": 1},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    path = tmp_path_factory.mktemp("clip") / "tiny-clip"
    transformers.CLIPModel(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    given = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (path / "preprocessor_config.json").write_text(json.dumps(given))
    return path


def test_scores_are_those_of_transformers(folder):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prompts = ["a cat", "a dog on a mat", "hat"]
    scorer = load_clip(folder)
    model = transformers.CLIPModel.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    pixels = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        out = model(**tokenizer(prompts, padding=True, return_tensors="pt"), pixel_values=pixels)
    oracle = 100 * out.logits_per_image.diagonal() / model.logit_scale.exp().detach()
    torch.testing.assert_close(scorer(images, prompts), oracle, rtol=1e-5, atol=1e-4)
    assert scorer.name == "CLIP tiny-clip"


def test_a_score_does_not_depend_on_its_batch_or_on_the_centre_crops_margin(folder):
    scorer = load_clip(folder)
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    together = scorer(images, ["cat", "a longer prompt of words"])
    torch.testing.assert_close(together[:1], scorer(images[:1], ["cat"]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        together, scorer(images[..., 8:40], ["cat", "a longer prompt of words"]), rtol=1e-5, atol=1e-4
    )


def test_errors_name_the_option(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="--clip"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match="`prompts` must be one per image, got 1 for 2"):
        load_clip(folder)(torch.rand(2, 3, 32, 32), ["cat"])
    with pytest.raises(ValueError, match="--open-clip"):
        load_open_clip_alignment("ViT-B-32")
    with pytest.raises(FileNotFoundError, match="--open-clip"):
        load_open_clip_alignment(f"ViT-B-32:{tmp_path / 'gone.pt'}")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "3"])
def test_settings_that_cannot_be_read_are_named(folder, text, tmp_path):
    import shutil

    broken = shutil.copytree(folder, tmp_path / "clip")
    (broken / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"preprocessor_config.json must (be JSON|hold a JSON object), got"):
        load_clip(broken)
