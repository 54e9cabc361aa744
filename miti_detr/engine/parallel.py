"""One model in several processes."""

from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wrap_for_processes(model: nn.Module) -> nn.Module:
    """Let several processes train one model; a single process gets the model itself.

    Detectron2's own function names a GPU, which torch refuses for a model on the CPU, and expects
    every parameter to be used: those of unused levels of a feature pyramid are not.

    Args:
        model: on its device.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).device.type == "cuda"
    devices = [comm.get_local_rank()] if on_gpu else None
    backbone = getattr(model, "backbone", None)
    return DistributedDataParallel(
        model,
        device_ids=devices,
        broadcast_buffers=False,
        find_unused_parameters=getattr(backbone, "has_idle_parts", False),
    )
