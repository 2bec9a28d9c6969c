"""`amg distill` from a pipeline to a student, and a student that screens what the teacher measures."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import amg
from amg.cli import main
from amg.commands import indexes
from amg.commands import sample as sampling
from amg.config import AMGConfig
from amg.embed.student import FORMAT, LIMITS, SCALE, Agreement, Origin, Student, load_student, save_student
from amg.pipelines.identity import origin_of

diffusers = pytest.importorskip("diffusers")
STEPS = 4
PROMPTS = ["abc", "cat, red"] * 3


def band_of(cut, above=0.0, below=1.1):
    return Agreement(above, below, 10, 1.0, 1.0, 1.0, (cut,) * len(LIMITS), (0.0,) * len(LIMITS))


def generators():
    return [torch.Generator().manual_seed(100 + i) for i in range(len(PROMPTS))]


def student_of(pipe, index, cut):
    torch.manual_seed(3)
    band = band_of(cut)
    return Student(origin_of(pipe, index), width=8, blocks=1, agreement=(band,)).eval()


@pytest.fixture
def written(sd, embedding_index, tmp_path):
    """A function that writes a student with that cut and returns the file."""

    def write(cut):
        path = tmp_path / f"{cut}.safetensors"
        save_student(student_of(sd, embedding_index, cut), path, {})
        return path

    return write


def drawn(pipe, index, path, way="Sampler", **more):
    options = {"check_at": (), "rewind_at": (), "on_memorized": "flag", **more}
    config = AMGConfig.preset("main", student=path, **options)
    arguments = {"generator": generators(), "num_inference_steps": STEPS, "guidance_scale": 7.5}
    if way == "protect":
        out = amg.protect(pipe, index, config)(PROMPTS, output_type="pt", **arguments)
        amg.unprotect(pipe)
        return out
    return amg.Sampler(pipe, index, config)(PROMPTS, output_type="pt", progress=False, **arguments)


def test_requests_share_the_student_s_calls(sd, embedding_index, written, monkeypatch):
    rows = []
    forward = Student.forward
    monkeypatch.setattr(Student, "forward", lambda self, x: rows.append(len(x)) or forward(self, x))
    config = AMGConfig.preset("main", student=written(0.5), check_at=(), rewind_at=(), on_memorized="flag")
    with amg.Sampler(sd, embedding_index, config) as sampler:
        futures = [
            sampler.submit(amg.Request(prompt, num_inference_steps=STEPS, output_type="pt"))
            for prompt in PROMPTS
        ]
        assert all(len(future.result().amg[0].trace) == STEPS for future in futures)
    assert sum(rows) == STEPS * len(PROMPTS) and len(rows) < sum(rows)


@pytest.mark.parametrize("way", ["Sampler", "protect"])
def test_the_teacher_looks_exactly_where_the_student_may_find_more(sd, embedding_index, written, way):
    options = {"lambda_min": 0.9, "lambda_max": 0.9, "c1": 0.0, "c2": 0.0, "c3": 0.0}
    plain = drawn(sd, embedding_index, None, way, **options)
    all_by_student = drawn(sd, embedding_index, written(3.0), way, **options)
    values = torch.tensor([[step.similarity for step in one.trace] for one in all_by_student.amg])
    middle = values.flatten().sort().values[values.numel() // 2].item()
    found = drawn(sd, embedding_index, written(middle), way, **options)
    assert torch.equal(found.images, plain.images)
    seen = {True: 0, False: 0}
    for own, other, row in zip(found.amg, plain.amg, values.tolist(), strict=True):
        for step, by_teacher, by_student in zip(own.trace, other.trace, row, strict=True):
            seen[step.estimated] += 1
            assert step.estimated == (by_student < middle)
            if step.estimated:
                assert step.similarity < middle
            else:
                assert (step.similarity > step.threshold) == (by_teacher.similarity > step.threshold)
                assert step.similarity == pytest.approx(by_teacher.similarity, abs=1e-6)
                assert step.neighbour == by_teacher.neighbour
    assert seen[True] and seen[False]


def test_no_known_cut_screens_nothing_and_a_large_one_everything(sd, embedding_index, written):
    for cut, estimated in ((-math.inf, False), (3.0, True)):
        out = drawn(sd, embedding_index, written(cut))
        assert {step.estimated for verdict in out.amg for step in verdict.trace} == {estimated}
        assert all(-1 <= verdict.similarity <= 1 for verdict in out.amg)  # the final check is the teacher's


def test_the_teacher_looks_at_checkpoints_where_the_student_s_picture_alarms_the_guard(
    sd, embedding_index, written
):
    options = {"check_at": (0.0,), "rewind_at": (1.0,), "on_memorized": "flag", "max_rewinds": 0}
    for guard_threshold, estimated in ((0.99, True), (1e-3, False)):
        config = AMGConfig.preset("main", student=written(3.0), guard_threshold=guard_threshold, **options)
        out = amg.Sampler(sd, embedding_index, config)(
            PROMPTS, generator=generators(), num_inference_steps=STEPS, progress=False
        )
        assert {verdict.trace[-1].estimated for verdict in out.amg} == {estimated}
        assert {verdict.trace[0].estimated for verdict in out.amg} == {True}, "no checkpoint, no guard"


def test_a_further_judge_is_asked_at_checkpoints_whatever_the_student_says(sd, embedding_index, written):
    config = AMGConfig.preset(
        "main", student=written(3.0), check_at=(0.0,), rewind_at=(1.0,), on_memorized="flag", max_rewinds=0
    )
    for also, estimated in (((), True), ((embedding_index,), False)):
        out = amg.Sampler(sd, embedding_index, config, also)(
            PROMPTS, generator=generators(), num_inference_steps=STEPS, progress=False
        )
        assert {verdict.trace[-1].estimated for verdict in out.amg} == {estimated}


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher", "other"), ("teacher_sha256", "1" * 64), ("decoder_sha256", "xy"), ("channels", 5)],
)
def test_a_student_of_something_else_is_refused_by_name(sd, embedding_index, tmp_path, name, value):
    origin = replace(origin_of(sd, embedding_index), **{name: value})
    save_student(Student(origin, width=8, blocks=1), tmp_path / "s.safetensors", {})
    with pytest.raises(ValueError, match=f"`student` must be distilled for this run's {name}="):
        drawn(sd, embedding_index, tmp_path / "s.safetensors")


def test_a_student_needs_latents_and_a_cosine_index(ddpm, pixel_index, tmp_path):
    with pytest.raises(ValueError, match="`student` must be None without latents"):
        amg.Sampler(ddpm, pixel_index, AMGConfig.preset("main", student=tmp_path / "s.safetensors"))


def test_a_file_is_read_as_written_and_others_are_refused(tmp_path):
    origin = Origin("tiny", "0" * 64, 16, 4, "ab")
    band = band_of(0.25, 0.1, 0.5)
    torch.manual_seed(1)
    student = Student(origin, width=16, blocks=2, agreement=[band]).half().float()
    save_student(student, tmp_path / "s.safetensors", {"distilled": {"seed": 3}})
    loaded, x0_hat = load_student(tmp_path / "s.safetensors"), torch.randn(3, 4, 8, 8)
    assert loaded.origin == origin and loaded.agreement == (band,)
    assert loaded(x0_hat).shape == (3, 3, 8 * SCALE, 8 * SCALE)
    torch.testing.assert_close(loaded(x0_hat), student(x0_hat))
    alone = torch.cat([loaded(x0_hat[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, loaded(x0_hat), atol=1e-5, rtol=1e-5)
    assert (loaded.cut(0.2, 0.45), loaded.cut(0.2, 0.46)) == (0.25, 0.25)
    assert loaded.cut(0.7, 0.45) == loaded.cut(0.2, 0.1) == -math.inf
    with pytest.raises(ValueError, match=r"`x0_hat` must be \[B, 4, h, w\], got \[3, 5, 8, 8\]"):
        loaded(torch.randn(3, 5, 8, 8))
    with pytest.raises(FileNotFoundError, match="`student` must be a file of `amg distill`"):
        load_student(tmp_path / "none")
    for text in (b"", b"x" * 100):
        (tmp_path / "bad").write_bytes(text)
        with pytest.raises(ValueError, match="`student` must be a file of `amg distill`"):
            load_student(tmp_path / "bad")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "null", "{}"])
def test_metadata_that_cannot_be_read_is_named(tmp_path, text):
    save_file({"x": torch.zeros(1)}, tmp_path / "bad", {FORMAT: text})
    with pytest.raises(ValueError, match=r"`student` must be a file of `amg distill`.* got .*bad \("):
        load_student(tmp_path / "bad")


def test_the_cut_is_the_order_statistic_of_each_generation_s_least():
    from amg.commands.distill import _cut

    image = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    ours = torch.tensor([0.5, 0.3, 0.9, 0.1, 0.7, 0.8, 0.2, 0.2])
    close = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0]).bool()  # of 0, 1, 2 the least are 0.3, 0.9, 0.7
    assert _cut(image, ours, close, 0.5) == pytest.approx(0.7)  # rank 2 of 3
    assert _cut(image, ours, close, 0.25) == pytest.approx(0.3)
    assert _cut(image, ours, close, 0.2) == -math.inf


@pytest.fixture
def distilled(sd, embedding_index, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "open_model", lambda *_: sd)
    monkeypatch.setattr(indexes, "open_index", lambda *_: embedding_index)

    def run(*more, images=24):
        command = ["distill", "tiny", "--index", "tiny.amg", "--embedder", "tiny", "--steps", str(STEPS)]
        command += ["--images", str(images), "--train-steps", "60", "--miss-rate", "0.5", "--batch-size", "8"]
        return main([*command, "--out", str(tmp_path / "s.safetensors"), *more])

    return run


def test_distilling_agrees_better_than_an_untrained_student(distilled, sd, embedding_index, tmp_path, capsys):
    assert distilled() == 0
    assert "alpha_bar" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.safetensors"]
    student = load_student(tmp_path / "s.safetensors")
    assert student.origin == origin_of(sd, embedding_index)
    assert sum(band.count for band in student.agreement) == 6 * STEPS  # a quarter of 24 is held out
    assert min(band.cosine for band in student.agreement) > 0.5
    assert student.agreement[0].above == 0.0 and student.agreement[-1].below > 1
    out = drawn(sd, embedding_index, tmp_path / "s.safetensors")
    assert len(out.amg) == len(PROMPTS)


def test_distilling_resumes_and_refuses_another_run_s_folder(distilled, tmp_path, monkeypatch, capsys):
    import amg.commands.distill

    monkeypatch.setattr(amg.commands.distill, "train", interrupted)
    assert distilled() == 130
    folder = tmp_path / "s.safetensors.pairs"
    assert len(list(folder.glob("*.safetensors"))) == 3 and not (tmp_path / "s.safetensors").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert distilled() == 130
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert distilled("--seed", "5") == 2
    assert "`--seed` must be that of the run kept in" in capsys.readouterr().err
    assert json.loads((folder / "settings.json").read_text())["seed"] == "0"
    for text in ("[" * 100_000, "[]", "{"):
        (folder / "settings.json").write_text(text)
        assert distilled() == 2
        assert f"{folder}/settings.json is damaged" in capsys.readouterr().err


def interrupted(*_):
    raise KeyboardInterrupt


def test_distilling_goes_on_only_with_the_same_model_and_index(
    distilled, sd, embedder, tmp_path, monkeypatch, capsys
):
    import amg.commands.distill

    monkeypatch.setattr(amg.commands.distill, "train", interrupted)
    assert distilled() == 130
    weights = sd.unet.conv_out.weight.detach().clone()
    sd.unet.conv_out.weight.data[-1, -1, -1, -1] += 0.1
    assert distilled() == 2
    assert "`MODEL` must be that of the run kept in" in capsys.readouterr().err
    sd.unet.conv_out.weight.data.copy_(weights)
    pictures = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    captions = [f"caption {i % 20}" for i in range(60)]
    other = amg.Index.build(pictures, captions, embedder, tmp_path / "o.amg", progress=False)
    monkeypatch.setattr(indexes, "open_index", lambda *_: other)
    assert distilled() == 2
    assert "`--index` must be that of the run kept in" in capsys.readouterr().err


def test_distilling_leaves_somebody_s_folder_alone(distilled, tmp_path, capsys):
    folder = tmp_path / "s.safetensors.pairs"
    folder.mkdir()
    (folder / "settings.json").write_text('{"theme": "dark"}')
    assert distilled() == 2
    assert "must be a directory of amg's own" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["settings.json"]
    assert (folder / "settings.json").read_text() == '{"theme": "dark"}'


@pytest.mark.parametrize("option", ["--images", "--steps", "--train-steps", "--batch-size"])
def test_bad_numbers_are_refused_by_name(distilled, option, capsys):
    assert distilled(option, "0") == 2
    assert f"`{option}` must be >= " in capsys.readouterr().err
    assert distilled("--miss-rate", "1") == 2
    assert "`--miss-rate` must lie in (0, 1), got 1.0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["calibration", "student"])
def test_a_scheduler_refuses_what_was_made_for_a_model(embedding_index, name):
    config = AMGConfig.preset("main", **{name: "file"})
    with pytest.raises(ValueError, match=f"`{name}` must be None: a scheduler does not know the model"):
        amg.AMGScheduler(diffusers.DDIMScheduler(), embedding_index, config)


def test_a_pixel_model_is_refused_before_anything_is_drawn(ddpm, pixel_index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "open_model", lambda *_: ddpm)
    monkeypatch.setattr(indexes, "open_index", lambda *_: pixel_index)
    command = ["distill", "tiny", "--index", "p.amg", "--embedder", "tiny", "--out", str(tmp_path / "s")]
    assert main(command) == 2
    assert "`MODEL` must denoise latents" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ['{"text": "a cat"}', '{"caption": '])
def test_a_prompt_line_without_a_caption_is_named(tmp_path, line):
    from amg.guidance.prompts import read_prompts

    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"`--ordinary` must hold JSON with `caption`.*got"):
        read_prompts(tmp_path / "p.jsonl", "--ordinary")
