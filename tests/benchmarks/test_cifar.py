"""The CIFAR-10 benchmark: its network, its judges, its rows and its tables, on small made-up data; and on the
real files where they lie beside the checkout."""

from __future__ import annotations

import csv
import importlib
import io
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "cifar"
PARQUET = ROOT.parent / "shared" / "data" / "cifar10" / "train.parquet"
RESNET = ROOT.parent / "shared" / "models" / "resnet20_cifar10.safetensors"
MODULES = ("data", "resnet20", "judging", "rows", "sheet", "report", "trajectories", "bench_cifar")


@pytest.fixture(scope="module")
def cifar():
    """The modules of benchmarks/cifar by name, importable by these names only meanwhile."""
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name)
    sys.modules.update(hidden)


@pytest.fixture
def real_files():
    for path in (PARQUET, RESNET):
        if not path.is_file():
            pytest.skip(f"no {path.name} in {path.parent}")
    return PARQUET, RESNET


@pytest.fixture(scope="module")
def network(cifar):
    """A ResNet-20 with random weights and random batch statistics."""
    torch.manual_seed(3)
    network = cifar["resnet20"].ResNet20()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return network.eval().requires_grad_(False)


def by_hand(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """ResNet-20's logits from its state dict alone, in float64, with the batch norms folded by hand."""
    state = {name: value.double() for name, value in state.items() if value.is_floating_point()}
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    hidden = (images.double() - mean.double()[:, None, None]) / deviation.double()[:, None, None]

    def normed(hidden: torch.Tensor, conv: str, norm: str, stride: int) -> torch.Tensor:
        hidden = functional.conv2d(hidden, state[f"{conv}.weight"], stride=stride, padding=1)
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return hidden * scale[:, None, None] + shift[:, None, None]

    hidden = normed(hidden, "conv1", "bn1", 1).relu()
    for stage in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            new = normed(hidden, f"{name}.conv1", f"{name}.bn1", stride).relu()
            new = normed(new, f"{name}.conv2", f"{name}.bn2", 1)
            if stride == 2:
                widened = torch.zeros_like(new)
                quarter = new.shape[1] // 4
                widened[:, quarter : quarter + hidden.shape[1]] = hidden[:, :, ::2, ::2]
                hidden = widened
            hidden = (new + hidden).relu()
    return hidden.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def test_resnet20_equals_its_layers_written_out(network):
    images = torch.rand(5, 3, 32, 32)
    expected = by_hand(network.state_dict(), images)
    assert torch.allclose(network(images).double(), expected, atol=1e-4 * float(expected.abs().max()))


def test_resnet20_names_real_pictures(cifar, real_files):
    network = cifar["resnet20"].load_resnet20(RESNET)
    images, labels = cifar["data"].read_rows(PARQUET, slice(20_000, 20_500))
    images = images.float() / 255
    accuracy = (network(images).argmax(1) == labels).float().mean().item()
    assert accuracy > 0.75  # 80.4 % is known for 1,000 re-encoded test images
    expected = by_hand(network.state_dict(), images[:20])
    assert torch.equal(network(images[:20]).argmax(1), expected.argmax(1))


def test_a_missing_file_is_named(cifar, tmp_path):
    with pytest.raises(FileNotFoundError, match="--resnet"):
        cifar["resnet20"].load_resnet20(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="--data"):
        cifar["data"].read_rows(tmp_path / "none.parquet", slice(0, 1))
    with pytest.raises(FileNotFoundError, match="--model"):
        cifar["rows"].open_pipeline(tmp_path)


def write_parquet(path: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """A Parquet of PNG-coded uint8 images [N, 3, 32, 32] in CIFAR-10's columns."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    entries = []
    for number, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
        entries.append({"bytes": file.getvalue(), "path": f"{number}.png"})
    columns = {"img": entries, "label": labels.tolist()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture(scope="module")
def small(cifar, tmp_path_factory):
    """A Parquet of 80 random images, every seventh flat, and a subset of four per class."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (80, 3, 32, 32), generator=generator).to(torch.uint8)
    images[::7] = 128
    labels = torch.arange(80) % 10
    path = tmp_path_factory.mktemp("cifar") / "train.parquet"
    write_parquet(path, images, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar["data"], "PER_CLASS", 4)
        subset = cifar["data"].training_subset(path)
    return path, images, labels, subset


def test_training_subset(cifar, small):
    _, images, labels, subset = small
    assert subset.images.shape == (40, 3, 32, 32)
    assert torch.equal(subset.images, images[subset.rows])
    assert torch.equal(subset.labels, labels[subset.rows])
    assert torch.bincount(subset.labels).tolist() == [4] * 10
    assert len(set(subset.rows.tolist())) == 40 and not (subset.rows % 7 == 0).any()
    assert subset.counts.tolist() == [75] * 20 + [1] * 20
    assert torch.bincount(subset.labels[:20]).tolist() == [2] * 10


def test_too_few_images_of_a_class(cifar, small):
    with pytest.raises(ValueError, match="of class 0"):
        cifar["data"].training_subset(small[0])


def test_index_has_each_distinct_image_once_in_order(cifar, small, tmp_path):
    subset = small[3]
    index = cifar["rows"].open_index(subset, tmp_path / "cifar.amg")
    assert index.metric == "nl2" and len(index.ids) == 40
    found = index.search(subset.distinct)
    assert found.row.tolist() == list(range(40))
    assert list(index.ids) == [str(row) for row in subset.rows.tolist()]


def test_copy_judge_against_cosines_one_by_one(cifar, network):
    training, held_out = torch.rand(30, 3, 32, 32), torch.rand(25, 3, 32, 32)
    judge = cifar["judging"].copy_judge(network, training, held_out, 0.9)
    layouts = functional.avg_pool2d(network.middle(training), 2).flatten(1).double()
    asked = functional.avg_pool2d(network.middle(held_out), 2).flatten(1).double()
    centre = layouts.mean(0)
    cosines = functional.cosine_similarity((asked - centre)[:, None], (layouts - centre)[None], dim=2).amax(1)
    assert torch.allclose(judge.similarity(held_out).double(), cosines, atol=1e-4)
    assert int((judge.similarity(held_out) > judge.threshold).sum()) == 3  # a tenth of 25, interpolated
    assert torch.allclose(judge.similarity(training), torch.ones(30), atol=1e-4)


def test_figures_of_copies_and_of_new_pictures(cifar, network):
    from amg.verdict import Neighbour, Verdict

    training, held_out = torch.rand(40, 3, 32, 32), torch.rand(40, 3, 32, 32)
    copies = cifar["judging"].copy_judge(network, training, held_out, 1.0)
    labels = network(held_out).argmax(1)
    judges = cifar["judging"].Judges(training, network, copies, held_out, labels)
    images = torch.cat([training[:5], held_out[:15]])
    verdicts = [
        Verdict(
            "nl2", -0.2 if row < 5 else -1.505 - row / 100, -1.4, Neighbour(0, "0", None), row < 5,
            rewinds=row % 2, evaluations=50,
        )
        for row in range(20)
    ]  # fmt: skip
    asked = torch.cat([(network(images[:5]).argmax(1) + 1) % 10, labels[:15]])
    found = cifar["judging"].figures(images, verdicts, asked, judges)
    assert found["< 1.4 %"] == 25 and found["< 1.6 %"] == 50
    assert found["< 1.4 % low"] < 25 < found["< 1.4 % high"]
    assert found["ResNet-20 judge %"] == 25 and found["luminance judge %"] == 25
    assert found["Top1 nL2"] == pytest.approx(0.2) and found["class accuracy %"] == 75
    assert found["before the final check %"] == pytest.approx(25) and found["rewinds/image"] == 0.5
    assert found["evaluations/image"] == 50


def test_blocked_images_are_counted_apart(cifar, network):
    from amg.verdict import Neighbour, Verdict

    training, held_out = torch.rand(40, 3, 32, 32), torch.rand(20, 3, 32, 32)
    copies = cifar["judging"].copy_judge(network, training, held_out, 1.0)
    judges = cifar["judging"].Judges(training, network, copies, held_out, torch.zeros(20))
    verdicts = [
        Verdict("nl2", -0.2 if row < 2 else -1.8, -1.4, Neighbour(0, "0", None), row < 2, blocked=row < 2)
        for row in range(20)
    ]
    found = cifar["judging"].figures(held_out, verdicts, None, judges)
    assert (
        found["blocked"] == 2
        and found["< 1.4 %"] == 0
        and found["before the final check %"] == pytest.approx(10)
    )
    assert found["class accuracy %"] != found["class accuracy %"]


def test_every_row_is_a_config_of_its_own(cifar):
    import amg

    rows = cifar["rows"]
    for condition in ("unconditional", "class"):
        every = [*rows.main_rows(condition), *rows.ablation_rows(condition), *rows.grid_rows(condition)]
        assert len({(row.table, row.config) for row in every}) == len(every)
        assert len({(row.table, row.name) for row in every}) == len(every)
        for row in every:
            config = amg.AMGConfig.preset(row.preset, **row.overrides).for_metric("nl2")
            if row.name.startswith("paper's form"):
                assert config.rewind_at == () and config.step_length == "constant"
    assert rows.every(5)[:3] == (0.0, 0.102, 0.2041) and rows.every(5)[-1] == 1.0


def test_every_kth_step_is_checked(cifar):
    from amg.guidance.gate import steps_of

    assert sorted(steps_of(cifar["rows"].every(5), 50)) == [*range(0, 50, 5), 49]
    assert sorted(steps_of(cifar["rows"].every(10), 50)) == [0, 10, 20, 30, 40, 49]


def measured(cifar, **values: float) -> dict[str, float]:
    return {**dict.fromkeys(cifar["bench_cifar"].MEASURED, 1.0), "class accuracy %": float("nan"), **values}


def test_csv_to_tables(cifar, tmp_path):
    bench, path = cifar["bench_cifar"], tmp_path / "cifar.csv"
    row = cifar["rows"].main_rows("unconditional")[0]
    values = (row.table, row.condition, row.name, row.config, "256", "50", "0", "1.0")
    key = dict(zip(bench.KEY, values, strict=True))
    assert key not in bench.done(path)
    bench.append(path, key, measured(cifar, FID=33.333, **{"< 1.4 %": 12.5}))
    assert key in bench.done(path)
    bench.append(path, {**key, "guidance": "main", "config": "{}"}, measured(cifar, FID=22.222))
    bench.append(path, {**key, "guidance": "main", "config": "{}"}, measured(cifar, FID=11.111))
    text = cifar["report"].tables(path)
    assert "### Unconditional (the paper's Table 2)" in text and "256 images from seed 0" in text
    assert "12.5 [1.0, 1.0]" in text and "33.33" in text and "11.11" in text and "22.22" not in text
    assert "class accuracy" not in text  # nothing to show without classes
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_trajectories_tell_copies_by_step(cifar):
    """Ten finished copies whose nL2 falls below that of thirty others half way."""
    from amg.verdict import Neighbour, TraceStep, Verdict

    def verdict(row: int) -> Verdict:
        copy = row < 10
        values = [1.8 + 0.01 * (row % 7)] * 3 + [1.2 if copy else 1.7] * 3
        trace = tuple(TraceStep(i, 0.0, -value, -1.6, 0) for i, value in enumerate(values))
        return Verdict("nl2", -values[-1], -1.4, Neighbour(0, "0", None), copy, trace=trace)

    found = cifar["trajectories"].by_step([verdict(row) for row in range(40)])
    assert [line["step"] for line in found] == list(range(6))
    assert all(abs(line["AUC"] - 0.5) < 0.1 for line in found[:3])
    assert [line["AUC"] for line in found[3:]] == [1.0] * 3
    assert [line["copies above 5 % of the others"] for line in found[3:]] == [1.0] * 3
    assert found[4]["nL2 of copies"] == pytest.approx(1.2)
    assert found[4]["nL2 of others"] == pytest.approx(1.7)


def test_sheet(cifar, tmp_path):
    from PIL import Image

    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(3, 3, 32, 32)
    cifar["sheet"].write_sheet(tmp_path / "sheet.png", [[red, 1 - red], [red]], size=32, gap=4)
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.size == (3 * 34, 3 * 34 + 4)
    places = ((16, 16), (84, 50), (50, 34 * 2 + 4 + 16))
    assert [sheet.getpixel(place) for place in places] == [(255, 0, 0), (0, 255, 255), (255, 0, 0)]


def test_markers(cifar):
    between = cifar["report"].between
    page = "a\n<!-- cifar: begin -->\nold\n<!-- cifar: end -->\nb\n"
    assert between(page, "cifar", "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="one pair of the markers"):
        between("nothing", "cifar", "new\n")


def test_committed_page_is_the_csv(cifar):
    results = ROOT / "benchmarks" / "results"
    for name, file in (("cifar", "cifar.csv"), ("cifar-validation", "cifar_validation.csv")):
        page = (ROOT / "docs" / "cifar.md").read_text()
        assert cifar["report"].between(page, name, cifar["report"].tables(results / file)) == page
    with (results / "cifar.csv").open(newline="") as lines:
        assert {line["condition"] for line in csv.DictReader(lines)} == {"unconditional", "class"}


def test_a_row_is_drawn_judged_and_recorded(cifar, small, network, tmp_path):
    """End to end on an untrained network of two steps: one line per row, none twice, pictures kept."""
    from argparse import Namespace

    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    subset = small[3]
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )  # fmt: skip
    pipe = DDPMPipeline(unet, DDIMScheduler())
    index = cifar["rows"].open_index(subset, tmp_path / "cifar.amg")
    copies = cifar["judging"].copy_judge(network, subset.distinct, torch.rand(10, 3, 32, 32))
    judges = cifar["judging"].Judges(subset.distinct, network, copies, subset.distinct, subset.labels)
    bench = cifar["bench_cifar"].Bench(pipe, index, subset, judges)
    arguments = Namespace(out=tmp_path / "out.csv", steps=2, seed=5, scale=1.5)
    rows = [row for condition in ("unconditional", "class") for row in cifar["rows"].main_rows(condition)[:3]]
    for _ in range(2):
        cifar["bench_cifar"].run(bench, rows, 3, arguments)
    with arguments.out.open(newline="") as lines:
        written = list(csv.DictReader(lines))
    names = ["off", "off, its copies left out", "real, not trained on", "main", "strong"]
    assert [line["guidance"] for line in written] == names * 2
    assert [float(line["evaluations/image"]) for line in written][::5] == [2.0, 4.0]
    assert float(written[2]["< 1.4 %"]) == 100  # the "held-out" images of this test are the training set
    assert float(written[2]["luminance judge %"]) == 100 and float(written[7]["class accuracy %"]) < 50
