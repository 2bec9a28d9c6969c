"""An audit from its command line to its files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.commands.audit import bundled
from amg.commands.audit.draw import draw, rehearse_all
from amg.commands.audit.environment import environment
from amg.commands.audit.folder import hold_settings, read_records, settings_of
from amg.commands.audit.judges import (
    Judges,
    Looked,
    Scorer,
    distinct_names,
    look,
    named_index,
    require_unseen,
    try_out,
)
from amg.commands.audit.measure import measures
from amg.commands.audit.page import write_page
from amg.commands.audit.plan import Plan, Prompt, make_guidances, make_jobs, read_prompts
from amg.commands.audit.references import References, Seen, look_through, of_index, of_path
from amg.commands.audit.tables import table_of, write_csv, write_json, write_parquet
from amg.extras import require
from amg.replacing import held
from amg.report import table_text


def run(arguments: argparse.Namespace, command: str) -> int:
    """Draw, judge, write; returns the exit status. All input is checked before the first picture is drawn."""
    from amg.commands.indexes import open_also, open_index
    from amg.commands.sample import default_scale, open_model

    _check(arguments)
    require(("tqdm", "pyarrow"), "an audit")
    require(("jinja2", "PIL"), "an audit's report", "report")
    listed = None if arguments.prompts is None else read_prompts(arguments.prompts)
    pipe = open_model(arguments.model, arguments.scheduler, arguments.device)
    index = open_index(arguments.index, arguments.embedder, arguments.device)
    also = open_also(arguments)
    scale = default_scale(pipe) if arguments.guidance_scale is None else arguments.guidance_scale
    prompts, images = _prompts(listed, pipe, arguments.images)
    guidances = make_guidances(arguments.guidance, arguments.config, index.metric, scale)
    plan = Plan(guidances, make_jobs(prompts, images, arguments.seed), arguments.steps, arguments.batch_size)
    judges = judges_of(arguments, pipe, index, also)
    rehearse_all(pipe, index, also, plan)
    try_out(judges, picture_size(pipe), prompts[0].caption, arguments.device)
    options = {**vars(arguments), "guidance_scale": scale}
    settings = settings_of(pipe, arguments.model, index, also, prompts, options)
    with held(arguments.out):
        hold_settings(arguments.out, settings)
        draw(pipe, index, also, plan, arguments.out, arguments.device)
        columns, seen = judge(plan, judges, arguments)
        _write(arguments, plan, columns, seen, judges, settings, command)
    return 0


def picture_size(pipe: Any) -> tuple[int, int]:
    """Height and width of the pictures that a pipeline draws."""
    from amg.pipelines.conditions import size_of
    from amg.pipelines.denoiser import is_latent

    factor = pipe.vae_scale_factor if is_latent(pipe) else 1
    height, width = size_of(pipe, None, None)
    return factor * height, factor * width


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("images", 1), ("batch_size", 1), ("steps", 2), ("report_pictures", 1)):
        if getattr(arguments, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"`{option}` must be >= {least}, got {getattr(arguments, name)}")
    if len(arguments.judge) != len(arguments.judge_embedder):
        raise ValueError(
            "`--judge-embedder` must be given once per `--judge`, got "
            f"{len(arguments.judge_embedder)} for {len(arguments.judge)}"
        )
    if arguments.clip and arguments.open_clip:
        raise ValueError("`--clip` and `--open-clip` must not both be given")


def _prompts(listed: tuple[Prompt, ...] | None, pipe: Any, images: int) -> tuple[tuple[Prompt, ...], int]:
    """The prompts and the pictures per prompt; a model without prompts gets one empty prompt per picture."""
    from amg.pipelines.denoiser import is_latent
    from amg.pipelines.supported import network_of

    takes = is_latent(pipe) or getattr(network_of(pipe).config, "num_class_embeds", None) is not None
    if listed is not None:
        if not takes:
            raise ValueError("`--prompts` must be left out: this model takes neither prompts nor classes")
        return listed, images
    if is_latent(pipe):
        raise ValueError("`--prompts` must be given for a text-to-image model")
    return (Prompt("", "unconditional"),) * images, 1


def judges_of(arguments: argparse.Namespace, pipe: Any, index: Any, also: list[Any]) -> Judges:
    """Everybody the command line and the model itself bring to judge, and why somebody is missing."""
    name, device = bundled.bundled_name(arguments.model, pipe), arguments.device
    given = zip(arguments.judge, arguments.judge_embedder, strict=True)
    further = [named_index(path, spec, device) for path, spec in given]
    require_unseen(further, [index, *also])
    names = [judge for judge, _ in further]
    if len(set(names)) != len(names):
        raise ValueError(f"`--judge` must be indexes of different embedders, got {', '.join(names)}")
    missing: dict[str, str] = {}
    if not further and name is None:
        missing["another embedder"] = "give --judge INDEX and --judge-embedder NAME"
    references = references_of(arguments, name, [index, *also, *(one for _, one in further)])
    if references is None:
        missing["references"] = "the training images are needed: give --images-of-index"
    network = network_of(arguments.fid_network or ("photos-judge" if name else None), device)
    if network is None:
        missing["network"] = "give --fid-network"
    else:
        require(["torchmetrics"], "FID and KID")
    alignment = alignment_of(arguments, name)
    if alignment is None:
        missing["alignment"] = "give --clip or --open-clip"
    return Judges(
        index,
        tuple(zip(distinct_names(also), also, strict=True)),
        tuple(further),
        bundled.copy_judges(device) if name else (),
        alignment,
        network,
        references,
        missing,
    )


def references_of(arguments: argparse.Namespace, name: str | None, indexes: list[Any]) -> References | None:
    """The training images: those named, a pixel index's, or a bundled model's."""
    if arguments.images_of_index is not None:
        return of_path(arguments.images_of_index)
    for index in indexes:
        if index.metric == "nl2":
            return of_index(index)
    return None if name is None else bundled.bundled_references(name)


def network_of(spec: str | None, device: str) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    """The FID network and its name."""
    from amg import embed

    if spec is None:
        return None
    if spec == "photos-judge":
        return spec, bundled.fid_features(device)
    kind, _, path = spec.partition(":")
    if kind == "torchscript":
        if not Path(path).is_file():
            raise FileNotFoundError(f"`--fid-network` must name a TorchScript file, got {path!r}")
        return f"TorchScript {Path(path).name}", torch.jit.load(path, map_location=device).eval()
    embedder = embed.load(spec)
    name = embedder.name
    return name, embedder.to(device) if isinstance(embedder, torch.nn.Module) else embedder


def alignment_of(arguments: argparse.Namespace, name: str | None) -> Scorer | None:
    """Who scores text alignment."""
    from amg.evaluate.clip import load_clip, load_open_clip_alignment

    if arguments.clip is not None:
        return load_clip(arguments.clip, arguments.device)
    if arguments.open_clip is not None:
        return load_open_clip_alignment(arguments.open_clip, arguments.device)
    return None if name is None else bundled.SubjectAlignment(arguments.device)


def judge(plan: Plan, judges: Judges, arguments: argparse.Namespace) -> tuple[dict[str, Looked], Seen | None]:
    """Read back what was drawn and show it to every judge."""
    columns = {}
    for guidance in plan.guidances:
        records = read_records(arguments.out / guidance.name, plan.jobs)
        columns[guidance.name] = look(records, judges, plan.batch_size, arguments.device, guidance.name)
    if judges.references is None:
        return columns, None
    small = {name: one.small for name, one in columns.items()}
    wanted = {record.verdict.neighbour.id for one in columns.values() for record in one.records}
    size = next(iter(columns.values())).size
    network = None if judges.network is None else judges.network[1]
    return columns, look_through(judges.references, small, size, network, wanted, arguments.device)


def _write(
    arguments: argparse.Namespace,
    plan: Plan,
    columns: dict[str, Looked],
    seen: Seen | None,
    judges: Judges,
    settings: dict[str, Any],
    command: str,
) -> None:
    out, names, where = arguments.out, [one.name for one in plan.guidances], environment(arguments.device)
    rows, notes = measures(columns, seen, judges), _notes(judges, seen)
    table = table_of(rows, names, notes)
    write_json(out / "table.json", rows, settings, notes, where)
    write_csv(out / "table.csv", rows, columns, settings, where)
    count = write_parquet(out / "images.parquet", columns, where)
    model = Path(arguments.model).name
    page = write_page(
        out / "report" / "index.html",
        model,
        plan,
        columns,
        seen,
        judges,
        table,
        settings,
        command,
        arguments.report_pictures,
    )
    print(f"\n{model}: {len(plan.jobs)} pictures per guidance, {plan.steps} steps\n{table_text(table)}\n")
    print(f"{out}/table.json, table.csv, images.parquet ({count} rows of one picture and step)")
    print(f"report: {page}")


def _notes(judges: Judges, seen: Seen | None) -> list[str]:
    if seen is None or judges.references is None:
        return []
    left = f", {seen.unreadable} unreadable ones left out" if seen.unreadable else ""
    notes = [f"training images compared with: {seen.count}, {judges.references.name}{left}"]
    if seen.features is not None:
        notes.append(
            "FID and KID: against those images; with few pictures FID is biased upwards, so compare it only "
            "within this table"
        )
    return notes
