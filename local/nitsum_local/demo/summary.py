"""What really happened, in numbers: the end of the demo, and `.nitsum/demo.json`."""

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nitsum_local.demo.traffic import Question, Stream, compare


@dataclass(frozen=True)
class Summary:
    """`pause_ms`: one a moved stream, the widest gap between two of its tokens around a flip. `text_equal`: against an unflipped run."""

    flips: int
    pause_ms: list[float]
    streams: int
    streams_failed: int
    streams_across_flip: int
    streams_compared: int
    """With an unflipped run: all that were under way when a flip began, those included that had their first or last token during it."""
    tokens_missing: int
    tokens_repeated: int
    text_equal: bool
    first_flip_after_s: float | None
    """From the start of the demo."""
    layouts: list[str]
    profile: str
    kubectl: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """The demo showed what it promises: at least one flip under streams, nothing lost, nothing repeated."""
        whole = self.tokens_missing == self.tokens_repeated == self.streams_failed == 0
        return self.flips > 0 and self.streams_across_flip > 0 and whole and self.text_equal

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def lines(self) -> list[str]:
        pauses = "none"
        if self.pause_ms:
            pauses = f"p50 {statistics.median(self.pause_ms):.0f} ms, widest {max(self.pause_ms):.0f} ms"
        equal = ("equal, token for token" if self.text_equal else "NOT EQUAL") + " against a run without a flip"
        text = (
            f"{equal} ({self.streams_compared} streams compared)" if self.streams_compared else "nothing to compare: no stream met a flip"
        )
        first = "none" if self.first_flip_after_s is None else f"first after {self.first_flip_after_s:.0f} s"
        return [
            f"flips                {self.flips} ({first}): {' -> '.join(self.layouts)}",
            f"streams              {self.streams}, failed {self.streams_failed}, across a flip {self.streams_across_flip}",
            f"pause of those       {pauses}",
            f"tokens               missing {self.tokens_missing}, repeated {self.tokens_repeated}",
            f"text                 {text}",
            f"planned with         {self.profile}, online correction off",
        ]


def summarise(
    streams: Sequence[Stream],
    moved: Mapping[int, float],
    met: Collection[int],
    references: Mapping[Question, Stream],
    flips: int,
    **facts: Any,
) -> Summary:
    """`moved`, `met`: positions in `streams`. `references`: answers without a flip. A stream without one counts as not equal."""
    missing = repeated = 0
    compared = sorted({*moved, *met})
    equal = bool(compared)
    for i in compared:
        got, reference = streams[i], references.get(streams[i].question)
        if reference is None or reference.error:
            equal = False
            continue
        lost, added = compare(got, reference)
        missing, repeated = missing + lost, repeated + added
        equal = equal and (got.text, got.finish) == (reference.text, reference.finish)
    failed = sum(bool(s.error) or not s.ended for s in streams)
    pauses = [round(ms, 1) for ms in moved.values()]
    return Summary(flips, pauses, len(streams), failed, len(moved), len(compared), missing, repeated, equal, **facts)
