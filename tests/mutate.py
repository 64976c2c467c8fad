"""Whether the tests notice faults: a seeded sample of mutants, each against the tests that run its line.

    make mutate                                        # 300 mutants of all rooms; exit 1 under 95 % noticed
    make mutate ARGS="--rooms selection csrc --count 60 --seed 3 --jobs 2"

Works on copies of the tree. Every mutant gets a forked process with torch loaded already; it stops at the first test
that fails. What runs which line is recorded once and kept in build/mutate until sources or tests change. csrc has no
such record: its mutants are compiled, and meet the tests whose name says csrc. Survivors that no test can tell from
the original are listed in mutants.txt, each with its reason, and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import importlib
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import coverage
import pytest
from mutators import Mutant, mutants_of

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "mutate"
KNOWN = ROOT / "tests" / "mutants.txt"
PACKAGE = "childtune_kernels"
LEFT_OUT = (
    f"{PACKAGE}/cli/",
    f"{PACKAGE}/ops/triton/",
    f"{PACKAGE}/__",
    "csrc/cuda/",
    "csrc/ops.h",
    "csrc/registration",
)
BAR = 0.95
LONGEST = 20.0  # seconds of a test that is still run
UNBUILT, BROKEN = 77, 78  # exit status of a mutant that does not compile, and where this script itself fails
SHARED = ("conftest.py", "cases.py", "models.py", "oracles.py")  # test modules that several test files import


def rooms(names: list[str]) -> list[str]:
    """Return the source files to mutate: all, or those with one of the names in their path."""
    files = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]
    paths = sorted(str(file.relative_to(ROOT)) for file in files)
    paths = [path for path in paths if not path.startswith(LEFT_OUT)]
    return [path for path in paths if not names or any(name in path for name in names)]


def in_children(tasks: list, run: Callable, slots: list[Path]) -> Iterator[tuple]:
    """Run run(task, slot) for every task in a process of its own, one a slot at a time; yield (task, slot, status)."""
    waiting, running, free = list(reversed(tasks)), {}, list(slots)
    while waiting or running:
        while waiting and free:
            task, slot = waiting.pop(), free.pop()
            pid = os.fork()
            if pid == 0:
                os._exit(_child(run, task, slot))
            running[pid] = task, slot
        pid, status = os.wait()
        with contextlib.suppress(ProcessLookupError):  # what it started goes with it
            os.killpg(pid, signal.SIGKILL)
        task, slot = running.pop(pid)
        if os.waitstatus_to_exitcode(status) == BROKEN:
            raise RuntimeError((slot / "log.txt").read_text(encoding="utf-8"))
        free.append(slot)
        yield task, slot, os.waitstatus_to_exitcode(status)


def _child(run: Callable, task, slot: Path) -> int:
    os.setsid()
    os.chdir(slot)
    os.environ.update(PYTHONPATH=str(slot), PYTHONDONTWRITEBYTECODE="1")
    sys.path[:0] = [str(slot)]
    sys.dont_write_bytecode = True  # a mutant may be as long and as old as the original, which is all that .pyc tells
    log = os.open(slot / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        return int(run(task, slot))
    except BaseException:
        traceback.print_exc()
        return BROKEN


class _Recorder:
    """A pytest plugin: the lines that each passing test runs, and how long it takes."""

    def __init__(self, root: Path):
        self.coverage = coverage.Coverage(data_file=None, source=[str(root / PACKAGE)])
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.coverage.switch_context(item.nodeid)
        result = yield
        self.coverage.switch_context("")
        return result

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


def record(task: tuple[str, Path], slot: Path) -> int:
    """Write what the tests of a file run: test -> seconds, and path -> line -> tests ('' while importing)."""
    test_file, record_path = task
    recorder = _Recorder(slot)
    pytest.main(["-q", "-p", "no:cacheprovider", test_file], plugins=[recorder])
    recorder.coverage.stop()
    data = recorder.coverage.get_data()
    seconds = {test: s for test, s in recorder.seconds.items() if test not in recorder.failed}
    lines = {
        str(Path(path).relative_to(slot)): {n: set(c) for n, c in data.contexts_by_lineno(path).items()}
        for path in data.measured_files()
    }
    record_path.write_bytes(pickle.dumps((seconds, lines)))
    return 0


def _record_path(test_file: str) -> Path:
    parts = [*sorted((ROOT / PACKAGE).rglob("*.py")), *(ROOT / "tests" / name for name in SHARED), ROOT / test_file]
    digest = hashlib.sha256(b"\0".join(part.read_bytes() for part in parts)).hexdigest()[:16]
    return CACHE / f"{Path(test_file).stem}-{digest}.pkl"


class Tests:
    """Which tests notice what: the records of all test files."""

    def __init__(self, slots: list[Path]):
        CACHE.mkdir(parents=True, exist_ok=True)
        files = [str(f.relative_to(ROOT)) for f in sorted((ROOT / "tests").glob("test_*.py"))]
        paths = {file: _record_path(file) for file in files}
        missing = [task for task in paths.items() if not task[1].exists()]
        for (file, _), _, status in in_children(missing, record, slots):
            print(f"recorded {file}" if status == 0 else f"{file} was NOT recorded", flush=True)
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for path in paths.values():
            seconds, lines = pickle.loads(path.read_bytes()) if path.exists() else ({}, {})
            self.seconds.update({test: s for test, s in seconds.items() if s <= LONGEST})
            for source, own in lines.items():
                for line, tests in own.items():
                    self.lines[source][line] |= tests

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests to run, first one case of each test function, the quickest first, then the second cases."""
        if mutant.path.endswith(".py"):
            own = self.lines[mutant.path]
            lines = [line for line in range(mutant.first, mutant.last + 1) if line in own]
            lines = lines or [max((line for line in own if line < mutant.first), default=0)]  # constants have no code
            found = set().union(*(own.get(line, set()) for line in lines))
            if "" in found:  # runs while importing: what runs anything of the file may notice
                found = set().union(*own.values())
        else:
            found = {test for test in self.seconds if "csrc" in test and "cuda" not in test}
        seen: Counter = Counter()
        order = []
        for test in sorted(found & self.seconds.keys(), key=lambda test: (self.seconds[test], test)):
            function = test.partition("[")[0]
            order.append((seen[function], len(order), test))
            seen[function] += 1
        return [test for _, _, test in sorted(order)]


class _Chosen:
    """A pytest plugin that runs the given tests in the given order and ends a process whose test takes for ever."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.place = seconds, {test: i for i, test in enumerate(seconds)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_runtest_setup(self, item):
        signal.alarm(30 + int(10 * self.seconds[item.nodeid]))


def build_csrc(path: str) -> None:
    """Build the library that has the file, in the current folder; at -O1, which takes half the time for the same bits.

    Raises:
        SystemExit: it does not compile.
    """
    import setuptools  # noqa: F401, I001  # distutils is its own from here on
    from distutils.core import run_setup

    os.environ["CHILDTUNE_BUILD_EXT"] = "1"
    distribution = run_setup("setup.py", ["-q", "build_ext", "--inplace", "--force"], stop_after="commandline")
    libraries = distribution.ext_modules
    libraries = [x for x in libraries if path in x.sources] or [x for x in libraries if x.name.endswith("_C_cpu")]
    for library in libraries:
        library.extra_compile_args = [*library.extra_compile_args, "-O1"]
    distribution.ext_modules = libraries
    distribution.run_commands()


def attack(tests: Tests, mutant: Mutant, slot: Path) -> int:
    """Put a mutant into a copy of the tree and return pytest's exit status: 0 where no test noticed it."""
    (slot / mutant.path).write_text(mutant.make(), encoding="utf-8")
    if not mutant.path.endswith(".py"):
        try:
            build_csrc(mutant.path)
        except SystemExit:
            return UNBUILT
    chosen = tests.of(mutant)
    if not chosen:
        return 0
    files = sorted({test.partition("::")[0] for test in chosen})
    signal.alarm(120)  # to collect
    plugin = _Chosen({test: tests.seconds[test] for test in chosen})
    return pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files], plugins=[plugin])


def lines_of(mutant: Mutant) -> tuple[str, str]:
    """Return the lines that a mutant changes, before and after, stripped: what mutants.txt knows it by."""
    before, after = (ROOT / mutant.path).read_text(encoding="utf-8").split("\n"), mutant.make().split("\n")
    changes = [op for op in difflib.SequenceMatcher(None, before, after, False).get_opcodes() if op[0] != "equal"]
    pick = [
        [line.strip() for _, *op in changes for line in text[op[k] : op[k + 1]]]
        for k, text in ((0, before), (2, after))
    ]
    return tuple(" ".join(lines) for lines in pick)  # type: ignore[return-value]


def key_of(mutant: Mutant) -> tuple[str, str, str]:
    """Return what mutants.txt knows a mutant by: the path and function, the lines before and after."""
    before, after = lines_of(mutant)
    above = (ROOT / mutant.path).read_text(encoding="utf-8").split("\n")[: mutant.first]
    functions = [line.split("def ")[1].partition("(")[0] for line in above if line.lstrip().startswith("def ")]
    return f"{mutant.path} in {functions[-1]}" if functions else mutant.path, before, after


def known_mutants() -> set[tuple[str, str, str]]:
    """Read mutants.txt: entries of the place, '- ' before, '+ ' after and the reason, a blank line between entries."""
    entries = KNOWN.read_text(encoding="utf-8").rstrip("\n").split("\n\n")[1:]
    return {(place, before[2:], after[2:]) for place, before, after, *reason in map(str.splitlines, entries) if reason}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="*", default=[], help="parts of the paths to mutate; default: all")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    for name in ("torch", "triton", "transformers", "hypothesis", "sklearn.datasets"):  # once, not once a mutant
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    everything = [mutant for path in rooms(args.rooms) for mutant in mutants_of(ROOT, path)]
    sample = random.Random(args.seed).sample(everything, min(args.count, len(everything)))
    known = known_mutants()
    equivalent = [mutant for mutant in sample if key_of(mutant) in known]
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        original, *slots = [Path(scratch) / str(i) for i in range(args.jobs + 1)]
        for copy in (original, *slots):
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info"))
        return report(equivalent, _verdicts([m for m in sample if m not in equivalent], original, slots))


def _verdicts(mutants: list[Mutant], original: Path, slots: list[Path]) -> dict[str, list[Mutant]]:
    """Run the mutants, each in a slot, a copy of the original tree; return them as killed, survived or unbuilt."""
    verdicts: dict[str, list[Mutant]] = {"killed": [], "survived": [], "unbuilt": []}
    tests = Tests(slots)
    languages = {mutant.path.endswith(".py"): mutant for mutant in reversed(mutants)}
    whole = [m._replace(make=(original / m.path).read_text) for m in languages.values()]
    for mutant, slot, status in in_children(whole, functools.partial(attack, tests), slots):
        if status != 0:
            raise RuntimeError(f"{mutant.path} fails without a fault:\n{(slot / 'log.txt').read_text()}")
    start = time.monotonic()

    for mutant, slot, status in in_children(mutants, functools.partial(attack, tests), slots):
        for changed in [slot / mutant.path, *(slot / PACKAGE).glob("*.so")]:
            shutil.copy2(original / changed.relative_to(slot), changed)
        verdict = {0: "survived", UNBUILT: "unbuilt"}.get(status, "killed")
        verdicts[verdict].append(mutant)
        before, after = lines_of(mutant)
        seconds = f"{time.monotonic() - start:5.0f} s"
        print(f"{seconds} {verdict:8} {mutant.path}:{mutant.first}\n        - {before}\n        + {after}", flush=True)
    return verdicts


def report(equivalent: list[Mutant], verdicts: dict[str, list[Mutant]]) -> int:
    """Print the table and the survivors; return the exit status."""
    counts = {name: Counter(mutant.path for mutant in found) for name, found in verdicts.items()}
    counts["equivalent"] = Counter(mutant.path for mutant in equivalent)
    print(f"\n{'room':40} {'mutants':>8} {'killed':>8} {'survived':>8} {'share':>7} {'equivalent':>10}")
    rows = {path: [path] for path in sorted(set().union(*counts.values()))}
    for name, paths in {**rows, "all": list(rows)}.items():
        killed, survived, listed = (sum(counts[k][p] for p in paths) for k in ("killed", "survived", "equivalent"))
        share = f"{killed / (killed + survived):7.1%}" if killed + survived else f"{'-':>7}"
        print(f"{name:40} {killed + survived:8} {killed:8} {survived:8} {share} {listed:10}")
    for mutant in sorted(verdicts["survived"], key=lambda m: (m.path, m.first)):
        place, before, after = key_of(mutant)
        print(f"\nline {mutant.first}:\n{place}\n- {before}\n+ {after}")
    killed, survived = len(verdicts["killed"]), len(verdicts["survived"])
    return 0 if killed >= BAR * (killed + survived) else 1


if __name__ == "__main__":
    sys.exit(main())
