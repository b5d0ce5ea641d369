"""`make bench`: what a user would run instead, beside it, in one run; a table, a picture and bench.json.

python tests/bench ASSETS WORK [--only LANE,…] [--rounds N] [--tiny] [--busy]

Each lane (LANES) checks that both sides do equally well before it prints how fast they are. Lanes that were not asked
for keep what bench.json says of them. A busy machine is refused; with --busy the figures are marked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import describe_machine, measure_busyness
from results import Bench, Row, format_table, write_picture

import job

LANES = {
    "train": "training",
    "checkpoint": "checkpoints",
    "store": "transfers",
    "onnx": "exports",
    "start": "starts",
}
ROUNDS, FEWEST_ROUNDS = 7, 7


def main() -> int:
    """Run the lanes and write what they found."""
    asked = _parse(sys.argv[1:])
    print(f"{describe_machine()}; job from {Path(job.__file__).parent}")
    folder = Path(asked.work).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found, failed = _read(folder / "bench.json"), False
    for name in asked.only.split(",") if asked.only else LANES:
        busyness = measure_busyness()
        print(f"\n== {name}: {busyness}", flush=True)
        if busyness.is_busy and not asked.busy:
            print("too busy to judge; wait, or add BUSY=1, which marks the figures")
            return 1
        bench = Bench(Path(asked.assets).absolute(), folder / name, asked.rounds, asked.tiny)
        bench.folder.mkdir(exist_ok=True)
        try:
            found[name] = _run_lane(name, bench, busyness.is_busy) | {"busyness": busyness.to_json()}
        except RuntimeError as error:  # not equally good, or something ended badly: the other lanes still count
            print(f"{name}: {error}", flush=True)
            failed = True
        (folder / "bench.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    _write(found, folder)
    return int(failed)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("assets")
    parser.add_argument("work")
    parser.add_argument("--only", default="", help=", ".join(LANES))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the first one is dropped")
    parser.add_argument("--tiny", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine, and mark the figures")
    asked = parser.parse_args(words)
    if unknown := set(filter(None, asked.only.split(","))) - set(LANES):
        parser.error(f"no such lane: {', '.join(sorted(unknown))}; there are {', '.join(LANES)}")
    return asked


def _run_lane(name: str, bench: Bench, busy: bool) -> dict[str, Any]:
    began = time.perf_counter()
    rows: list[Row] = importlib.import_module(LANES[name]).run_lane(bench)
    print(format_table(rows), flush=True)
    worth_little = busy or bench.tiny or bench.rounds < FEWEST_ROUNDS
    return {
        "rows": [row.to_json() for row in rows],
        "machine": describe_machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "rounds": bench.rounds,
        "worth_little": worth_little,
        "load_after": round(os.getloadavg()[0], 1),
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(found: dict[str, Any], folder: Path) -> None:
    text, everything = [], []
    for name in (lane for lane in LANES if lane in found):
        lane = found[name]
        rows = [Row.from_json(row) for row in lane["rows"]]
        everything += rows
        mark = " — **worth little: a busy machine, tiny sizes or few rounds**" if lane["worth_little"] else ""
        about = f"{lane['machine']}; {lane['date']}; {lane['rounds']} rounds, {lane['minutes']} minutes{mark}"
        text.append(f"### {name}\n\n{about}\n\n{format_table(rows)}\n")
    (folder / "bench.md").write_text("\n".join(text))
    write_picture(everything, folder)
    print(f"\n{folder / 'bench.md'}, bench.json and bench.png are written")


if __name__ == "__main__":
    sys.exit(main())
