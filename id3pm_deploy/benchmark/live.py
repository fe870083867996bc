"""A column on its way through a benchmark."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

from .cold_start import reason_of
from .column import Runner
from .columns import Column
from .result import TIMED


@dataclass
class Live:
    """A column on its way through the benchmark."""

    column: Column
    runner: Runner | None = None
    status: str = TIMED
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ends(self, status: str, error: Exception | str) -> None:
        """It is out, for good; what was measured before stays."""
        self.status = status
        self.reason = error if isinstance(error, str) else reason_of(error)
        self.close()

    def close(self) -> None:
        """Release what it holds."""
        runner, self.runner = self.runner, None
        if runner is not None:
            runner.close()
            gc.collect()

    def to_json(self) -> dict[str, Any]:
        """For the result."""
        return {
            "title": self.column.title,
            "ours": self.column.ours,
            "status": self.status,
            "reason": self.reason,
            **self.facts,
            "batches": self.batches,
        }

    @property
    def inside(self) -> Runner:
        """Its runner, while it has one."""
        assert self.runner is not None
        return self.runner
