"""A count of what the host waits for."""

from torch.utils._python_dispatch import TorchDispatchMode


class ReadValues(TorchDispatchMode):
    """Counts what waits for a device: values read by Python, and tensors moved to the host."""

    def __init__(self):
        super().__init__()
        self.read = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name
        moved = name in ("aten::_to_copy", "aten::copy_") and found.device != args[-1].device
        self.read += moved or name in ("aten::_local_scalar_dense", "aten::nonzero")
        return found
