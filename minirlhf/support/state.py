"""An optimizer's state as named tensors and JSON, so that no checkpoint holds a pickle."""

import json

from torch import Tensor
from torch.optim import Optimizer

from minirlhf.support.shard import as_piece


def pack_optimizer(opt: Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict]:
    """State of `opt` (AdamW: step, exp_avg, exp_avg_sq) as tensors '{prefix}{index}.{key}', all else for
    JSON."""
    state, groups = opt.state_dict()["state"], opt.state_dict()["param_groups"]
    tensors = {f"{prefix}{i}.{key}": value for i, slots in state.items() for key, value in slots.items()}
    return tensors, {"groups": groups, "keys": {i: list(slots) for i, slots in state.items()}}


def unpack_optimizer(opt: Optimizer, tensors: dict[str, Tensor], saved: dict, prefix: str) -> None:
    """Undo `pack_optimizer`, in an optimizer over the same parameters in the same order.

    These may be sharded; the tensors are whole, or this rank's pieces.  Raises ValueError where the state is
    not that of these parameters."""
    parameters = [p for group in opt.param_groups for p in group["params"]]
    state = {}
    for i, keys in ((int(i), keys) for i, keys in saved["keys"].items()):
        if not 0 <= i < len(parameters) or not {*keys} >= {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the optimizer's state of parameter {i} is incomplete")
        state[i] = {k: as_piece(tensors[f"{prefix}{i}.{k}"], parameters[i]) for k in keys}
        if any(x.shape not in ((), parameters[i].shape) for x in state[i].values()):
            raise ValueError(f"the optimizer's state of parameter {i} has another shape than the parameter")
    groups = opt.state_dict()["param_groups"]
    for own, theirs in zip(groups, saved["groups"], strict=True):
        plain = json.loads(json.dumps(own))
        if odd := [key for key in plain if key != "lr" and theirs.get(key, plain[key]) != plain[key]]:
            raise ValueError(f"the optimizer's {odd[0]} was another")
        own["lr"] = float(theirs["lr"])
    opt.load_state_dict({"state": state, "param_groups": groups})
