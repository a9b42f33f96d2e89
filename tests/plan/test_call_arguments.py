"""Arguments of a layer's call come apart into leaves and back, also out of a mapping that layers share."""

from __future__ import annotations

from collections import UserDict
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from eightgig.plan.call_arguments import open_call

plain = st.integers() | st.text(max_size=3) | st.none() | st.tuples(st.integers(), st.booleans())
mappings = st.dictionaries(st.text(max_size=3), plain, max_size=3).map(UserDict)
arguments = st.lists(plain | mappings, max_size=4)
keywords = st.dictionaries(st.text(max_size=3), plain | mappings, max_size=4)


@given(args=arguments, kwargs=keywords)
def test_what_was_opened_comes_together_again(args: list[Any], kwargs: dict[str, Any]) -> None:
    leaves, structure, opened = open_call(tuple(args), kwargs)
    assert not any(isinstance(leaf, UserDict) for leaf in leaves)
    again_args, again_kwargs, shared = structure.assemble(leaves, opened)
    assert again_args == tuple(args)
    assert again_kwargs == kwargs
    assert shared.are_as_found
    for before, after in zip(tree_leaves((tuple(args), kwargs)), tree_leaves((again_args, again_kwargs)), strict=True):
        assert not isinstance(before, UserDict) or after is not before


def test_another_content_is_another_structure() -> None:
    def structure(mapping: UserDict[str, Any]) -> Any:
        return open_call((mapping,), {})[1]

    assert structure(UserDict(a=1)) == structure(UserDict(a=2))
    assert structure(UserDict(a=1)) != structure(UserDict(b=1))
    assert structure(UserDict(a=1)) != structure(UserDict(a=(1, 2)))
    assert structure(UserDict(a=1)) != open_call(({"a": 1},), {})[1]


def test_what_a_layer_leaves_is_noticed() -> None:
    value = object()
    leaves, structure, opened = open_call((UserDict(kept=(value, value)),), {"other": UserDict()})
    for key, content in (("kept", (value, object())), ("new", value), ("kept", value)):
        args, kwargs, shared = structure.assemble(leaves, opened)
        args[0]["kept"] = (value, value)  # put back what was there
        assert shared.are_as_found
        args[0][key] = content
        assert not shared.are_as_found
        shared.clear()
        assert not args[0]
        assert not kwargs["other"]
    args, kwargs, shared = structure.assemble(leaves, opened)
    kwargs["other"]["kept"] = value
    assert not shared.are_as_found
