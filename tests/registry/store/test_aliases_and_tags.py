"""Aliases, tags and notes, which may change after registration."""

from __future__ import annotations

import pytest

from addenda.exceptions import RegistryError, UnknownTaskError
from addenda.registry import Registry
from tests.support.databases import refused
from tests.support.registries import a_task, keep


@pytest.fixture
def versions(book: Registry) -> Registry:
    """A registry with two versions of a task."""
    keep(book, a_task())
    keep(book, a_task(seed=1), new_version=True)
    return book


def test_an_alias_moves_only_from_where_it_was_expected(versions):
    versions.set_alias("digits", "production", 1, expected=0)
    versions.set_alias("digits", "production", 2, expected=1)
    for expected, target in ((1, "at 'digits:1'"), (0, "at nothing")):
        with refused(versions, RegistryError) as refusal:
            versions.set_alias("digits", "production", 1, expected=expected)
        assert str(refusal.value) == (
            f"'digits@production' points at 'digits:2', not {target} as expected. Nothing was changed."
        )
    with refused(versions, RegistryError, match="'digits@staging' points at nothing, not at 'digits:2' as expected"):
        versions.set_alias("digits", "staging", 1, expected=2)


@pytest.mark.parametrize(("given", "options"), [(("production", "digits:1"), {}), (("a", "digits"), {"expected": 0})])
def test_the_former_arguments_alias_and_reference_are_refused(versions, given, options):
    with refused(versions, RegistryError, match=r"has no version\. Its arguments are name, alias and version, as in"):
        versions.set_alias(*given, **options)
    with refused(versions, RegistryError, match="'digits:1' is not a valid name"):
        versions.set_alias("production", "digits:1", 1)


def test_an_alias_is_removed_and_its_history_stays(versions):
    versions.set_alias("digits", "production", 1)
    versions.set_alias("digits", "production", 2)
    with pytest.raises(RegistryError, match="points at 'digits:2', not at 'digits:1' as expected"):
        versions.remove_alias("digits", "production", expected=1)
    versions.remove_alias("digits", "production", expected=2)
    with pytest.raises(UnknownTaskError, match="'digits' has no alias 'production'"):
        versions.get("digits@production")
    with pytest.raises(RegistryError, match="There is no alias 'digits@production'"):
        versions.remove_alias("digits", "production")
    assert [event.details for event in versions.events() if event.kind == "alias"] == [
        {"before": None, "version": 1},
        {"before": 1, "version": 2},
        {"before": 2, "version": None},
    ]
    versions.set_alias("digits", "production", 1, expected=0)
    assert versions.get("digits@production").version == 1


def test_an_alias_belongs_to_one_name(versions):
    keep(versions, a_task("birds", 5))
    versions.set_alias("digits", "production", 1)
    versions.set_alias("birds", "production", 1, expected=0)
    assert (versions.get("digits@production").ref, versions.get("birds@production").ref) == ("digits:1", "birds:1")


def test_tags_are_put_on_a_version_and_taken_off(versions):
    for tag in ("shop", "night"):
        versions.tag("digits:1", tag)
    assert versions.record("digits:1").tags == ("night", "shop")
    assert versions.record("digits:2").tags == ()
    versions.untag("digits:1", "night")
    assert versions.record("digits:1").tags == ("shop",)
    with pytest.raises(RegistryError, match="Task 'digits:1' does not have the tag 'night'"):
        versions.untag("digits:1", "night")


@pytest.mark.parametrize("tag", ["", "a\nb", "x" * 200, "\x1b[31m"])
def test_a_tag_that_is_not_valid_is_refused(versions, tag):
    with refused(versions, RegistryError, match="is not a valid tag"):
        versions.tag("digits", tag)


def test_a_note_is_in_the_history(versions):
    for text in ("labelled again", "with 日本 and 'quotes'\n"):
        versions.note("digits:1", text)
    noted = [event for event in versions.events("digits") if event.kind == "noted"]
    assert [(event.subject, event.details["text"]) for event in noted] == [
        ("digits:1", "labelled again"),
        ("digits:1", "with 日本 and 'quotes'\n"),
    ]


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_note_is_refused(versions, text):
    with refused(versions, RegistryError, match="The note is empty"):
        versions.note("digits", text)


def test_a_note_that_no_database_can_hold_is_refused(versions):
    with refused(versions, RegistryError, match=r"The note cannot be encoded as UTF-8"):
        versions.note("digits", "half a letter: \ud800")
