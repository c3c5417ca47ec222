"""YAML as people write it: every key once, faults in one line."""

from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode


class YamlError(ValueError):
    """A text is not YAML; one line that says where and why."""


def parse_yaml(text: str) -> Any:
    """Parse a YAML text as `yaml.safe_load` does, but refuse a mapping that has a key twice.

    YAML's readers keep the last of them: a forgotten dash would drop an entry of a list, in silence.

    Raises:
        YamlError: It is not YAML, or a key stands twice.
    """
    try:
        loader = _Loader(text)
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
    except (ValueError, OverflowError) as error:  # 2024-13-45 looks like a date
        raise YamlError(f"a value in it cannot be read ({error}); put texts in quotes") from error


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Each mapping as it is written, before what ``<<`` takes in is put among its keys."""
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], Node] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                continue
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} stands twice, first in line {first.start_mark.line + 1}; write it once, and "
                    "begin each entry of a list with a dash of its own",
                    problem_mark=key.start_mark,
                )
        return node
