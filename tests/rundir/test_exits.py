from __future__ import annotations

import pytest

from influence.rundir import TrainerExit, Verdict, classify, describe


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (0, Verdict.DONE),
        (64, Verdict.FATAL),
        (65, Verdict.FATAL),
        (78, Verdict.FATAL),
        (75, Verdict.FREE_RETRY),
        (143, Verdict.FREE_RETRY),
        (-15, Verdict.FREE_RETRY),
        (1, Verdict.CHARGED_RETRY),
        (2, Verdict.CHARGED_RETRY),
        (137, Verdict.CHARGED_RETRY),
        (-9, Verdict.CHARGED_RETRY),
        (-11, Verdict.CHARGED_RETRY),
        (255, Verdict.CHARGED_RETRY),
    ],
)
def test_the_table(code: int, verdict: Verdict) -> None:
    assert classify(code) is verdict


def test_a_signal_is_the_same_however_it_is_reported() -> None:
    for number in range(1, 65):
        assert classify(-number) is classify(128 + number)
        assert describe(-number) == describe(128 + number)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "all steps committed (0)"),
        (78, "configuration error (78)"),
        (65, "data error (65)"),
        (64, "usage error (64)"),
        (1, "failed (exit code 1)"),
        (137, "killed by SIGKILL (137), out of memory or killed from outside"),
        (-11, "killed by SIGSEGV (139)"),
        (255, "failed (exit code 255)"),
    ],
)
def test_words(code: int, words: str) -> None:
    assert describe(code) == words


def test_every_named_code_has_words_of_its_own() -> None:
    words = {describe(code) for code in TrainerExit}
    assert len(words) == len(TrainerExit) and not any("exit code" in word for word in words)


@pytest.mark.parametrize("code", [256, -65, 1000])
def test_what_no_process_exits_with_is_an_error(code: int) -> None:
    with pytest.raises(ValueError, match=str(code)):
        classify(code)
