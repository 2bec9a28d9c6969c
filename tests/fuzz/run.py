"""Mutations of every file that is read: `python tests/fuzz/run.py --mutations 100000 [--target NAME]`.

Each has to give the package's own error, which names the file or the argument, or an answer. What does not is
written to --out, with what came of it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10.0  # more is a hang

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.fuzz.mutate import mutated
    from tests.fuzz.targets import TARGETS, Target, quietly
else:
    from .mutate import mutated
    from .targets import TARGETS, Target, quietly


@dataclass(frozen=True)
class Fault:
    """A content that was read as it should not have been, and how."""

    content: bytes
    what: str


class Fuzzed:
    """A target in a folder of its own, with its valid file's answer."""

    def __init__(self, target: Target, folder: Path):
        self.target, self.folder = target, folder
        self.file = target.make(folder)
        self.valid = self.file.read_bytes()
        self.answer = quietly(target.read, folder)

    def look(self, content: bytes) -> Fault | None:
        """What is wrong with how a content is read, None where nothing is."""
        self.file.write_bytes(content)
        start = time.monotonic()
        try:
            answer = quietly(self.target.read, self.folder)
        except self.target.errors as error:
            named = self.folder.name in str(error) or str(error).startswith("`")
            return None if named else Fault(content, f"names nothing: {type(error).__name__}: {error}")
        except Exception:
            return Fault(content, traceback.format_exc())
        finally:
            self.file.write_bytes(self.valid)
        if time.monotonic() - start > SECONDS:
            return Fault(content, f"took {time.monotonic() - start:.1f} s")
        wrong = self.target.same and repr(answer) != repr(self.answer)
        return Fault(content, f"another answer: {str(answer)[:300]}") if wrong else None


@contextmanager
def fuzzed(name: str) -> Iterator[Fuzzed]:
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        yield Fuzzed(TARGETS[name], Path(folder))


def faults(name: str, count: int, seed: int) -> Iterator[Fault]:
    """The faults among so many mutations of a target."""
    dice = random.Random(f"{seed} {name}")
    with fuzzed(name) as target:
        for _ in range(count):
            found = target.look(mutated(target.valid, dice))
            if found is not None:
                yield found


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=100_000, help="over all targets")
    parser.add_argument("--target", choices=[*TARGETS], action="append", help="these alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for what fails")
    options = parser.parse_args(arguments)
    names, total = options.target or [*TARGETS], 0
    for name in names:
        start, kinds = time.monotonic(), dict[str, int]()
        for number, fault in enumerate(faults(name, options.mutations // len(names), options.seed)):
            kind = fault.what.strip().splitlines()[-1][:160]
            kinds[kind] = kinds.get(kind, 0) + 1
            total += 1
            if options.out is not None:
                path = options.out / f"{name.replace('/', '_')}-{number}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(fault.content)
                path.with_suffix(".txt").write_text(fault.what)
        print(f"{name}: {sum(kinds.values())} faults, {time.monotonic() - start:.1f} s", flush=True)
        for kind, count in sorted(kinds.items(), key=lambda pair: -pair[1]):
            print(f"    {count} x {kind}", flush=True)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
