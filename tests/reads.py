"""A count of what the host waits for."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class ReadValues(TorchDispatchMode):
    """Counts what waits for a device: values read by Python, and tensors moved to the host.

    On a CPU, copies to the host do nothing, and are counted by the names of their methods.
    """

    def __init__(self):
        super().__init__()
        self.read = 0
        self._copies = _HostCopies(self)

    def __enter__(self):
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name
        moved = name in ("aten::_to_copy", "aten::copy_") and found.device != args[-1].device
        self.read += moved or name in ("aten::_local_scalar_dense", "aten::nonzero")
        return found


class _HostCopies(TorchFunctionMode):
    """Counts calls of methods that copy to the host, each once."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, before = kwargs or {}, self.seen.read
        found = function(*args, **kwargs)
        named = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, (str, torch.device))]
        copied = function.__name__ in ("cpu", "tolist", "numpy", "__array__") or (
            function.__name__ == "to" and "cpu" in map(str, named)
        )
        self.seen.read = max(self.seen.read, before + copied)
        return found
