"""Which linear layers of a model multiply in fp8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.distributed import ProcessGroup

from megatron.core.fp8.products import Fp8Products
from megatron.core.fp8.recipes import Recipe, is_in_fp8
from megatron.core.fp8.weights import keep_in_fp8
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size

MakeProducts = Callable[[str, bool], Fp8Products]
"""(how the layer is cut, "column" or "row"; whether it is an expert's) -> its products."""

CUT_OPERANDS: dict[str, tuple[bool, bool, bool]] = {"column": (False, True, True), "row": (True, True, False)}
"""Of x, W and dy, which ones are cut over the tensor parallel ranks."""


def compute_in_fp8(
    layer: nn.Module, config: TransformerConfig, layer_number: int | None, groups: ProcessGroupCollection
) -> None:
    """Let the linear layers inside `layer` multiply in fp8, if the configuration wants it of this layer.

    Embeddings, norms, routers, attention cores and the output layer stay as they are.

    Args:
        layer_number: from 1, in the whole model; None for what is apart from the stack.
    """
    if not is_in_fp8(config, layer_number):
        return
    make = partial(_products, Recipe.of(config), groups)
    for module in layer.modules():
        use = getattr(module, "use_products", None)
        if use is not None:
            use(make)
            if config.fp8_param:
                for weight, products in module.products_of_weights():  # type: ignore[operator]
                    keep_in_fp8(weight, products)


def _products(recipe: Recipe, groups: ProcessGroupCollection, cut: str, is_expert: bool) -> Fp8Products:
    over_tp = groups.expt_tp if is_expert else groups.tp
    over_tokens = None if is_expert else groups.cp
    of_operands: list[list[ProcessGroup]] = []
    for is_weight, is_cut in zip((False, True, False), CUT_OPERANDS[cut]):
        candidates = (over_tp if is_cut else None, None if is_weight else over_tokens)
        of_operands.append([group for group in candidates if group is not None and get_pg_size(group) > 1])
    return Fp8Products(recipe, of_operands, is_expert)
