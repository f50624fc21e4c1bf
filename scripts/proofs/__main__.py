"""`scripts/prove NAME [--quick] [--row N]`: run a proof's rows; exit 0 if all pass, 1 on a miss, 2 on bad arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from proofs.rows import Outcome, Page, Proof

PROOFS = ("train", "speed", "scaling", "faults")
DOCS = Path(__file__).parents[2] / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows asked for, printing each as it ends; a full run is written down, each row as it ends."""
    parser = argparse.ArgumentParser(prog="scripts/prove", description=__doc__)
    parser.add_argument("name", metavar="NAME", choices=PROOFS, help=f"one of: {', '.join(PROOFS)}")
    parser.add_argument("--quick", action="store_true", help="a shortened form of each row; nothing is written")
    parser.add_argument("--row", type=int, metavar="N", action="append", help="row N alone; may be repeated")
    parser.add_argument(
        "--keep", action="store_true", help="write what --row measures in the place of what was written"
    )
    asked = parser.parse_args(arguments)
    proof: Proof = import_module(f"proofs.{asked.name}").proof
    rows = [row for row in proof.rows if asked.row is None or row.number in asked.row]
    if not rows or len(rows) < len(set(asked.row or ())):
        parser.error(f"--row: expected 1 to {len(proof.rows)}, found {asked.row}")
    if asked.keep and asked.quick:
        parser.error("--keep: a shortened form is not written down; leave --quick out")
    page = None if asked.quick or (asked.row and not asked.keep) else Page(DOCS / f"{asked.name}.md")
    outcomes: list[Outcome] = []
    for row in rows:
        outcomes.append(row.run(quick=asked.quick))
        print(outcomes[-1].text(), flush=True)
        if page is not None:  # at once: what ends before the last row leaves what it has measured
            known = page.merged(proof.rows, outcomes)
            page.write(asked.name, known, proof.draw(known, DOCS / "img"))
    missed, skipped = ([o.number for o in outcomes if o.verdict == verdict] for verdict in ("MISS", "skip"))
    told = "".join(f"; {what}: {rows}" for what, rows in (("missed", missed), ("skipped", skipped)) if rows)
    print(f"{len(outcomes) - len(missed) - len(skipped)} of {len(outcomes)} pass{told}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
