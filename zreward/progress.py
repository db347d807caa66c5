"""How long work says where it stands.

A `Progress` is called as (stage, done, total): the stage's name as people read it, how much of it is done, and the
whole of it. Both numbers are in one unit, which is the stage's own: bytes while weights are read or written, items
where something is scored or measured, 0 and 1 for a stage that only begins and ends. A stage may come a second time,
and then starts anew.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
