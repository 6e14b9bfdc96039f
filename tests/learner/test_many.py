"""Many tasks from one file: validation of the file, the outcome of each task, and failures."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from addenda import Augmentation, FrozenBackbone, LearnConfig, Learner, Registry
from addenda.exceptions import DataError
from addenda.learner import LearnRow, Outcome, learn_many, read_rows
from tests.support.images import colour_folder

QUICK = LearnConfig(epochs=1, learning_rate=0.3, fall_back=False)


@pytest.fixture
def learner(tiny: FrozenBackbone, registry: Registry) -> Learner:
    return Learner(tiny, registry)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    colour_folder(tmp_path / "colours" / "train")
    colour_folder(tmp_path / "colours" / "test", per_class=4, seed=1)
    return tmp_path / "colours"


def write(folder: Path, text: str) -> Path:
    (folder / "tasks.yaml").write_text(text)
    return folder / "tasks.yaml"


def states(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes}


def test_rows_take_the_files_settings_then_their_own_and_paths_relative_to_the_file(
    registry: Registry, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(
        colours.parent,
        "config: {epochs: 3, momentum: 0.5}\n"
        "tasks:\n"
        "  - {name: first, data: colours}\n"
        "  - {name: second, data: colours/train, test: colours/test, extends: first, config: {epochs: 4}}\n"
        f"  - {{name: third, data: {colours}, extends: [first, second]}}\n",
    )
    monkeypatch.chdir(colours)
    first, second, third = read_rows(file, registry)
    keeps_token = LearnConfig(epochs=3, momentum=0.5, fall_back=False)  # a later row extends it
    assert first == LearnRow("first", colours, None, keeps_token)
    assert (second.data, second.test) == (colours / "train", colours / "test")
    assert second.config == LearnConfig(epochs=4, momentum=0.5, extends=("first",), fall_back=False)
    assert third.data == colours
    assert third.config.extends == ("first", "second")
    assert third.config.fall_back


def test_an_empty_config_has_no_settings_and_a_home_folder_is_found(
    registry: Registry, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(colours.parent))
    (row,) = read_rows(write(colours, "config:\ntasks: [{name: own, data: ~/colours, config: }]\n"), registry)
    assert (row.data, row.config) == (colours, LearnConfig())


def test_a_tasks_own_augmentation_is_merged_with_the_files(registry: Registry, colours: Path) -> None:
    file = write(
        colours.parent,
        "config: {augmentation: {views: 0, fresh: true, color_jitter: 0.4}}\n"
        "tasks: [{name: own, data: colours, config: {augmentation: {hflip: 0.0}}}]\n",
    )
    (row,) = read_rows(file, registry)
    assert row.config.augmentation == Augmentation(views=0, fresh=True, color_jitter=0.4, hflip=0.0)


def test_a_task_without_a_token_cannot_be_extended_by_a_later_one(registry: Registry, colours: Path) -> None:
    file = write(
        colours.parent,
        "tasks: [{name: first, data: colours, config: {head_only: true}}, {name: b, data: colours, extends: first}]",
    )
    with pytest.raises(DataError, match="'first' is extended by a later task, but head_only trains no token"):
        read_rows(file, registry)


def test_all_errors_are_reported_at_once(registry: Registry, colours: Path) -> None:
    file = write(
        colours.parent,
        "config: {epoch: 3}\n"
        "task: x\n"
        "tasks:\n"
        "  - {name: good, data: colours}\n"
        "  - {name: good, data: nowhere}\n"
        "  - {name: Bad Name, data: colours, config: {epochs: 0}}\n"
        "  - {name: child, data: colours, extends: [good, later, gone]}\n"
        "  - {name: later, data: colours, test: colours.csv, memory: 3}\n"
        "  - {name: 7, dat: colours}\n"
        "  - just text\n",
    )
    with pytest.raises(DataError) as caught:
        read_rows(file, registry)
    message = str(caught.value)
    assert message.startswith("Nothing was learned.")
    for problem in (
        "\n  task: unknown key, expected one of tasks, config",
        "\n  config: The configuration is not valid: epoch: there is no such setting",
        "\n  task 2 ('good'): task 1 has the same name",
        "\n  task 2 ('good'): There is no folder",
        "\n  task 3 ('Bad Name'): 'Bad Name' is not a valid name",
        "\n  task 3 ('Bad Name'): The configuration is not valid: epochs",
        "\n  task 4 ('child'): it extends neither an earlier task nor a registered one: Task 'later' is not registered",
        "\n  task 4 ('child'): it extends neither an earlier task nor a registered one: Task 'gone' is not registered",
        "\n  task 5 ('later'): memory: unknown key, expected one of name, data, test, config, extends",
        "\n  task 6: name: must be text; in YAML, quote numbers, dates, yes and no",
        "\n  task 6: data: is missing",
        "\n  task 6: dat: unknown key",
        "\n  task 7: Input should be a valid dictionary",
    ):
        assert problem in message, problem
    assert message.count("\n") == 13


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "tasks: is missing"),
        (b"tasks: []", "tasks: List should have at least 1 item"),
        (b"tasks: {name: a}", "tasks: must be a list, whose entries start with `-`"),
        (b"- name: a", "holds a list; it must hold a mapping"),
        (b"words", "holds a single value; it must hold a mapping"),
        (b"tasks: [", "is not valid YAML, line 1: expected the node content"),
        (b"tasks: !!python/object:os.system {}", "is not valid YAML, line 1: could not determine a constructor"),
        (b"\x00", "is not valid YAML"),
        (b"\xff\xfe\xfa", "is not UTF-8"),
        (b"[" * 100_000, "is not valid YAML"),
        (b"tasks:\n  - {name: a, data: \"a\\0b\"}", "There is no folder"),
        (b"tasks:\n  - {name: a, data: " + b"x" * 5000 + b"}", "File name too long"),
        (b"tasks:\n  - {name: a, data: colours, extends: {a: b}}", "extends: must be a list, whose entries"),
        (b"config: 5\ntasks:\n  - {name: a, data: colours}", "config: must be a mapping, such as `epochs: 20`"),
    ],
)  # fmt: skip
def test_the_error_says_why_a_file_is_no_list_of_tasks(
    registry: Registry, colours: Path, content: bytes, message: str
) -> None:
    file = colours.parent / "tasks.yaml"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(file, registry)
    assert message in str(caught.value)


def test_a_missing_file_and_a_folder_cannot_be_read(registry: Registry, tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_rows(path, registry)


def test_a_registered_task_can_be_extended(learner: Learner, colours: Path) -> None:
    learner.learn("known", colours, config=QUICK)
    file = write(colours.parent, "tasks: [{name: child, data: colours, extends: 'known:1'}]")
    assert read_rows(file, learner.registry)[0].config.extends == ("known:1",)


def test_tasks_are_learned_in_order_and_not_repeated_by_a_second_call(learner: Learner, colours: Path) -> None:
    child = LearnConfig(epochs=1, learning_rate=0.3, fall_back=False, extends=("first",))
    rows = [LearnRow("first", colours, None, QUICK), LearnRow("child", colours, None, child)]
    reports: set[str] = set()
    outcomes = list(learn_many(learner, rows, report=lambda what, done, total: reports.add(what)))
    assert [(o.state, o.ref, o.reason) for o in outcomes] == [("learned", "first:1", ""), ("learned", "child:1", "")]
    assert learner.registry.record("child").extends == ("first:1",)
    assert {what.rpartition(", child")[2] for what in reports if "child" in what} == {", 2 of 2"}
    generation = learner.registry.generation
    again = list(learn_many(learner, [*rows, LearnRow("third", colours, None, QUICK)]))
    assert states(again) == {"first": "learned before", "child": "learned before", "third": "learned"}
    assert learner.registry.generation == generation + 1


@pytest.mark.slow
def test_after_the_first_task_the_time_of_the_others_is_said(
    learner: Learner, colours: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addenda.learner.many.NOTABLE_S", 0)
    rows = [
        LearnRow(name, colours, None, LearnConfig(head_only=True, seed=i)) for i, name in enumerate(("a", "b", "c"))
    ]
    with caplog.at_level(logging.INFO):
        assert set(states(list(learn_many(learner, rows))).values()) == {"learned"}
    (said,) = [message for message in caplog.messages if message.startswith("Tasks left: ")]
    assert said.startswith("Tasks left: 2, about ")


def test_only_tasks_that_extend_a_failed_task_are_skipped(
    learner: Learner, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = colour_folder(colours.parent / "bad")
    (bad / "red" / "0.png").write_bytes(b"no image")

    def extending(*names: str) -> LearnConfig:
        return LearnConfig(epochs=1, learning_rate=0.3, fall_back=False, extends=names)

    rows = [
        LearnRow("bad", bad, None, QUICK),
        LearnRow("child", colours, None, extending("bad")),
        LearnRow("grandchild", colours, None, extending("child")),
        LearnRow("good", colours, None, QUICK),
        LearnRow("good-child", colours, None, extending("good")),
    ]
    outcomes = list(learn_many(learner, rows))
    assert [o.state for o in outcomes] == ["failed", "skipped", "skipped", "learned", "learned"]
    assert "red/0.png" in outcomes[0].reason
    assert outcomes[1].reason == "it extends 'bad', which failed"
    assert outcomes[2].reason == "it extends 'child', which was skipped"
    assert [record.name for record in learner.registry.tasks()] == ["good", "good-child"]
    assert "grandchild, 3 of 5: skipped: it extends 'child', which was skipped" in caplog.text
    skipping = list(learn_many(learner, rows, skip_bad=True))
    assert [o.state for o in skipping] == ["learned"] * 3 + ["learned before"] * 2


def test_an_unexpected_error_is_logged_with_its_traceback_and_the_others_are_learned(
    learner: Learner, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(torch.utils.data.TensorDataset):
        def __len__(self) -> int:
            raise RuntimeError("the disk went")

    broken = Broken(torch.zeros(12, 3, 32, 32), torch.arange(12) % 2)
    outcomes = list(
        learn_many(learner, [LearnRow("broken", broken, None, QUICK), LearnRow("good", colours, None, QUICK)])
    )
    assert [(o.state, o.reason) for o in outcomes] == [("failed", "RuntimeError: the disk went"), ("learned", "")]
    assert "Traceback" in caplog.text


def test_a_taken_name_fails_without_new_version(
    learner: Learner, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    learner.learn("first", colours, config=QUICK)
    rows = [LearnRow("first", colours, None, LearnConfig(epochs=1, learning_rate=0.1, fall_back=False))]
    (taken,) = learn_many(learner, rows)
    assert "--new-version" in taken.reason
    (added,) = learn_many(learner, rows, new_version=True)
    assert added.ref == "first:2"
