"""Functions over trees of dictionaries and lists."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

Tree = dict | list
Path = tuple[str | int, ...]
U = TypeVar("U")
V = TypeVar("V")


def extract_matching_values(
    x: Tree, predicate: Callable[[Any], bool], return_lists_as_dicts: bool = False
) -> tuple[Tree, Tree]:
    """Two trees: the leaves that satisfy `predicate`, and the others. Empty branches appear in the second one
    only.

    With `return_lists_as_dicts` lists become dictionaries from index to value, so that positions survive.
    """

    def split(node: Tree) -> tuple[Tree, Tree]:
        matching: dict = {}
        rest: dict = {}
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, (dict, list)):
                inner, others = split(value)
                if inner:
                    matching[key] = inner
                if others or not value:
                    rest[key] = others
            else:
                (matching if predicate(value) else rest)[key] = value
        if isinstance(node, list) and not return_lists_as_dicts:
            return list(matching.values()), list(rest.values())
        return matching, rest

    if not isinstance(x, (dict, list)):
        raise ValueError(f"expected a dict or a list, got {type(x).__name__}")
    return split(x)


def diff(x1: Any, x2: Any, prefix: Path = ()) -> tuple[list, list, list]:
    """What distinguishes two trees: (paths only in x1, paths only in x2, (path, type 1, type 2) of differing
    leaves)."""
    if isinstance(x1, dict) and isinstance(x2, dict):
        keys1, keys2 = list(x1), list(x2)
    elif isinstance(x1, list) and isinstance(x2, list):
        keys1, keys2 = list(range(len(x1))), list(range(len(x2)))
    else:
        return [], [], [] if _equal(x1, x2) else [(prefix, type(x1), type(x2))]
    only_left = [(*prefix, k) for k in keys1 if k not in keys2]
    only_right = [(*prefix, k) for k in keys2 if k not in keys1]
    mismatch = []
    for key in (k for k in keys1 if k in keys2):
        left, right, different = diff(x1[key], x2[key], (*prefix, key))
        only_left += left
        only_right += right
        mismatch += different
    return only_left, only_right, mismatch


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
            return False
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and bool(a == b)


def inspect_types(x: Any, prefix: Path = (), indent: int = 4) -> str:
    """Outline of a tree, one line per entry, as text."""
    pad = " " * (indent * len(prefix))
    if isinstance(x, (dict, list)):
        items = list(x.items() if isinstance(x, dict) else enumerate(x))
        lines = [type(x).__name__]
        lines += [f"{pad}{key}: {inspect_types(value, (*prefix, key), indent)}" for key, value in items]
        return "\n".join(lines)
    if isinstance(x, torch.Tensor):
        return f"Tensor of shape {tuple(x.shape)}"
    text = str(x)
    return f"{type(x).__name__}: {text if len(text) <= 30 else text[:30] + '...'}"


def nested_values(x: Tree) -> Iterator[Any]:
    """Leaves of a tree."""
    for value in x.values() if isinstance(x, dict) else x:
        if isinstance(value, (dict, list)):
            yield from nested_values(value)
        else:
            yield value


def nested_items_iter(x: Tree) -> Iterator[tuple[Tree, str | int, Any]]:
    """(container, key, leaf) of each leaf of a tree."""
    for key, value in list(x.items() if isinstance(x, dict) else enumerate(x)):
        if isinstance(value, (dict, list)):
            yield from nested_items_iter(value)
        else:
            yield x, key, value


def dict_map(f: Callable, d: dict) -> None:
    """Replace the values of one dictionary by `f(value)`."""
    for key in d:
        d[key] = f(d[key])


def dict_map_with_key(f: Callable, d: dict) -> None:
    """Replace the values of one dictionary by `f(key, value)`."""
    for key in d:
        d[key] = f(key, d[key])


def dict_list_map_inplace(f: Callable[[Any], Any], x: Any) -> Any:
    """Replace the leaves of a tree by `f(leaf)`, in place; returns `x`, or `f(x)` if `x` is a leaf itself."""
    if isinstance(x, dict):
        for key in list(x):
            x[key] = dict_list_map_inplace(f, x[key])
    elif isinstance(x, list):
        x[:] = [dict_list_map_inplace(f, value) for value in x]
    else:
        return f(x)
    return x


def dict_list_map_outplace(f: Callable[[Any], Any], x: Any) -> Any:
    """A new tree with leaves `f(leaf)`."""
    if isinstance(x, dict):
        return {key: dict_list_map_outplace(f, value) for key, value in x.items()}
    if isinstance(x, list):
        return [dict_list_map_outplace(f, value) for value in x]
    return f(x)


def merge(x1: Any, x2: Any, key: Path = ()) -> Any:
    """`x1` with the entries of `x2` added, in place.

    A dictionary with integer keys may stand for a list: it extends or fills the list at those positions.

    Raises:
        ValueError: both have a leaf at the same path.
    """
    if isinstance(x1, dict) and isinstance(x2, (dict, list)):
        for k, value in x2.items() if isinstance(x2, dict) else enumerate(x2):
            x1[k] = merge(x1[k], value, (*key, k)) if k in x1 else value
        return x1
    if isinstance(x1, list) and isinstance(x2, dict):
        return _merge_at_positions(x1, x2, key)
    if isinstance(x1, list) and isinstance(x2, list):
        if len(x1) != len(x2):
            raise ValueError(f"cannot merge two lists of lengths {len(x1)} and {len(x2)} at {key}")
        x1[:] = [merge(a, b, (*key, i)) for i, (a, b) in enumerate(zip(x1, x2))]
        return x1
    raise ValueError(f"duplicate values at {key} ({type(x1).__name__} and {type(x2).__name__})")


def _merge_at_positions(x1: list, x2: dict, key: Path) -> list:
    merged = dict(enumerate(x1))
    for position, value in x2.items():
        if not isinstance(position, int):
            raise ValueError(f"cannot merge the entry {position!r} into a list at {key}")
        merged[position] = merge(merged[position], value, (*key, position)) if position in merged else value
    if sorted(merged) != list(range(len(merged))):
        raise ValueError(f"merging lists at {key} leaves gaps: {sorted(merged)}")
    x1[:] = [merged[i] for i in range(len(merged))]
    return x1


def restore_lists(part: Any, original: Any) -> Any:
    """`part` with dictionaries of all positions made lists again wherever `original` has a list. Shares the
    leaves."""
    if not isinstance(part, (dict, list)) or not isinstance(original, (dict, list)):
        return part
    children = original if isinstance(original, dict) else dict(enumerate(original))
    items = part.items() if isinstance(part, dict) else enumerate(part)
    restored = {key: restore_lists(value, children.get(key)) for key, value in items}
    complete = sorted(restored, key=repr) == sorted(children, key=repr)
    if isinstance(part, list) or isinstance(original, list) and complete:
        return [restored[i] for i in range(len(restored))]
    return restored


def map_reduce(
    xs: Iterable[U],
    key_fn: Callable[[U], Any] = lambda x: x,
    value_fn: Callable[[U], Any] = lambda x: x,
    reduce_fn: Callable[[list], Any] = lambda x: x,
) -> dict:
    """Group `xs` by `key_fn`, map the members by `value_fn`, reduce each group by `reduce_fn`."""
    groups: dict[Any, list] = defaultdict(list)
    for x in xs:
        groups[key_fn(x)].append(value_fn(x))
    return {key: reduce_fn(values) for key, values in groups.items()}
