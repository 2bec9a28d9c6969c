"""Alignment under an open_clip model against open_clip; runs where tests/embed/open_clip_env.sh does."""

import importlib.util
import json

import pytest
import torch

MODEL = "amg-test-alignment"
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def open_clip():
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed; see tests/embed/open_clip_env.sh")
    library = None
    if torch.version.cuda is None:  # two schemas that only torchvision's GPU build defines
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip cannot be imported ({error}); see tests/embed/open_clip_env.sh")
    yield open_clip
    del library


def test_scores_are_those_of_open_clip(open_clip, tmp_path):
    from amg.evaluate.clip import load_open_clip_alignment

    (tmp_path / f"{MODEL}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / f"{MODEL}.json")
    torch.save(open_clip.create_model(MODEL).state_dict(), tmp_path / "weights.pt")
    theirs = open_clip.create_model_and_transforms(MODEL, pretrained=str(tmp_path / "weights.pt"))[0].eval()
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (theirs.visual.image_mean, theirs.visual.image_std)
    )
    images, prompts = torch.rand(3, 3, 48, 48), ["a cat", "a dog on the mat", "hat"]
    with torch.no_grad():
        pictures = theirs.encode_image((images - mean) / std, normalize=True)
        texts = theirs.encode_text(open_clip.get_tokenizer(MODEL)(prompts), normalize=True)
    scorer = load_open_clip_alignment(f"{MODEL}:{tmp_path / 'weights.pt'}")
    torch.testing.assert_close(scorer(images, prompts), 100 * (pictures * texts).sum(1), rtol=1e-5, atol=1e-4)
    assert scorer.name == f"open_clip {MODEL}"
