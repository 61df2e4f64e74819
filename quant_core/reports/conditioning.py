"""What two text encoders make of the same prompts: how far apart, read by how far different prompts are apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from ..evidence.conditioning import Closeness
from ..evidence.likeness import LEVEL, Summary, summarize
from ..files.text import change_of_size, counted
from .likeness import ADVICE, FEW, between, table
from .report import Compared

# What an encoder is called by a token's mean error as a share of that between prompts; shares as for pictures.
GRADES = (
    (1e-3, "Practically the same conditioning as the original's"),
    (1e-2, "Close to the original's conditioning"),
    (1e-1, "Noticeably different from the original's conditioning"),
    (float("inf"), "Another conditioning than the original's"),
)
ACCEPTABLE = 1  # the last grade that asks for nothing


@dataclass(frozen=True)
class Prompt(Closeness):
    """others: relative errors of what comes with the tokens (pooled_output and alike)."""

    number: int = 0  # from 1
    prompt: str = ""
    others: dict[str, float] = field(default_factory=dict)


# (title, of a prompt, whether larger is worse)
Measure = tuple[str, Callable[[Prompt], float], bool]
MEASURES: tuple[Measure, ...] = (
    ("all tokens together, relative error", lambda one: one.error, True),
    ("a token, mean relative error", lambda one: one.mean, True),
    ("the median token", lambda one: one.median, True),
    ("the worst token", lambda one: one.worst, True),
    ("cosine of a token, mean", lambda one: one.cosine, False),
    ("cosine of the worst token", lambda one: one.least_cosine, False),
)


@dataclass(frozen=True)
class Encoded(Compared):
    """What both encoders made. other_prompts: the original's error if it had encoded the next prompt instead."""

    prompts: list[Prompt] = field(default_factory=list)
    other_prompts: list[float] = field(default_factory=list)

    def measures(self) -> dict[str, Summary]:
        """Over prompts, by title."""
        first = self.prompts[0].others
        others = [(f"{name}, relative error", lambda one, name=name: one.others[name], True) for name in first]
        found = {
            title: summarize([of(one) for one in self.prompts], worse) for title, of, worse in [*MEASURES, *others]
        }
        return {title: summary for title, summary in found.items() if summary}

    def verdict(self) -> str:
        """One sentence to act on."""
        mean = self.measures()[MEASURES[1][0]].mean
        if all(one.worst == 0 and not any(one.others.values()) for one in self.prompts):
            return "The same: every conditioning is identical to the original's, number for number."
        other = summarize(self.other_prompts)
        if not other or not other.mean:
            return f"A token is off by {mean:.1e} of its square: give several prompts to read that by."
        share = mean / other.mean
        level = next(i for i, (limit, _) in enumerate(GRADES) if share <= limit)
        worst = max(self.prompts, key=lambda one: one.mean)
        sentence = f"{GRADES[level][1]}: {_times(1 / share**0.5)}× closer than another prompt"
        sentence += f"; the worst prompt is #{worst.number}" if len(self.prompts) > 1 else ""
        return sentence + (f": {ADVICE}." if level > ACCEPTABLE else ".")

    def to_json(self) -> str:
        measured = {title: asdict(summary) for title, summary in self.measures().items()}
        return json.dumps({"verdict": self.verdict(), "measures": measured, **asdict(self)}, indent=1) + "\n"

    def summary(self) -> str:
        """For the node: the verdict, and a line for each measure."""
        lines = [
            f"{title}: {_shown(found.mean)}, worst {_shown(found.worst)}" for title, found in self.measures().items()
        ]
        return "\n".join([self.verdict(), *lines, *self._remarks()])

    def to_markdown(self) -> str:
        """The whole report as a page."""
        return "\n\n".join(
            [
                f"# {self.output or 'clip_b'} against {self.source or 'clip_a'}",
                f"**{self.verdict()}**",
                table(self._measures()),
                "\n".join(f"- {remark}" for remark in self._remarks()),
                f"## Prompts\n\n{table(self._rows())}",
                f"## What the figures are\n\n{DEFINITIONS}\n",
            ]
        )

    def _remarks(self) -> list[str]:
        other = summarize(self.other_prompts)
        both = self.bytes_before and self.bytes_after
        few = f"only {counted(len(self.prompts), 'prompt')}: more tell more"
        return [
            f"{counted(len(self.prompts), 'prompt')}, {sum(one.tokens for one in self.prompts)} tokens",
            *([f"another prompt: a token's mean relative error is {_shown(other.mean)}"] if other else []),
            *([f"files: {change_of_size(self.bytes_before, self.bytes_after)}"] if both else []),
            *([few] if len(self.prompts) < FEW else []),
        ]

    def _measures(self) -> list[list[str]]:
        rows = [["", "mean", f"{100 * LEVEL:.0f} % interval", "worst", "n"]]
        for title, found in self.measures().items():
            ends = between("latent_error", found.interval)
            rows.append([title, _shown(found.mean), ends, _shown(found.worst), str(found.n)])
        return rows

    def _rows(self) -> list[list[str]]:
        rows = [["#", "tokens", *(title for title, _, _ in MEASURES), "prompt"]]
        for one in self.prompts:
            words = " ".join(one.prompt.split()).replace("|", "\\|")
            rows.append([str(one.number), str(one.tokens), *(_shown(of(one)) for _, of, _ in MEASURES), words])
        return rows


DEFINITIONS = f"""\
- *Relative error*: ‖A − B‖² / ‖A‖², over all tokens of a prompt together, or of each token by itself. A few tokens may
  be a thousand times longer than the rest (the first, often) and rule the sum; the mean over tokens counts all alike.
- *Tokens*: those of the prompt, where the encoder tells which are padding; else all, since the model reads all.
- *Cosine*: of the angle between both encoders' vectors of a token; 1 is the same direction.
- *Another prompt*: what the original makes of the next prompt, as if it were meant for this one, place by place.
- *× closer than another prompt*: the root of the ratio of the two mean errors of a token. Practically the same: 32× and
  more; close: 10×; noticeably different: 3×. These are the steps that pictures are graded by; what an error of the
  conditioning does to your pictures, pictures tell: **Compare Models** with a prompt set of each encoder.
- *Interval*: {100 * LEVEL:.0f} % of a percentile bootstrap over prompts, of the mean."""


def _times(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _shown(value: float) -> str:
    return f"{value:.2e}" if value < 0.1 else f"{value:.5f}"
