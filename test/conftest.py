"""The fixtures that all test files here can ask for, and why tests were skipped."""

import re
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

from hardware import opening
from test.helpers import HERE, block_dataset, corpus_dir, saved, tokenizers  # noqa: F401

import pytest


@pytest.fixture(scope="session", autouse=True)
def float32_by_default():
    """--amp auto is float32 on any CPU: most tests compare with its numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "is_bf16_fast_on_cpu", lambda: False)
        yield


def pytest_terminal_summary(terminalreporter):
    """Print each reason to skip once, with the number of its tests, and the packages that would
    enable more."""
    reasons = Counter()
    for skipped in terminalreporter.stats.get("skipped", []):
        reason = skipped.longrepr[2].removeprefix("Skipped: ")
        reasons[re.sub(r"could not import '(\w+).*", r"needs the package \1", reason)] += 1
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
    if missing := reasons and missing_packages():
        terminalreporter.write_line(f"to run more of them: pip install {' '.join(missing)}")


def missing_packages() -> list[str]:
    """The packages of test/requirements.txt that are not installed."""
    missing = []
    for package in re.findall(
        r"^[\w-]+==[\w.]+", (HERE / "test/requirements.txt").read_text(), re.M
    ):
        try:
            version(package.partition("==")[0])
        except PackageNotFoundError:
            missing.append(package)
    return missing
