"""diffusers' own pipeline tests on protected pipelines: every test that passes on plain ones has to pass.

python benchmarks/bench_diffusers_tests.py --tests FOLDER

FOLDER: a checkout of diffusers, in which `tests/pipelines` lies; nothing of it is kept. With --only the
figures of other pipelines stay. Each file runs three times (benchmarks/diffusers_tests/plugin.py): plain,
protected by `off`, protected by `main` with gates that stay closed. Tests that ask a hub for anything but
tiny tokenizers fail plain and do not count.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import diffusers
import torch

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "diffusers_tests.csv"
FILES = {
    "StableDiffusionPipeline": "stable_diffusion/test_stable_diffusion.py",
    "StableDiffusionImg2ImgPipeline": "stable_diffusion/test_stable_diffusion_img2img.py",
    "StableDiffusionInpaintPipeline": "stable_diffusion/test_stable_diffusion_inpaint.py",
    "StableDiffusionControlNetPipeline": "controlnet/test_controlnet.py",
    "StableDiffusionXLPipeline": "stable_diffusion_xl/test_stable_diffusion_xl.py",
    "StableDiffusionXLImg2ImgPipeline": "stable_diffusion_xl/test_stable_diffusion_xl_img2img.py",
    "StableDiffusion3Pipeline": "stable_diffusion_3/test_pipeline_stable_diffusion_3.py",
    "FluxPipeline": "flux/test_pipeline_flux.py",
}
MODES = ("plain", "off", "closed")


def passed(checkout: Path, file: str, mode: str) -> set[str]:
    """The tests of a file that pass in one mode."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-p", "benchmarks.diffusers_tests.plugin", "--amg", mode, f"tests/pipelines/{file}"]
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {f"{case.get('classname')}.{case.get('name')}" for case in cases if not len(case)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tests", type=Path, required=True, help="a checkout of diffusers")
    parser.add_argument("--only", nargs="*", choices=FILES, default=list(FILES), help="pipelines to test")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = []
    for pipeline in args.only:
        found = {mode: passed(args.tests, FILES[pipeline], mode) for mode in MODES}
        plain = found["plain"]
        lost = {mode: sorted(plain - found[mode]) for mode in MODES[1:]}
        kept = {mode: len(plain & found[mode]) for mode in MODES[1:]}
        print(pipeline, len(plain), kept, {mode: names for mode, names in lost.items() if names}, flush=True)
        names = ", ".join(sorted({name.rsplit(".", 1)[1] for all in lost.values() for name in all}))
        rows.append([pipeline, len(plain), kept["off"], kept["closed"], names])
    write(args.out, rows)


def write(path: Path, rows: list[list[object]]) -> None:
    """These rows, in the place of earlier ones of their pipelines, beside those of others."""
    header = ["pipeline", "plain", "off", "closed", "lost", "diffusers", "torch", "machine"]
    where = [diffusers.__version__, torch.__version__, platform.processor() or "CPU"]
    known: dict[object, list[object]] = {}
    if path.exists():
        with path.open(newline="") as file:
            known = {line[0]: [*line] for line in csv.reader(file) if line[0] in FILES}
    known |= {row[0]: [*row, *where] for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(known[name] for name in FILES if name in known)


if __name__ == "__main__":
    main()
