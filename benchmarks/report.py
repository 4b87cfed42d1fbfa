"""What a run measured, as tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.load.closed_loop import LoadResult
from benchmarks.load.open_loop import OpenLoopResult


@dataclass
class ServerFigures:
    """One server: seconds to ready, its loads in order, processor milliseconds per request in each, memory at the end."""

    ready_s: float
    loads: list[LoadResult] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    resident_mb: float = 0.0


@dataclass
class Report:
    """One run; ``model`` holds images per second by batch size for each runtime."""

    machine: dict[str, str]
    model: dict[str, dict[int, float]] = field(default_factory=dict)
    servers: dict[str, ServerFigures] = field(default_factory=dict)
    open_loop: list[OpenLoopResult] = field(default_factory=list)
    photo: LoadResult | None = None
    small_alone: LoadResult | None = None
    small_beside_photos: LoadResult | None = None

    def as_markdown(self) -> str:
        """Return every table."""
        lines = [", ".join(f"{name} {value}" for name, value in self.machine.items()), ""]
        if self.model:
            sizes = next(iter(self.model.values()))
            rows = [[name, *(f"{rate:,.0f}" for rate in rates.values())] for name, rates in self.model.items()]
            lines += _table(["model alone, images/s at batch", *map(str, sizes)], rows)
        if self.servers:
            lines += self._server_table()
        if self.open_loop:
            lines += self._open_loop_table()
        if self.photo and self.small_alone and self.small_beside_photos:
            small, beside = self.small_alone, self.small_beside_photos
            lines += [
                f"A 12-megapixel JPEG: p50 {self.photo.p50_ms:.1f} ms at one connection. Small images at 4 connections: p99"
                f" {small.p99_ms:.1f} ms alone, {beside.p99_ms:.1f} ms beside a stream of such photos.",
                "",
            ]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write ``results.json`` and ``results.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / "results.md").write_text(self.as_markdown())

    def _server_table(self) -> list[str]:
        first = next(iter(self.servers.values()))
        head = ["server", "ready"]
        head += [f"c={load.connections}: req/s (p50, p99)" for load in first.loads]
        rows = []
        for name, figures in self.servers.items():
            cells = [
                f"{load.requests_per_s:,.0f} ({load.p50_ms:.1f}, {load.p99_ms:.1f} ms)"
                + (f", {load.errors} errors" if load.errors else "")
                for load in figures.loads
            ]
            busiest = f"{figures.cpu_ms[-2]:.2f} ms"
            rows.append([name, f"{figures.ready_s:.1f} s", *cells, busiest, f"{figures.resident_mb:,.0f} MB"])
        return _table([*head, f"CPU per request at c={first.loads[-2].connections}", "memory"], rows)

    def _open_loop_table(self) -> list[str]:
        rows = [
            [
                f"{result.offered_per_s:,.0f}",
                f"{result.answered_per_s:,.0f}",
                f"{result.p50_ms:.1f} ms",
                f"{result.p99_ms:.1f} ms",
                str(result.refused),
                str(result.errors),
            ]
            for result in self.open_loop
        ]
        return _table(["offered req/s, Poisson", "answered", "p50", "p99", "refused", "errors"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]
