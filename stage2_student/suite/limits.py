"""A part of a benchmark: as many items as are wanted, of its kinds in turn, and groups whole."""

from collections import defaultdict
from collections.abc import Sequence

from vlm_distill_cache.data.benchmarks.items import Item


def take(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first items of each kind in turn, whole groups, until there are ``limit``; in the order of the benchmark.

    A group that does not fit is passed over; where none fits at all, the first is cut.
    """
    if limit is None or len(items) <= limit:
        return list(items)
    kinds: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for place, item in enumerate(items):
        kinds[item.kind].setdefault(f"g{item.group}" if item.group else f"i{item.item_id}", []).append(place)
    queues = [iter(groups.values()) for groups in kinds.values()]
    taken: list[int] = []
    while queues:
        for queue in list(queues):
            group = next(queue, None)
            if group is None:
                queues.remove(queue)
            elif len(taken) + len(group) <= limit:
                taken += group
            if len(taken) == limit:
                return [items[place] for place in sorted(taken)]
    taken = taken or next(iter(next(iter(kinds.values())).values()))[:limit]
    return [items[place] for place in sorted(taken)]
