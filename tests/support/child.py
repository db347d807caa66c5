"""A child that does what its job says, for the tests of `zreward.child`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from zreward.child import Message, serve
from zreward.errors import ImageError, ZrewardError


class UnknownError(ZrewardError):
    """Of a module that the parent does not know."""


def work(job: Message, say: Callable[[Message], None]) -> None:
    print("a library's talk")
    say({"pid": os.getpid()})
    match job["do"]:
        case "answer":
            say({"twice": 2 * job["number"]})
        case "refuse":
            raise ImageError("no image")
        case "surprise":
            raise UnknownError("nobody knows")
        case "die":
            sys.stderr.write("last words\n")
            os._exit(3)
        case "crash":
            raise RuntimeError("a bug")
        case "wait":
            time.sleep(600)


if __name__ == "__main__":
    serve(work)
