"""Whether config.json says of layers and sizes what the tensors have; what it does not say is taken from these.

All of it by headers alone. A number of the configuration that is used without being compared here is one that tensors
say nothing of, or that is compared where they are found: the number of experts, their hidden size, and the router's
shapes.
"""

from collections.abc import Sequence

from jax_megamoe.checkpoints.experts import LayerExperts
from jax_megamoe.checkpoints.families import Config, Family

_LOOK = "look whether they belong together"


def check_layers(config: Config, family: Family, held: Sequence[int]) -> None:
    """Raises `CheckpointError` for experts in layers, the numbers of `held`, that have none or are none.

    Of layers that should have experts and have none only the first ones are looked for, where the configuration does
    not say that they are dense: files may be missing, too.
    """
    num_layers, sparse = config.count("num_layers"), set(config.moe_layers())
    # Who wants no multi-token prediction says 0, and has its layers in the files all the same.
    num_mtp_layers = config.stated("num_mtp_layers") or None
    if held and held[0] > 0 and family.has_dense_layers and not config.says_which_are_dense():
        raise config.error(
            f"does not say which layers are dense, and layer {held[0]} of the files is the first with experts: give it "
            f"{config.key('num_dense_layers')} = {held[0]}, or download all files of the checkpoint."
        )
    for layer in held:
        if layer < num_layers and layer not in sparse:
            raise config.error(f"says that layer {layer} has no experts, and the files have some: {_LOOK}.")
        # Without a number any layers may follow.
        if num_mtp_layers is not None and layer >= num_layers + num_mtp_layers:
            raise config.error(
                f"has {config.key('num_layers')} = {num_layers} and {config.key('num_mtp_layers')} = {num_mtp_layers}, "
                f"and layer {layer} of the files has experts: {_LOOK}; for some of the layers leave config.json as it "
                "is published, and pass layers=."
            )


def check_experts(config: Config, family: Family, experts: LayerExperts) -> None:
    """Raises `CheckpointError` for routed experts of another intermediate size."""
    wanted, found = config.stated(family.size), experts.intermediate_size
    if wanted not in (None, found):
        raise experts.error(
            0,
            f"is of experts whose intermediate size is {found}, wanted {config.key(family.size)} = {wanted} of "
            f"config.json: {_LOOK}.",
        )


def check_shared(config: Config, shared: LayerExperts, routed: LayerExperts) -> None:
    """Raises `CheckpointError` for shared experts of other sizes, or where there should be none."""
    size, count = config.stated("shared_size"), config.stated("num_shared_experts")
    wanted, said = size, f"{config.key('shared_size')} = {size}"
    if size is None and count is not None:
        wanted = count * routed.intermediate_size
        said = f"{config.key('num_shared_experts')} = {count} times the {routed.intermediate_size} of an expert,"
    # One network, which may be taken for several experts.
    found = shared.num_experts * shared.intermediate_size
    if wanted not in (None, found):
        raise shared.error(
            0, f"is of shared experts with an intermediate size of {found}, wanted {said} by config.json: {_LOOK}."
        )
    model_size = config.stated("model_size")
    if model_size not in (None, shared.hidden_size):
        raise shared.error(
            0,
            f"is of shared experts whose hidden size is {shared.hidden_size}, wanted {config.key('model_size')} = "
            f"{model_size} of config.json: {_LOOK}.",
        )
