"""What a user's settings say arrives in the container as it was written, and breaks out of nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.bench.bench import Bench
from tests.cluster.bench.images import make_image
from tests.cluster.user import User

RUN = "infl-hostile"
HOSTILE = {
    "QUOTES": "a\"b'c`d\\e\\\"f",
    "LINES": "one\n  two: 3\n- four\r\n\n",
    "TABS_AND_SPACES": "\t leading and trailing \t ",
    "EXPANSION": "$(HOME) $$(HOME) $$$(PATH) $(NO SUCH) $HOME ${HOME} $$ $",
    "SHELL": "; touch /tmp/infl-was-here & | > < * ? ~ !! # $(touch /tmp/infl-was-here) `touch /tmp/x`",
    "YAML": "key: [value, {a: b}] &anchor *alias !!python/object:os.system |- >+ # comment",
    "DOCUMENTS": "---\nkind: Pod\n...\n--- !tag",
    "TEMPLATE": "{{ run }} {% for x in y %} {# comment #} {{ ''.__class__ }} %s {0} \\N{BULLET}",
    "JSON": '"}, {"name": "INFL_RUN_JSON", "value": "x"}, {"a": "\\u0000',
    "UNICODE": "naïve – \u2028 \u202e 日本 \U0001f600 \ufeff",
    "LOOKS_LIKE_OTHER_TYPES": "yes",
    "NUMBER": "0o17",
    "NULL": "null",
    "EMPTY": "",
    "LONG": "x" * 5000,
}  # fmt: skip

_TELL = """#!{python}
import json, os, sys
from pathlib import Path
Path({told!r}).write_text(json.dumps({{"environment": dict(os.environ), "words": sys.argv}}))
"""


def image_that_tells(bench: Bench, user: User) -> tuple[str, Path]:
    """An image whose trainer writes down what it was started with, and the file."""
    image, told = f"bench/{user.namespace.name}:1", user.home / "told.json"
    make_image(bench.folder, image, {"python": _TELL.format(python=sys.executable, told=str(told))})
    return image, told


def test_hostile_settings_arrive_unchanged(bench: Bench, user: User) -> None:
    image, told = image_that_tells(bench, user)
    settings = {
        "cluster": {"environment": HOSTILE},
        "data": {"train_files": ["/data/$(HOME)/'x\".parquet", "/data/{{ run }}: - #.parquet"]},
        "model": {"path": "org/$(PATH)\"'; echo `id` {{x}}"},
        "verl": {"+actor_rollout_ref.actor.note": "$(HOME) 'x' \"y\" {{z}}\n- k: v"},
    }
    overlay = user.home / "hostile.yaml"
    overlay.write_text(yaml.safe_dump(settings, default_style='"'))  # a plain 0o17 would be a number
    words = ("--overlay", str(overlay))
    user.submit(RUN, image, *words)
    user.wait_for_state(RUN, "SUCCEEDED", "FAILED")
    started = json.loads(told.read_text())
    environment = started["environment"]
    assert {name: environment.get(name) for name in HOSTILE} == HOSTILE
    document = json.loads(environment["INFL_RUN_JSON"])
    assert document["run"] == RUN
    spec = document["spec"]
    for section, wanted in settings.items():
        assert {key: spec[section][key] for key in wanted} == wanted
    assert started["words"][1:4] == ["-m", "influence.train", "--run-dir"] and len(started["words"]) == 5
    assert not Path("/tmp/infl-was-here").exists()
    # What the server holds is read back as what was sent, and so adopts.
    assert "same spec" in user.submit(RUN, image, *words)
    (job,) = user.namespace.api.items(f"{user.namespace.batch}/jobs")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert [entry["name"] for entry in container["env"]].count("INFL_RUN_JSON") == 1


@pytest.mark.parametrize(
    "name", ["a;b", "../up", "-rf", "UPPER", "a b", "a\nb: c", "$(id)", "{{x}}", 'x"}', "a" * 35, "é", ""]
)
def test_a_name_that_is_none_is_refused_and_creates_nothing(bench: Bench, user: User, name: str) -> None:
    for words in (("submit", "--preset", "smoke", f"--name={name}"), ("status", "--", name)):
        if words[0] == "status" and not name:
            continue
        process = user.start(*words)
        output, errors = process.communicate(timeout=60)
        assert process.returncode in (2, 3), output + errors
        assert "Traceback" not in errors and "this is a bug" not in errors
    assert bench.api.items(f"{user.namespace.batch}/jobs") == []


@pytest.mark.parametrize(
    "setting",
    [
        'cluster.queue="a\'; b: {c}\\n"',
        'cluster.node_selector={"a b": "c\\nd"}',
        'cluster.service_account="x\\"}, {"',
        'cluster.secret="../../etc"',
        'cluster.claim="a\\n- b: c"',
        'cluster.environment={"A=B": "c"}',
        'cluster.tolerations=[{"key": "a b: c", "operator": "Exists"}]',
        'cluster.priority_class="{{ x }}"',
    ],
)
def test_a_setting_that_no_server_takes_is_an_error_in_words(bench: Bench, user: User, setting: str) -> None:
    kai = ("--set", "cluster.scheduler=kai", "--set", "cluster.queue=team")
    process = user.start(*user.submit_words(RUN, "bench/image:1"), *kai, "--set", setting)
    output, errors = process.communicate(timeout=60)
    assert process.returncode in (3, 5), output + errors
    assert "Traceback" not in errors and "this is a bug" not in errors
    assert setting.split("=")[0].rpartition(".")[2].split("_")[0] in errors.replace(
        "serviceAccount", "service"
    )
    assert bench.api.items(f"{user.namespace.batch}/jobs") == []
