"""``launcher explain``: the story of a run's attempts."""

from __future__ import annotations

import click

from influence.rundir.clock import parse_time
from influence.rundir.exits import Verdict
from launcher.backends import AttemptFacts, Event
from launcher.commands.options import Place, output_option, place_options
from launcher.errors import ExitCode
from launcher.output import emit, note
from launcher.progress import age, progress_parts
from launcher.story import AttemptStory, Story, tell

_COUNTED = {
    Verdict.DONE: "not charged",
    Verdict.FATAL: "fails the run at once",
    Verdict.FREE_RETRY: "not charged",
    Verdict.CHARGED_RETRY: "charged",
}


@click.command("explain", epilog="Exit codes: 0 done, 2 usage, 5 backend out of reach, 102 no such run.")
@click.argument("run")
@click.option(
    "--lines", "num_lines", type=click.IntRange(min=0), default=5, show_default=True,
    help="How many of the last lines of each attempt's log.",
)  # fmt: skip
@place_options
@output_option
def command(run: str, num_lines: int, place: Place, output_format: str) -> int:
    """Tell the story of RUN: when and where each attempt ran, what ended it, whether that was charged to the
    limit of retries, what was decided and why, and what it printed last; then recent warnings.

    What the backend saw and what the trainer wrote into the run directory are laid side by side. Where one
    of them does not answer, the rest is told all the same.
    """
    story = tell(place.open(), run, num_lines=num_lines)
    for gap in story.gaps:
        note(f"not known: {gap}")
    emit(output_format, story.to_dict(), lambda: _lines(story))
    return int(ExitCode.OK)


def _lines(story: Story) -> list[str]:
    status = story.status
    lines = [
        f"{status.run}: {status.state} ({status.reason})",
        f"  {', '.join(progress_parts(status))}",
    ]
    for attempt in story.attempts:
        lines += ["", *_attempt_lines(attempt)]
    if not story.attempts:
        lines += ["", "no attempt is known yet"]
    if story.warnings:
        lines += ["", "recent warnings:", *(f"  {event_line(event)}" for event in story.warnings)]
    if status.advice:
        lines += ["", f"next: {status.advice}"]
    return lines


def _attempt_lines(attempt: AttemptStory) -> list[str]:
    facts = attempt.facts
    name = "an attempt without a number" if facts.number is None else f"attempt {facts.number}"
    lines = [f"{name}: {facts.where}", f"  when:   {_when(facts)}"]
    if attempt.resumed_from is not None:
        step = attempt.resumed_from
        lines.append(f"  from:   {f'the checkpoint of step {step}' if step else 'scratch'}")
    lines.append(f"  ended:  {_ended(facts)}")
    if facts.decision:
        lines.append(f"  then:   {facts.decision}")
    if attempt.log_lines:
        first, *others = attempt.log_lines
        lines += [f"  log:    {first}", *(f"          {line}" for line in others)]
    return lines


def _ended(facts: AttemptFacts) -> str:
    if facts.ended_by is None:
        return "it goes on" if facts.ended_at is None else "not known how"
    counted = "" if facts.decision or facts.verdict is None else f" ({_COUNTED[facts.verdict]})"
    return f"{facts.ended_by}{counted}"


def _when(facts: AttemptFacts) -> str:
    if facts.started_at is None:
        return "never started"
    if facts.ended_at is None:
        return f"from {facts.started_at}"
    try:
        seconds = (parse_time(facts.ended_at) - parse_time(facts.started_at)).total_seconds()
    except ValueError:
        return f"{facts.started_at} to {facts.ended_at}"
    return f"{facts.started_at} to {facts.ended_at}, {age(max(0.0, seconds))}"


def event_line(event: Event) -> str:
    """One event: when, what about, the backend's word and its message."""
    times = f" ({event.count} times)" if event.count > 1 else ""
    return f"{event.at}  {event.about}: {event.reason}{f': {event.message}' if event.message else ''}{times}"
