"""YAML files that people write: a mapping of names to values, or one line about what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from addenda.exceptions import DataError


def read_mapping(file: Path) -> dict[str, Any]:
    """What a YAML file says; of an empty one, nothing.

    Raises:
        DataError: it cannot be read, or is no mapping.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The file {str(file)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"The file {str(file)!r} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise DataError(f"The file {str(file)!r} is not valid YAML{place}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"The file {str(file)!r} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else "one value"
        raise DataError(f"The file {str(file)!r} holds {found}; it must be a mapping, of lines such as `epochs: 20`.")
    return values
