"""Descriptions of shards check themselves and do their arithmetic."""

import pytest
import torch

from megatron.core.dist_checkpointing import dict_utils
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.dist_checkpointing.utils import (
    add_prefix_for_sharding,
    apply_prefix_mapping,
    replace_prefix_for_sharding,
)


def test_place_in_the_global_tensor() -> None:
    shard = ShardedTensor.from_rank_offsets("w", torch.zeros(3, 4), (0, 2, 5), (2, 1, 2), prepend_axis_num=1)
    assert shard.global_shape == (5, 3, 8)
    assert shard.global_offset == (2, 0, 4)
    assert shard.axis_fragmentations == (5, 1, 2)
    assert shard.global_slice() == (2, slice(0, 3), slice(4, 8))
    assert shard.local_chunk_offset_in_global() == (2, 0, 1)
    assert shard.max_allowed_chunks() == (5, 1, 2)


def test_coordinates_of_a_flattened_range() -> None:
    shard = ShardedTensor.from_rank_offsets_flat(
        "w", torch.zeros(3), (2, 4), (0, 1, 3), (1, 1, 2), prepend_axis_num=1, flattened_range=slice(3, 6)
    )
    assert [tuple(c) for c in zip(*shard.local_coordinates())] == [(0, 3), (1, 0), (1, 1)]
    assert [tuple(c) for c in zip(*shard.global_coordinates())] == [(1, 2, 3), (1, 3, 0), (1, 3, 1)]


def test_narrowing() -> None:
    shard = ShardedTensor.from_rank_offsets("w", torch.arange(8.0).reshape(4, 2), (0, 1, 3))
    (part,) = shard.narrow(0, 2, 2)
    assert (part.global_shape, part.global_offset, part.data.tolist()) == ((6, 2), (2, 0), [[4, 5], [6, 7]])
    flat = ShardedTensor.from_rank_offsets_flat(
        "w", torch.arange(3.0, 7.0), (4, 2), (0, 1, 3), flattened_range=slice(3, 7)
    )
    (part,) = flat.narrow(0, 2, 2)
    assert (part.flattened_range, part.data.tolist()) == (slice(0, 3), [4, 5, 6])
    assert flat.narrow(0, 0, 1) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_shape": (3,)}, "shape"),
        ({"global_offset": (3,)}, "not aligned|outside"),
        ({"global_offset": (4,)}, "outside"),
        ({"dtype": torch.int32}, "dtype"),
        ({"axis_fragmentations": (2, 1)}, "axis_fragmentations"),
        ({"flattened_range": slice(0, 3)}, "flattened_range"),
    ],
)
def test_contradictions_are_refused(fields: dict, message: str) -> None:
    values = {
        "key": "w",
        "data": torch.zeros(2),
        "dtype": torch.float32,
        "local_shape": (2,),
        "global_shape": (4,),
        "global_offset": (2,),
        "axis_fragmentations": (2,),
    }
    ShardedTensor(**values)
    with pytest.raises(CheckpointingException, match=message):
        ShardedTensor(**{**values, **fields})


def test_names_of_objects() -> None:
    thing = ShardedObject("decoder.layers.mlp.linear_fc1._extra_state", None, (2,), (0,))
    assert thing.unique_key == "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"
    back = ShardedObject.empty_from_unique_key("rng_state/shard_0.1_2.4")
    assert (back.key, back.global_offset, back.global_shape) == ("rng_state", (0, 1), (2, 4))
    with pytest.raises(CheckpointingException, match="cell"):
        ShardedObject("o", None, (2,), (2,))


def test_main_replica() -> None:
    assert is_main_replica(0) and is_main_replica((0, 0, 0))
    assert not is_main_replica(1) and not is_main_replica((0, 1, 0))


def test_renaming() -> None:
    state = {"a": ShardedObject("x.a", None, (1,), (0,)), "b": [ShardedObject("y.b", None, (1,), (0,))]}
    add_prefix_for_sharding(state, "p.")
    assert (state["a"].key, state["b"][0].key) == ("p.x.a", "p.y.b")
    replace_prefix_for_sharding(state, "p.", "")
    apply_prefix_mapping(state, {"x.": "z.", "q.": "r."})
    assert (state["a"].key, state["b"][0].key) == ("z.a", "y.b")
    with pytest.raises(ValueError, match="start with"):
        replace_prefix_for_sharding(state, "z.", "")


def test_optimizer_state_takes_the_place_of_its_parameter() -> None:
    model = torch.nn.Linear(4, 2)
    model_state = {
        "w": ShardedTensor.from_rank_offsets("fc.weight", model.weight, (0, 1, 2)),
        "b": ShardedTensor.from_rank_offsets("fc.bias", model.bias, (0, 1, 2)),
    }
    optimizer = torch.optim.Adam([model.bias, model.weight])
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    places = get_param_id_to_sharded_param_map(model_state, [model.bias, model.weight])
    assert {number: shard.key for number, shard in places.items()} == {0: "fc.bias", 1: "fc.weight"}
    state = optimizer.state_dict()
    optim_state_to_sharding_state(state, places, exclude_keys=("step",))
    moment = state["state"][1]["exp_avg"]
    assert (moment.key, moment.global_shape) == ("optimizer.state.exp_avg.fc.weight", (4, 4))
    assert set(state["state"][1]) == {"exp_avg", "exp_avg_sq"}
    assert state["param_groups"][0]["params"].unwrap() == [0, 1]
    with pytest.raises(ValueError, match="1 of 1 optimizer parameters"):
        get_param_id_to_sharded_param_map(model_state, [torch.nn.Parameter(torch.zeros(3))])


def test_trees() -> None:
    tree = {"a": [1, 2, {"b": 3}], "c": {}}
    odd, even = dict_utils.extract_matching_values(tree, lambda x: x % 2 == 1, return_lists_as_dicts=True)
    assert odd == {"a": {0: 1, 2: {"b": 3}}} and even == {"a": {1: 2}, "c": {}}
    merged = dict_utils.merge(odd, even)
    assert dict_utils.restore_lists(merged, tree) == tree
    assert dict_utils.diff({"a": 1, "b": [1, 2]}, {"b": [1, 3], "c": 0}) == (
        [("a",)],
        [("c",)],
        [(("b", 1), int, int)],
    )
    with pytest.raises(ValueError, match="duplicate"):
        dict_utils.merge({"a": 1}, {"a": 2})
    assert dict_utils.map_reduce([1, 2, 3], lambda x: x % 2, reduce_fn=sum) == {1: 4, 0: 2}
