"""The network replayed: on a CPU a capture is stood in for by a closure over the tensors that are held."""

from __future__ import annotations

import pytest
import torch

from amg.engine import graphs
from amg.engine.graphs import Graphs, weights_held


class Recorder:
    """Stands for CUDA's capture: a replay computes from the held tensors, into the same output each time."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, call):
        self.captures += 1
        output = call()

        def replay():
            self.replays += 1
            output.copy_(call())
            return output

        return replay


def network(sample, t, words, extra=None, factor=1.0):
    """Depends on everything that it is given."""
    added = 0 if extra is None else extra["ids"].sum(1).view(-1, 1)
    return factor * sample * t.reshape(-1, 1) + words.mean(1) + added


def made(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    words = torch.randn(rows, 3, 5, generator=draw)
    return torch.randn(rows, 5, generator=draw), torch.rand(rows, generator=draw), words


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_replays_say_what_the_network_says_and_give_tensors_of_their_own():
    recorder = Recorder()
    replayed, outputs, wanted = Graphs(network, recorder), [], []
    for seed in range(6):
        sample, t, words = made(4, seed)
        extra = {"ids": torch.full((4, 2), float(seed))}
        outputs.append(replayed(sample, t, words=words, extra=extra))
        wanted.append(network(sample, t, words, extra))
    assert (recorder.captures, recorder.replays) == (1, 4)
    for output, expected in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, expected)


def test_each_form_is_captured_by_itself_in_whatever_order_its_arguments_come():
    recorder = Recorder()
    replayed = Graphs(network, recorder)
    for rows in (2, 3, 2, 3, 2, 3):
        sample, t, words = made(rows, rows)
        replayed(sample, t, words=words, factor=2.0)
    assert recorder.captures == replayed.captured == 2
    sample, t, words = made(2, 9)
    found = replayed(sample, t, factor=2.0, words=words)
    assert recorder.captures == 2
    torch.testing.assert_close(found, network(sample, t, words, factor=2.0))
    torch.testing.assert_close(
        replayed(sample, t, factor=3.0, words=words), 3 / 2 * (found - words.mean(1)) + words.mean(1)
    )


def test_what_is_given_again_is_not_copied_again_but_what_is_new_is():
    replayed = Graphs(network, Recorder())
    sample, t, words = made(2, 0)
    for _ in range(4):
        replayed(sample, t, words=words)
    torch.testing.assert_close(replayed(sample + 1, t, words=words), network(sample + 1, t, words))
    torch.testing.assert_close(replayed(sample, t, words=words), network(sample, t, words))


def test_the_least_recently_used_is_let_go(monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 3)
    replayed, recorder = Graphs(network, recorder := Recorder()), recorder
    for rows in (1, 2, 3, 4, 4, 4):
        for _ in range(3):
            sample, t, words = made(rows, rows)
            replayed(sample, t, words=words)
    assert replayed.captured == 3 and recorder.captures == 4


def test_gradients_and_unknown_objects_run_the_network_itself():
    recorder = Recorder()
    replayed = Graphs(lambda sample, t, words, marked=None: network(sample, t, words), recorder)
    sample, t, words = made(2, 0)
    for _ in range(4):
        replayed(sample, t, words=words, marked=object())
        with torch.enable_grad():
            leaf = sample.clone().requires_grad_()
            assert replayed(leaf, t, words=words).requires_grad
    assert recorder.captures == 0


def test_a_capture_under_autocast_serves_no_call_without():
    recorder = Recorder()
    replayed = Graphs(lambda sample, t, words: sample @ sample.T, recorder)
    sample, t, words = made(2, 0)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            assert replayed(sample, t, words=words).dtype == torch.bfloat16
    assert replayed(sample, t, words=words).dtype == torch.float32


def test_weights_that_move_or_are_scaled_otherwise_are_noticed():
    layer = torch.nn.Linear(3, 3)
    layer.scaling = {"one": 1.0}
    first = weights_held(layer)
    assert weights_held(layer) == first
    layer.scaling["one"] = 0.5
    assert weights_held(layer) != first
    layer.scaling["one"] = 1.0
    layer.weight.data = layer.weight.data.clone()
    assert weights_held(layer) != first


def test_a_pipeline_off_a_gpu_is_refused_before_work(tmp_path):
    pytest.importorskip("diffusers")
    import amg
    from amg import zoo

    pipe = zoo.load("photos-ddpm")
    index = amg.Index.build(
        torch.rand(3, 3, 32, 32), path=tmp_path / "few.amg", embedder=None, progress=False
    )
    with pytest.raises(
        ValueError, match="`cuda_graphs` must be False off a CUDA device, got True for a pipeline on cpu"
    ):
        amg.Sampler(pipe, index, cuda_graphs=True)


def test_a_sampler_delivers_the_same_when_its_network_is_replayed(photos_sd_index):
    """Rewinds and re-runs included: rows join and leave, so several forms are captured."""
    pytest.importorskip("diffusers")
    import dataclasses

    import amg
    from amg.commands.demo import open_pipeline
    from amg.embed.photos import load_photos

    recorder, outputs = Recorder(), []
    prompts = ["a photo of a cat", "a rocket on its launch pad at night"]
    for graphs_made in (False, True):
        pipe, index = open_pipeline("photos-sd"), amg.Index.open(photos_sd_index, load_photos())
        with amg.Sampler(pipe, index, amg.AMGConfig.preset("main")) as sampler:
            source = sampler.source
            if graphs_made:
                replayed = Graphs(source.denoiser.network, recorder)
                source.denoiser = dataclasses.replace(source.denoiser, network=replayed)
            made = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
            keywords = {"guidance_scale": 4.0, "output_type": "pt", "progress": False}
            with torch.no_grad():
                outputs.append(sampler(prompts, num_inference_steps=12, generator=made, **keywords))
    assert recorder.replays > 12
    assert (outputs[0].images - outputs[1].images).abs().max() <= 1 / 255
    assert [v.evaluations for v in outputs[0].amg] == [v.evaluations for v in outputs[1].amg]
