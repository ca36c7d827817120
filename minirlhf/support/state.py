"""An optimizer's state as named tensors and JSON, so that no checkpoint holds a pickle."""

from torch import Tensor
from torch.optim import Optimizer


def pack_optimizer(opt: Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict]:
    """State of `opt` (AdamW: step, exp_avg, exp_avg_sq) as tensors '{prefix}{index}.{key}', all else for
    JSON."""
    state, groups = opt.state_dict()["state"], opt.state_dict()["param_groups"]
    tensors = {f"{prefix}{i}.{key}": value for i, slots in state.items() for key, value in slots.items()}
    return tensors, {"groups": groups, "keys": {i: list(slots) for i, slots in state.items()}}


def unpack_optimizer(opt: Optimizer, tensors: dict[str, Tensor], saved: dict, prefix: str) -> None:
    """Undo `pack_optimizer`, in an optimizer over the same parameters in the same order."""
    state = {int(i): {k: tensors[f"{prefix}{i}.{k}"] for k in keys} for i, keys in saved["keys"].items()}
    opt.load_state_dict({"state": state, "param_groups": saved["groups"]})
