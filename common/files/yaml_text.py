"""YAML as people write it: every key once, faults in one line."""

from typing import Any

MAX_CHARACTERS = 1_000_000
MAX_BYTES = 4 * MAX_CHARACTERS  # of so many in UTF-8


class YamlError(ValueError):
    """A text is not YAML; one line that says where and why."""


def parse_yaml(text: str) -> Any:
    """Parse a YAML text as `yaml.safe_load` does, but refuse a mapping that has a key twice, and what JSON has not.

    YAML's readers keep the last of them: a forgotten dash would drop an entry of a list, in silence.

    Raises:
        YamlError: It is not YAML, a key stands twice, a value is a date, a set, bytes or an object, or it has more text or
            values than any configuration.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"it has {len(text)} characters, more than the {MAX_CHARACTERS} that are read")
    import yaml

    from vlm_distill_cache.common.files.yaml_loader import Loader

    try:
        loader = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(f"{place}{said or type(error).__name__}") from error
    except yaml.YAMLError as error:  # characters that YAML has not
        raise YamlError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise YamlError("it is nested too deeply") from error
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:  # !!bool maybe
        raise YamlError(f"a value in it cannot be read ({error}); put texts in quotes") from error
