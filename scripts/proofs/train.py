"""The rows of `scripts/prove train`: that it trains, with the right bits, exactly once, and ends cleanly."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from test_architecture import FLOORS
from test_bits import OPTIMIZERS

import distgd
from distgd.policy import Immediate
from distgd.sources import Order
from proofs import outside, poisoned, way_in
from proofs.bits import COVERING, Case, distance_to_whole_batch, same_as_plain_torch
from proofs.rows import Bench, Measured, Proof
from proofs.staleness import Setting
from proofs.trials import events, ray_cluster

proof = Proof()

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
POINTS = 10  # that a curve has at least
WATCHED = ("train/loss", "eval/accuracy", "throughput/samples_per_s")


def falls(run_dir: str | Path) -> tuple[float, float, bool]:
    """The mean training loss of the first and of the last tenth of a run's steps, and whether it fell."""
    losses = [float(event["metrics"]["train/loss"]) for event in events(run_dir, "step")]
    tenth = max(1, len(losses) // 10)
    first, last = statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])
    return first, last, last < first


# It trains.


def quickstart(bench: Bench, *overrides: str) -> outside.Ended:
    """The quickstart through the command line, a third of it for the short form."""
    short = ["stop.epochs=12"] if bench.quick else []
    return outside.distgd("train", QUICKSTART, *overrides, *short, "--json", cwd=bench.folder).checked()


@proof.row(f"eval/accuracy >= 0.95 in under 60 s; {', '.join(WATCHED)} with {POINTS} points or more each in MLflow")
def quickstart_trains(bench: Bench) -> Measured:
    """`distgd train configs/quickstart.yaml` trains digits on Ray, with 2 workers and 2 servers."""
    from mlflow import MlflowClient

    ended = quickstart(bench)
    accuracy = ended.result["metrics"]["eval/accuracy"]
    store = MlflowClient(f"sqlite:///{bench.folder / 'mlflow.db'}")
    points = {name: len(store.get_metric_history(ended.result["mlflow_run_id"], name)) for name in WATCHED}
    counts = ", ".join(f"{name} {count} points" for name, count in points.items())
    holds = accuracy >= 0.95 and ended.seconds < 60 and min(points.values()) >= POINTS
    return Measured(f"eval/accuracy {accuracy:.3f} in {ended.seconds:.1f} s; {counts}", holds, "an empty folder")


def reaches(bench: Bench, *overrides: str) -> Measured:
    """The quickstart with overrides against an accuracy of 0.94."""
    ended = quickstart(bench, *overrides)
    accuracy, stale = ended.result["metrics"]["eval/accuracy"], ended.result["staleness"]["max"]
    found = f"eval/accuracy {accuracy:.3f} in {ended.seconds:.1f} s, staleness {stale:g} at most"
    return Measured(found, accuracy >= 0.94, " ".join(overrides))


@proof.row("eval/accuracy >= 0.94")
def bounded_trains(bench: Bench) -> Measured:
    """The quickstart trains with bounded staleness."""
    return reaches(bench, "consistency.mode=bounded", "consistency.staleness=2")


@proof.row("eval/accuracy >= 0.94")
def async_trains(bench: Bench) -> Measured:
    """The quickstart trains asynchronously."""
    return reaches(bench, "consistency.mode=async")


# Bounded staleness.


@proof.row("never above s, never stuck, every weight 3; with enforcement taken out, above s in every setting")
def bound_holds(bench: Bench) -> Measured:
    """Bounded mode keeps its bound s and never gets stuck, with a slow and with a lost worker."""
    settings = [Setting(*each) for each in product((2, 4, 8, 16), (0, 1, 2, 4, 16), (1, 3))]
    seeds, troubles = range(1 if bench.quick else 20), ("slow", "lost")
    above = [
        (setting, seed, trouble)
        for setting, seed, trouble in product(settings, seeds, troubles)
        if setting.worst(seed, trouble) > setting.staleness
    ]
    with mock.patch.object(Immediate, "feasible", return_value=True):
        # s = 0 grants one slot at a time, so that nothing is left to enforce at the shards.
        breakable = [setting for setting in settings if setting.staleness]
        broken = [s for s in breakable if max(s.worst(seed, "slow") for seed in seeds[:3]) > s.staleness]
    runs = len(settings) * len(seeds) * len(troubles)
    found = f"{runs - len(above)} of {runs} runs within s, none stuck; without enforcement {len(broken)} of "
    found += f"{len(breakable)} settings above s"
    holds = not above and len(broken) == len(breakable)
    return Measured(
        found,
        holds,
        f"in process, virtual time; workers 2-16, s 0-16, shards 1 and 3, {len(seeds)} seeds; "
        "s = 0 is kept by the grant of one slot at a time alone",
    )


# The bits.


@proof.row("one weights_sha256 for workers 1-4 x servers 1-3, in each case")
def same_bits_in_process(bench: Bench) -> Measured:
    """The same bits for any number of workers and servers, in process, over optimizers, slots and models."""
    slots = (3, 8) if bench.quick else (3, 4, 5, 8)
    who = [(1, 1), (3, 2)] if bench.quick else list(product((1, 2, 3, 4), (1, 2, 3)))
    cases = [Case(*case) for case in product(("odd shapes", "digits"), OPTIMIZERS, slots)]
    several = [case for case in cases if len({case.in_process(*each) for each in who}) > 1]
    found = f"one in {len(cases) - len(several)} of {len(cases)} cases, {len(cases) * len(who)} runs"
    found += f"; several in {several}" if several else ""
    conditions = f"{', '.join(OPTIMIZERS)}; slots {', '.join(map(str, slots))}; dropout, BatchNorm, uneven last batch"
    return Measured(found, not several, conditions)


@proof.row("the weights_sha256 of one worker and one server in process, in each case")
def same_bits_on_ray(bench: Bench) -> Measured:
    """The same bits on Ray, over a covering set."""
    cases = COVERING[1:3] if bench.quick else COVERING
    with ray_cluster():
        other = [
            f"{case} with {workers} workers and {servers} servers"
            for case, workers, servers in cases
            if case.on_ray(workers, servers, bench.folder) != case.in_process(1, 1)
        ]
    found = f"{len(cases) - len(other)} of {len(cases)} runs" + (f"; other bits: {other}" if other else "")
    return Measured(found, not other, "one Ray cluster for all")


@proof.row("the same weights_sha256 with each optimizer")
def bits_of_plain_torch(bench: Bench) -> Measured:
    """The bits are those of a plain single-process torch loop that adds slots in the tree's order."""
    steps = 10 if bench.quick else 100
    same = [name for name in OPTIMIZERS if same_as_plain_torch(name, steps)]
    found = f"the same for {', '.join(same) or 'none'} after {steps} steps"
    return Measured(found, len(same) == len(OPTIMIZERS), "3 workers, 2 servers, 5 slots, in process")


@proof.row("norm of the difference over norm <= 1e-12 after 100 steps in float64; float32 is reported")
def mathematics_of_the_whole_batch(bench: Bench) -> Measured:
    """Slots are the mathematics of the whole batch at once."""
    double, single = (distance_to_whole_batch(dtype, steps=100) for dtype in (torch.float64, torch.float32))
    return Measured(f"float64 {double:.1e}, float32 {single:.1e}", double <= 1e-12, "Adam, no dropout, in process")


# Exactly once.


def counting(bench: Bench, *overrides: str) -> distgd.Result:
    """`configs/counting.yaml` on Ray."""
    samples, storage = 64 if bench.quick else 1024, f"run.storage={bench.folder}"
    config = str(CONFIGS / "counting.yaml")
    return distgd.train(config, f"task.args.samples={samples}", storage, "cluster.start_timeout=120", *overrides)


@proof.row("every weight is exactly 3, in sync, bounded and async")
def every_sample_counts_once(bench: Bench) -> Measured:
    """After 3 epochs of `counting` on Ray every sample was applied 3 times."""
    per_slot = "optimizer.lr=4"  # in bounded and async an update has the samples of one slot
    modes = {
        "sync": (),
        "bounded": ("consistency.mode=bounded", per_slot),
        "async": ("consistency.mode=async", per_slot),
    }
    with ray_cluster():
        weights = {mode: Counter(counting(bench, *given).state_dict["w"].tolist()) for mode, given in modes.items()}
    found = "; ".join(
        f"{mode}: " + ", ".join(f"{count} weights {value:g}" for value, count in counts.items())
        for mode, counts in weights.items()
    )
    return Measured(found, all(set(counts) == {3.0} for counts in weights.values()), "2 workers, 2 servers")


@proof.row("zeros == the ledger's dropped samples, the same ones, and more than none")
def quorum_drops_what_the_ledger_says(bench: Bench) -> Measured:
    """Under a quorum, after one epoch of `counting` on Ray, the weights that are 0 are the dropped samples."""
    with ray_cluster():
        result = counting(bench, "consistency.quorum=3", "stop.epochs=1")
    weights = result.state_dict["w"]
    lines = (Path(result.run_dir) / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    gone = [line for line in map(json.loads, lines) if line["state"] == "dropped"]
    order = Order(len(weights), 16, result.slots, seed=0)
    dropped = {int(i) for line in gone for i in order.indices(line["step"], line["slot"])}
    counted = sum(line["last"] - line["first"] + 1 for line in gone)
    zeros = {int(i) for i in (weights == 0).nonzero()}
    found = f"{len(zeros)} of {len(weights)} weights are 0, {counted} samples dropped, {len(zeros & dropped)} the same"
    return Measured(found, zeros == dropped and len(zeros) == counted > 0, "quorum 3 of 4 slots")


# More models and data.


@proof.row("the loss falls")
def batch_of_one(bench: Bench) -> Measured:
    """`batch.size: 1` trains with 2 workers at the defaults."""
    config = {"task": "digits", "batch": {"size": 1}, "stop": {"steps": 400} if bench.quick else {"epochs": 2}}
    with ray_cluster():
        result = distgd.train({**config, "run": {"storage": str(bench.folder)}, "tracking": {"uri": "none"}})
    first, last, fell = falls(result.run_dir)
    found = f"train/loss {first:.3f} over the first tenth of {result.steps} steps, {last:.3f} over the last"
    return Measured(found, fell and result.workers == 2, f"digits, SGD, {result.slots} slot")


@proof.row("eval/loss < 2.0 nats a character in under ten minutes")
def char_lm_learns(bench: Bench) -> Measured:
    """`configs/char-lm.yaml` learns the characters of a text of 1 MB on 2 cores."""
    short = ["stop.steps=60", "schedule.warmup=10", "eval.every.steps=30"] if bench.quick else []
    ended = outside.distgd("train", str(CONFIGS / "char-lm.yaml"), *short, "--json", cwd=bench.folder).checked()
    first, last, fell = falls(ended.result["run_dir"])
    loss, steps = ended.result["metrics"]["eval/loss"], ended.result["steps"]
    found = f"eval/loss {loss:.3f} after {steps} steps in {ended.seconds:.0f} s; train/loss {first:.2f} -> {last:.2f}"
    if bench.quick:
        return Measured(found, fell, f"{steps} steps", demanded="train/loss falls")
    return Measured(found, loss < 2.0 and ended.seconds < 600, "the Python standard library's source, first 1 MB")


# Bad input and divergence.

REFUSED = {
    "batch.sise=8": ("batch.sise", "8", "size, slots", "did you mean batch.size?"),
    "optimzer.lr=1": ("optimzer", "1", "optimizer, schedule", "did you mean optimizer?"),
    "eval.every.step=5": ("eval.every.step", "5", "steps, seconds, epochs", "did you mean eval.every.steps?"),
    "task.args.hiden=5": ("task.args.hiden", "5", "hidden, dropout", "did you mean hidden?"),
    "task=digit": ("task.name", "'digit'", "char-lm, counting, digits", "did you mean digits?"),
    "consistency.mode=asink": ("consistency.mode", "'asink'", "sync, bounded, async", "did you mean async?"),
    "optimizer.name=adamm": ("optimizer.name", "'adamm'", "sgd, adam, adamw", "did you mean adam"),
    "schedule.name=cosin": ("schedule.name", "'cosin'", "linear, cosine", "did you mean cosine?"),
    "batch.size=0": ("batch.size", "0", "an integer >= 1 or full"),
    "batch.slots=64": ("batch.slots", "64", "at most batch.size=32"),
    "batch.size=100000": ("batch.size", "100000", "at most the 1437 samples"),
    "cluster.workers=2.5": ("cluster.workers", "2.5", "an integer >= 1"),
    "stop.epochs=-1": ("stop.epochs", "-1", "an integer >= 1"),
    "consistency.staleness=2": ("consistency.staleness", "2", "null with consistency.mode=sync"),
    "cluster.address=ray://x:1": ("cluster.address", "'ray://x:1'", "host:port or auto"),
    "data.path=/nowhere": ("data.path", "'/nowhere'", "expected null"),
}
"""What is typed, and what the message must name: key, value, what is allowed, the nearest known name."""


def told_well(typed: str, folder: Path) -> bool:
    """Whether a bad override ends with exit code 2 and one line that names what it must, and starts nothing."""
    ended = outside.distgd("train", QUICKSTART, "stop.steps=1", typed, cwd=folder)
    one_line = len(ended.err.splitlines()) == 1 and not ended.out
    named = all(word in ended.err for word in REFUSED[typed])
    return ended.code == 2 and one_line and named and "Traceback" not in ended.err and not any(folder.iterdir())


@proof.row("exit 2, one line with key, value and what is allowed, the nearest name; no traceback, nothing written")
def bad_config_is_told(bench: Bench) -> Measured:
    """A bad config ends with one message that says what to do."""
    typed = list(REFUSED)[::4] if bench.quick else list(REFUSED)
    badly = [override for override in typed if not told_well(override, bench.folder)]
    found = f"{len(typed) - len(badly)} of {len(typed)} cases" + (f"; not so: {badly}" if badly else "")
    return Measured(found, not badly, "distgd train configs/quickstart.yaml KEY=VALUE")


def poisoned_run(folder: Path) -> list[str]:
    """Arguments of a run that ends with a NaN, and its task beside it."""
    shutil.copy(poisoned.__file__, folder / "poisoned.py")
    config = {"task": {"path": "poisoned:Poisoned"}, "batch": {"size": 16, "slots": 4}, "stop": {"epochs": 2}}
    (folder / "poisoned.yaml").write_text(json.dumps({**config, "tracking": {"uri": "none"}}), encoding="utf-8")
    return ["train", "poisoned.yaml", "optimizer.lr=0.01"]


@proof.row("exit 3; the message names step and slot of the bad sample; no traceback")
def nan_is_told(bench: Bench) -> Measured:
    """A NaN loss ends the run and says where."""
    ended = outside.distgd(*poisoned_run(bench.folder), "optimizer.clip.norm=1", cwd=bench.folder)
    order = Order(poisoned.SAMPLES, 16, 4, seed=0)
    step, slot = next(at for at in product(range(4), range(4)) if poisoned.BAD in order.indices(*at))
    said = next((line for line in ended.err.splitlines() if line.startswith("distgd: step")), "no line of ours")
    holds = ended.code == 3 and said.startswith(f"distgd: step {step}, slot {slot}:") and "Traceback" not in ended.err
    return Measured(f"exit {ended.code}: {said[:120]}", holds, f"the bad sample is in step {step}, slot {slot}")


# The end.

GONE = 10.0  # seconds after a run's end


@proof.row(f"exit 0, 3 and 130; no process, folder, segment or socket within {GONE:g} s")
def nothing_is_left(bench: Bench) -> Measured:
    """Nothing is left after success, failure (a NaN) and Ctrl-C."""
    folder = bench.folder
    counts = ["train", str(CONFIGS / "counting.yaml")]
    endless = ["train", QUICKSTART, "stop.epochs=100000", "tracking.uri=none", "run.name=endless"]
    numbers = folder / "runs" / "endless" / "metrics.jsonl"
    ends = {
        0: outside.aftermath(*counts, cwd=folder, patience=GONE),
        3: outside.aftermath(*poisoned_run(folder), cwd=folder, patience=GONE),
        130: outside.aftermath(
            *endless, cwd=folder, patience=GONE, interrupt=lambda: numbers.exists() and numbers.stat().st_size > 0
        ),
    }
    found = "; ".join(
        f"exit {end.code}{'' if end.code == code else f' ({end.said})'}, {end.processes} processes, "
        + (f"left {sorted(end.left)}" if end.left else f"nothing left after {end.seconds:.1f} s")
        for code, end in ends.items()
    )
    clean = all(end.code == code and end.processes > 5 and not end.left for code, end in ends.items())
    return Measured(found, clean, "processes: the most seen at once")


@proof.row("< 0.5 s, median of 5")
def help_is_quick(bench: Bench) -> Measured:
    """`distgd --help` answers at once."""
    seconds = [outside.distgd("--help", cwd=bench.folder).checked().seconds for _ in range(5)]
    return Measured(f"{statistics.median(seconds):.2f} s", statistics.median(seconds) < 0.5)


@proof.row("all pass in under 30 s, with imports of Ray refused")
def pure_tests_are_quick(bench: Bench) -> Measured:
    """The tests of floors 0 and 1 run in seconds and without Ray."""
    rooms = sorted(room for room, floor in FLOORS.items() if floor <= 1)
    files = [f"tests/test_{room}.py" for room in rooms if (ROOT / f"tests/test_{room}.py").exists()]
    without_ray = "import sys; sys.modules['ray'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    chosen = files[:3] if bench.quick else files
    ended = outside.run([sys.executable, "-c", without_ray, "-q", "-p", "no:cacheprovider", *chosen], ROOT)
    last = ended.out.strip().splitlines()[-1] if ended.out.strip() else ended.err[-200:]
    names = ", ".join(Path(file).stem for file in chosen)
    return Measured(f"{last}; {ended.seconds:.1f} s with start", ended.code == 0 and ended.seconds < 30, names)


@proof.row("the same outputs, bit by bit, with imports of distgd refused")
def logged_model_loads_back(bench: Bench) -> Measured:
    """The model in MLflow loads back in plain torch and is the one of `model.safetensors`."""
    result = outside.distgd("train", QUICKSTART, "stop.epochs=1", "--json", cwd=bench.folder).checked().result
    script, weights = str(Path(__file__).with_name("load_back.py")), f"{result['run_dir']}/model.safetensors"
    store = f"sqlite:///{bench.folder / 'mlflow.db'}"
    ended = outside.run([sys.executable, script, store, result["mlflow_run_id"], weights], bench.folder).checked()
    difference = float(ended.out.splitlines()[-1])
    return Measured(f"largest difference {difference:g} over 17 images", difference == 0.0, "mlflow.pytorch.load_model")


proof.extend(way_in.proof)
