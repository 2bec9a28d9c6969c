"""Protecting a pipeline again: the new protection whole, or the old one as it was."""

import dataclasses

import pytest
import torch

import amg

diffusers = pytest.importorskip("diffusers")
STRICT = {"threshold": -1.0, "on_memorized": "block", "rewind_at": (), "c1": 0.0, "c2": 0.0, "c3": 0.0}


@pytest.fixture
def protected(sd, embedding_index):
    """A pipeline whose every picture is blocked."""
    return amg.protect(sd, embedding_index, amg.AMGConfig.preset("main", **STRICT))


def drawn(pipe):
    return pipe(
        ["abc", "cat"],
        generator=[torch.Generator().manual_seed(row) for row in (0, 1)],
        num_inference_steps=2,
        output_type="pt",
    )


class Meddled:
    """An index that fails when it is asked for its metric."""

    embed = nearest = with_searcher = None

    @property
    def metric(self):
        raise RuntimeError("the disk is gone")


def other_student(folder, pipe, index):
    from amg.embed.student import Student, save_student
    from amg.pipelines.identity import origin_of

    origin = dataclasses.replace(origin_of(pipe, index), teacher="other")
    save_student(Student(origin, width=8, blocks=1), folder / "other.safetensors", {})
    return folder / "other.safetensors"


def without_embedder(index):
    return amg.Index.open(index.path)


BAD = {
    "no calibration": (lambda p, i, f: (i, {"calibration": f / "gone.json"}), FileNotFoundError),
    "half a calibration": (lambda p, i, f: (i, {"calibration": written(f, "{")}), ValueError),
    "no student": (lambda p, i, f: (i, {"student": f / "gone.safetensors"}), FileNotFoundError),
    "another's student": (lambda p, i, f: (i, {"student": other_student(f, p, i)}), ValueError),
    "another metric": (lambda p, i, f: (i, {"metric": "nl2"}), ValueError),
    "a threshold of 1": (lambda p, i, f: (i, {"threshold": 1.0}), ValueError),
    "no index": (lambda p, i, f: (None, {}), TypeError),
    "a path": (lambda p, i, f: (str(i.path), {}), TypeError),
    "an index that fails": (lambda p, i, f: (Meddled(), {}), RuntimeError),
    "no embedder": (lambda p, i, f: (without_embedder(i), {}), ValueError),
}


def written(folder, text):
    (folder / "c.json").write_text(text)
    return folder / "c.json"


@pytest.mark.parametrize("kind", BAD)
def test_a_protection_that_fails_leaves_the_old_one(protected, embedding_index, tmp_path, kind):
    make, error = BAD[kind]
    before, own = type(protected), protected._amg_protection
    index, options = make(protected, embedding_index, tmp_path)
    with pytest.raises(error):
        amg.protect(protected, index, amg.AMGConfig.preset("main", **options))
    assert type(protected) is before and protected._amg_protection is own
    out = drawn(protected)
    assert [verdict.blocked for verdict in out.amg] == [True, True] and float(out.images.max()) == 0


@pytest.mark.parametrize(
    ("also", "named"),
    [
        (None, "`also` must be a list of indexes, got None"),
        ("pictures.amg", "`also` must be a list of indexes, got 'pictures.amg'"),
        (["pictures.amg"], r"`also\[0\]` must be an amg.Index, got 'pictures.amg'"),
    ],
)
@pytest.mark.parametrize("way", [amg.protect, amg.Sampler])
def test_further_indexes_are_looked_at_before_the_first_step(protected, embedding_index, way, also, named):
    with pytest.raises(TypeError, match=named):
        way(protected, embedding_index, also=also)
    with pytest.raises(TypeError, match="`also` must be"):
        way(protected, embedding_index, also=embedding_index)
    with pytest.raises(ValueError, match=r"`also\[1\]` must have its embedder attached"):
        way(protected, embedding_index, also=[embedding_index, without_embedder(embedding_index)])
    with pytest.raises(TypeError, match="`config` must be an AMGConfig or None, got 'main'"):
        way(protected, embedding_index, "main")
    assert [verdict.blocked for verdict in drawn(protected).amg] == [True, True]


def test_a_plain_pipeline_stays_plain_where_protecting_it_fails(sd, embedding_index, tmp_path):
    plain = drawn(sd).images
    with pytest.raises(FileNotFoundError):
        amg.protect(sd, embedding_index, amg.AMGConfig.preset("main", calibration=tmp_path / "gone.json"))
    assert type(sd) is diffusers.StableDiffusionPipeline and not hasattr(sd, "_amg_protection")
    assert torch.equal(drawn(sd).images, plain)


def test_protecting_again_replaces_the_protection(protected, sd, embedding_index, pixel_index):
    drawn(protected)
    again = amg.protect(protected, embedding_index, amg.AMGConfig.preset("off"), also=[pixel_index])
    assert again is protected and not hasattr(again, "amg_verdicts")
    out = drawn(again)
    assert not any(verdict.blocked for verdict in out.amg) and len(out.amg[0].also) == 1
    assert type(again).__mro__[1] is diffusers.StableDiffusionPipeline
    amg.unprotect(again)
    assert type(sd) is diffusers.StableDiffusionPipeline and not hasattr(sd, "_amg_protection")
    with pytest.raises(ValueError, match=r"amg\.protect"):
        amg.unprotect(sd)
    assert type(sd) is diffusers.StableDiffusionPipeline
    assert torch.equal(drawn(sd).images, out.images)
