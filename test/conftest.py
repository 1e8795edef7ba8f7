"""The fixtures that all test files here can ask for."""

import signal

from hardware import opening
from test.helpers import block_dataset, corpus_dir, saved, tokenizers  # noqa: F401
from test.test_finetune import place  # noqa: F401

import pytest

# Under nohup all that the tests start would ignore it, too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def float32_by_default():
    """--amp auto is float32 on any CPU: most tests compare with its numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "is_bf16_fast_on_cpu", lambda: False)
        yield
