"""zreward.child: messages arrive, errors keep their class, and no child outlives its block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from zreward.child import Message, child_process
from zreward.errors import BackendError, ImageError


def child(**job: Any) -> AbstractContextManager[Iterator[Message]]:
    return child_process("tests.support.child", job, what="is tested", error=BackendError)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_messages_arrive_in_order_and_without_other_output() -> None:
    with child(do="answer", number=21) as messages:
        first, second = messages
    assert second == {"twice": 42}
    assert not is_running(first["pid"])


def test_an_error_keeps_its_class_where_it_is_known() -> None:
    with child(do="refuse") as messages, pytest.raises(ImageError, match=r"^no image$"):
        list(messages)
    with child(do="surprise") as messages, pytest.raises(BackendError, match=r"^nobody knows$"):
        list(messages)


def test_a_death_is_an_error_with_the_last_words() -> None:
    died = r"the process that is tested ended with status 3:\n(.*\n)?last words"
    with child(do="die") as messages, pytest.raises(BackendError, match=died):
        list(messages)
    with child(do="crash") as messages, pytest.raises(BackendError, match="RuntimeError: a bug"):
        list(messages)


def test_leaving_the_block_ends_the_child() -> None:
    with child(do="wait") as messages:
        pid = next(messages)["pid"]
        assert is_running(pid)
    assert not is_running(pid)
    with pytest.raises(KeyboardInterrupt), child(do="wait") as messages:
        pid = next(messages)["pid"]
        raise KeyboardInterrupt
    assert not is_running(pid)
