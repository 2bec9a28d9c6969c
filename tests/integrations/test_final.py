"""Level `final`: whatever makes pictures is held to the promise by its finished pictures."""

import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import amg
from amg.pipelines.again import Asked
from amg.pipelines.pictures import to_pil

diffusers = pytest.importorskip("diffusers")


def picture(seed):
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed))


class Scripted(diffusers.DiffusionPipeline):
    """Draws picture `number` for a prompt "number", and another where its generator says so."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __call__(
        self,
        prompt=None,
        image=None,
        num_images_per_prompt=1,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
        strange=None,
    ):
        self.calls.append((prompt, generator, latents, strange))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        pictures = torch.stack([picture(int(text) if text.isdigit() else 999) for text in prompts])
        images = pictures
        if output_type == "pil":
            from amg.pipelines.pictures import to_pil

            images = to_pil(pictures)
        elif output_type == "np":
            images = pictures.permute(0, 2, 3, 1).numpy()
        if not return_dict:
            return (images, [False] * len(prompts))
        return SimpleNamespace(images=images, nsfw_content_detected=[False] * len(prompts))


@pytest.fixture(scope="module")
def index(tmp_path_factory, embedder):
    """Picture 0 is a training image captioned "0", and 1 to 9 are others, captioned with words."""
    pictures = torch.stack(
        [picture(100 if seed else 0) if seed == 0 else picture(seed + 50) for seed in range(10)]
    )
    pictures[0] = picture(0)
    captions = ["a zero of sorts", *(f"a sort of number {n}" for n in range(9))]
    return amg.Index.build(
        pictures, captions, embedder, tmp_path_factory.mktemp("final") / "f.amg", progress=False
    )


def protected(index, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return amg.protect(Scripted(), index, amg.AMGConfig.preset("main", threshold=0.98, **options))


def test_it_says_at_which_level(index):
    with pytest.warns(UserWarning, match='Scripted is protected at level "final"'):
        pipe = amg.protect(Scripted(), index)
    assert pipe.amg_level == "final"
    assert [verdict.level for verdict in pipe("3").amg] == ["final"]
    amg.unprotect(pipe)
    assert type(pipe) is Scripted and not hasattr(pipe, "amg_level")


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_what_is_no_copy_is_handed_out_untouched(index, output_type):
    pipe = protected(index)
    out, plain = pipe(["3", "4"], output_type=output_type), Scripted()(["3", "4"], output_type=output_type)
    assert len(pipe.calls) == 1 and not any(verdict.memorized for verdict in out.amg)
    for mine, own in zip(out.images, plain.images, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(own))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_copy_is_drawn_again_under_an_ordinary_caption_from_the_second_try_on(index, output_type):
    pipe = protected(index)
    out = pipe(["3", "0", "4"], output_type=output_type, latents=torch.zeros(3), num_images_per_prompt=2)
    # the copy is of prompt "0": rows 2 and 3, each drawn alone; first as it was asked for
    assert [call[0] for call in pipe.calls[1:3]] == [["0"], ["0"]]
    assert all("a sort of number" in call[0][0] for call in pipe.calls[3:])
    assert all(call[2] is None for call in pipe.calls[1:])  # the caller's latents made the copy
    assert [verdict.retries for verdict in out.amg] == [0, 0, 2, 2, 0, 0]
    assert not any(verdict.memorized for verdict in out.amg)
    for row, seed in enumerate((3, 3, 999, 999, 4, 4)):
        expected = (picture(seed) * 255).round().permute(1, 2, 0).numpy()
        found = out.images[row]
        found = np.asarray(found, dtype=np.float32) if output_type == "pil" else np.asarray(found) * 255
        found = found.transpose(1, 2, 0) if output_type == "pt" else found
        assert np.abs(found - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("kind", ["list", "tensor", "array", "tuple"])
def test_pictures_in_another_place_are_refused(index, kind):
    """Attack 10."""
    pictures = {"list": [to_pil(picture(0)[None])[0]], "tensor": picture(0)[None], "tuple": picture(0)[None]}
    others = pictures.get(kind, picture(0)[None].permute(0, 2, 3, 1).numpy())

    class Two(Scripted):
        def __call__(self, prompt=None, **kwargs):
            out = super().__call__(prompt, output_type="pt")
            return (
                (out.images, others) if kind == "tuple" else SimpleNamespace(images=out.images, more=others)
            )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = amg.protect(Two(), index)
    with pytest.raises(TypeError, match=r"must give its pictures as `\.images` alone"):
        pipe(["3"])


def test_what_stays_a_copy_is_blocked(index):
    pipe = protected(index, rewind_caption="prompt")
    out = pipe(["0", "3"], output_type="pt")
    assert [verdict.blocked for verdict in out.amg] == [True, False]
    assert out.amg[0].retries == 2  # a third would cost more than three times the picture
    assert float(out.images[0].abs().max()) == 0 and torch.equal(out.images[1], picture(3))
    assert pipe.amg_verdicts == out.amg


def test_the_ceiling_and_the_number_of_tries(index):
    for options, tries in (
        ({"max_evaluations": 1}, 0),
        ({"max_evaluations": None, "max_retries": 5}, 5),
        ({"on_memorized": "block"}, 0),
    ):
        pipe = protected(index, rewind_caption="prompt", **options)
        assert pipe("0").amg[0].blocked and len(pipe.calls) == 1 + tries


def test_flag_and_raise(index):
    pipe = protected(index, on_memorized="flag")
    out = pipe("0", output_type="pt")
    assert out.amg[0].memorized and not out.amg[0].blocked and torch.equal(out.images[0], picture(0))
    with pytest.raises(amg.MemorizedError):
        protected(index, on_memorized="raise")("0")


def test_a_tuple_stays_one(index):
    images, flags = protected(index, rewind_caption="prompt")(["0", "3"], return_dict=False, output_type="pt")
    assert float(images[0].max()) == 0 and flags == [False, False]


def test_an_unknown_list_draws_the_whole_batch_again(index):
    pipe = protected(index, max_evaluations=None)
    pipe(["3", "0"], strange=[1, 2])
    assert pipe.calls[1][0] == ["3", "0"] and pipe.calls[1][3] == [1, 2]
    assert pipe.calls[2][0][0] == "3" and "a sort of number" in pipe.calls[2][0][1]


def test_generators_are_fresh_and_a_picture_s_own(index):
    pipe = protected(index, rewind_caption="prompt")
    two = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]
    pipe(["3", "0"], generator=two)
    alone = protected(index, rewind_caption="prompt")
    alone(["0"], generator=[torch.Generator().manual_seed(6)])
    seeds = [call[1].initial_seed() for call in pipe.calls[1:]]
    assert seeds == [call[1].initial_seed() for call in alone.calls[1:]]
    assert len({*seeds, 5, 6}) == 4


def test_a_picture_that_the_user_put_in(index):
    from amg.pipelines.pictures import to_pil

    (own,) = to_pil(picture(0)[None])
    out = protected(index)("0", image=own)
    assert out.amg[0].memorized and out.amg[0].from_input and not out.amg[0].blocked
    assert np.array_equal(np.asarray(out.images[0]), np.asarray(own))
    strict = protected(index, block_input_copies=True, rewind_caption="prompt")("0", image=own)
    assert strict.amg[0].blocked
    other = protected(index, rewind_caption="prompt")("0", image=to_pil(picture(3)[None])[0])
    assert other.amg[0].blocked and not other.amg[0].from_input


def test_what_cannot_be_checked_is_refused(index):
    with pytest.raises(ValueError, match=r"`output_type` must give pictures at level .final."):
        pipe = protected(index)
        pipe("3", output_type="latent")
    assert pipe.calls == []
    nothing = type("Nothing", (Scripted,), {"__call__": lambda self: SimpleNamespace(frames=[1])})()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        amg.protect(nothing, index)
    with pytest.raises(TypeError, match=r"`pipe` must give pictures as `.images`"):
        nothing()
    for option in ("calibration", "student"):
        with pytest.raises(ValueError, match=f"`{option}` must be None for Scripted"):
            amg.protect(Scripted(), index, amg.AMGConfig.preset("main", **{option: __file__}))


def test_two_threads_are_served_one_after_the_other(index):
    pipe, inside, most = protected(index), [0], [0]
    draw = type(pipe)._amg_plain.__call__

    def watched(self, *args, **kwargs):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        out = draw(self, *args, **kwargs)
        inside[0] -= 1
        return out

    slow = type("Slow", (Scripted,), {"__call__": watched})()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        amg.protect(slow, index)
    threads = [threading.Thread(target=slow, args=(["3"],)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_arguments_are_cut_by_name_never_by_length():
    asked = Asked({"prompt": ["a", "b"], "original_size": (1024, 1024), "guidance_scale": 7.5}, 2)
    assert asked.by_rows
    assert asked.alone(1, 1, None) == {"prompt": ["b"], "original_size": (1024, 1024), "guidance_scale": 7.5}
    embeds = torch.arange(6.0).view(3, 2)
    asked = Asked({"prompt_embeds": embeds, "num_images_per_prompt": 2, "negative_prompt": None}, 6)
    again = asked.alone(5, 1, None)
    assert torch.equal(again["prompt_embeds"], embeds[2:]) and again["num_images_per_prompt"] == 1
    assert not Asked({"prompt": ["a", "b"], "ip_adapter_image": [1, 2]}, 2).by_rows
    assert not Asked({"prompt": ["a", "b"]}, 3).by_rows
