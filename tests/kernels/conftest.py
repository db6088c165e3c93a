"""Each test that takes `path` runs on every path of a kernel.

    definition    the PyTorch definition, on a CPU
    interpreter   Triton's interpreter, on a CPU
    cuda          Triton, on a GPU

Triton reads TRITON_INTERPRET once, when it is imported, and the process of the tests must not be in that
state: it compiles kernels and models. So the interpreter's tests of a session run in one child process of
pytest, and each reports here what the child found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.backend import HAS_TRITON, INTERPRETED

ROOT = Path(__file__).parents[2]
REPORTS = "KERNEL_TEST_REPORTS"  # in the child: the file for its reports


@pytest.fixture(
    params=["definition", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def path(request: pytest.FixtureRequest) -> str:
    """The device that the test's tensors lie on, "cpu" or "cuda"."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return "cuda"
    assert (request.param == "interpreter") == INTERPRETED
    return "cpu"


def interpreted(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("path") == "interpreter"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if interpreted(item) and not HAS_TRITON:
        pytest.skip("needs triton (pip install triton==3.7.1)")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Of an interpreter's test, replays the child's reports."""
    if not interpreted(item) or not HAS_TRITON or REPORTS in os.environ:
        return None
    reports = reports_of_child(item.session)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    mine = reports.get(item.nodeid, [])
    if not any(report.when == "teardown" for report in mine):
        mine = [*mine, lost(item, reports)]  # a wild pointer ends the child in the midst of a test
    for report in mine:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # The test before this one left standing what it shares with this one, its module say.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def reports_of_child(session: pytest.Session) -> dict[str, list[pytest.TestReport]]:
    """{test: its reports}; the child runs on the first call."""
    known = getattr(session, "_kernel_reports", None)
    if known is not None:
        return known
    directory = Path(session.config.rootpath) / ".pytest_cache" / f"kernels_{os.getpid()}"
    directory.mkdir(parents=True, exist_ok=True)
    names, written = directory / "tests", directory / "reports"
    names.write_text("\n".join(item.nodeid for item in session.items if interpreted(item)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", REPORTS: str(written)}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{names}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    found: dict[str, list] = {"": [child.stdout[-4000:] + child.stderr[-4000:]]}
    for line in written.read_text().splitlines() if written.exists() else []:
        report = pytest.TestReport._from_json(json.loads(line))
        found.setdefault(report.nodeid, []).append(report)
    for file in (names, written):
        file.unlink(missing_ok=True)
    directory.rmdir()
    session._kernel_reports = found  # pyright: ignore
    return found


def lost(item: pytest.Item, reports: dict[str, list]) -> pytest.TestReport:
    text = f"the interpreter's process ended before this test did; it said:\n{reports[''][0]}"
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if REPORTS in os.environ:
        with open(os.environ[REPORTS], "a") as file:
            file.write(json.dumps(report._to_json()) + "\n")


def pytest_terminal_summary(terminalreporter) -> None:
    """What test_compile.py found each kernel to use."""
    lines = [
        value
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for name, value in report.user_properties
        if name == "resources" and report.when == "call"
    ]
    if lines and REPORTS not in os.environ:
        terminalreporter.section("kernels as compiled")
        for line in sorted(lines):
            terminalreporter.write_line(line)
