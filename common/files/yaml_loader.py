"""How YAML is read here: `yaml_text` bounds the text, this what it stands for. Imports yaml, which command lines start without."""

from itertools import chain
from typing import Any

import yaml
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

MAX_VALUES = 100_000  # of a document, each alias counted as what it stands for
_CORE = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
)
MAX_DIGITS = 100  # of a number: what has more is a text that lacks its quotes, or takes minutes to convert


class Loader(yaml.SafeLoader):
    """yaml's safe one, which refuses keys that stand twice and what JSON has not."""

    def get_single_node(self) -> Node | None:
        """The document, if it is no small text that stands for a large one (aliases of aliases)."""
        node = super().get_single_node()
        if node is not None:
            self._count(node, {})
        return node

    def _count(self, node: Node, known: dict[int, float]) -> float:
        """How many values a node stands for, each of a kind that JSON has; one that contains itself is infinite."""
        if id(node) not in known:
            if node.tag not in _CORE:
                kind = node.tag.removeprefix("tag:yaml.org,2002:")
                raise yaml.MarkedYAMLError(
                    problem=f"a value of the kind {kind[:80]!r}, expected a text, number, list, mapping, true, false or null; "
                    "put texts in quotes",
                    problem_mark=node.start_mark,
                )
            known[id(node)] = float("inf")
            inner = node.value if isinstance(node, CollectionNode) else ()
            nodes = chain.from_iterable(inner) if isinstance(node, MappingNode) else inner
            known[id(node)] = 1 + sum(self._count(child, known) for child in nodes)
        if known[id(node)] > MAX_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_VALUES} values, each alias (*name) counted as what it stands for; write them out",
                problem_mark=node.start_mark,
            )
        return known[id(node)]

    def construct_scalar(self, node: ScalarNode | MappingNode) -> Any:
        """A value's text; a number's is bounded."""
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(node.value)} characters, expected at most {MAX_DIGITS}; put texts in quotes",
                problem_mark=node.start_mark,
            )
        return super().construct_scalar(node)

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
