"""The trainer's records of its attempts beside what a backend knows of the same attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from influence.rundir import AttemptRecord, RunDirError, RunPaths, classify, describe, read_attempt
from launcher.backends import AttemptFacts


def readable_records(paths: RunPaths) -> dict[int, AttemptRecord]:
    """By number; a record that a dying disk tore is left out.

    Raises:
        StorageError: the run directory cannot be listed.
    """
    records = {}
    for number in paths.attempt_numbers():
        try:
            records[number] = read_attempt(paths, number)
        except RunDirError:
            continue
    return records


def merged(told: Sequence[AttemptFacts], records: Mapping[int, AttemptRecord]) -> list[AttemptFacts]:
    """Every attempt that either side knows, the oldest first.

    The two meet by the attempt's number, else by the pod's name. The backend saw how the attempt was ended,
    the trainer knows why it ended itself; what one side does not say, the other may.
    """
    by_pod = {record.pod: record for record in records.values() if record.pod}
    found, met = [], set()
    for facts in told:
        record = records.get(facts.number) if facts.number is not None else by_pod.get(facts.pod or "")
        if record is None:
            found.append(facts)
            continue
        met.add(record.number)
        found.append(_with_record(facts, record))
    found += [_of_record(record) for number, record in records.items() if number not in met]
    return _in_order(found)


def _in_order(found: Sequence[AttemptFacts]) -> list[AttemptFacts]:
    """By time, and those with a number among themselves by number, which is claimed at the start.

    Times alone would not do: some are in whole seconds, and attempts can be shorter than that.
    """
    by_time = sorted(found, key=lambda facts: (facts.started_at or "").partition("+")[0].removesuffix("Z"))
    numbered = iter(sorted((each for each in found if each.number), key=lambda each: each.number or 0))
    return [next(numbered) if each.number else each for each in by_time]


def _with_record(facts: AttemptFacts, record: AttemptRecord) -> AttemptFacts:
    own = _of_record(record)
    if facts.ended_by is None:
        ended_by = own.ended_by
    elif record.reason and record.reason not in facts.ended_by:
        ended_by = f"{facts.ended_by}: {record.reason}"
    else:
        ended_by = facts.ended_by
    return replace(
        facts,
        number=record.number,
        ended_by=ended_by,
        begun=True,
        pod=facts.pod or own.pod,
        started_at=facts.started_at or own.started_at,
        # Where no exit code was seen, the backend knows when the stop began and not when it was over.
        ended_at=facts.ended_at or own.ended_at
        if facts.exit_code is not None
        else own.ended_at or facts.ended_at,
        exit_code=own.exit_code if facts.exit_code is None else facts.exit_code,
        verdict=facts.verdict or own.verdict,
    )


def _of_record(record: AttemptRecord) -> AttemptFacts:
    where = f"process {record.pid} on host {record.host}"
    if record.pod:
        where = f"pod {record.pod}" + (f" on node {record.node}" if record.node else "")
    ended_by = None if record.exit_code is None else describe(record.exit_code)
    return AttemptFacts(
        where=where,
        number=record.number,
        pod=record.pod,
        started_at=record.started_at,
        ended_at=record.ended_at,
        exit_code=record.exit_code,
        ended_by=f"{ended_by}: {record.reason}" if ended_by and record.reason else ended_by,
        verdict=None if record.exit_code is None else classify(record.exit_code),
    )
