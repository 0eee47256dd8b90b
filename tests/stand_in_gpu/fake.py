"""Fake tensors of a stand-in GPU: shapes, dtypes and devices are followed, nothing is computed."""

import contextlib
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)


class HostWaits(TorchDispatchMode):
    """Lists where the host would wait for a GPU, and lets it go on.

    A copy that is not `non_blocking` waits. `torch.tensor(..., device=...)` does too, unseen here.
    A value that the host reads is 1, and False for the first `patience` bools, then True.
    """

    supports_higher_order_operators = True

    def __init__(self, patience=0):
        super().__init__()
        self.waits = []
        self._falses_left = patience

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            # FakeTensorMode has no rule for it.
            return args[0]
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "aten":
            # In inference mode, functions arrive here before they are taken apart.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is aten.index_copy.default and args[0].dtype != args[3].dtype:
            # A real GPU refuses this; a fake one has no rule for it.
            raise RuntimeError(f"index_copy: dtype {args[3].dtype}, wanted {args[0].dtype}")
        out = func(*args, **kwargs)
        source = {aten._to_copy.default: 0, aten.copy_.default: 1}.get(func)
        if source is not None and args[source].device != out.device:
            non_blocking = kwargs.get("non_blocking") or (source == 1 and True in args[2:])
            if not non_blocking:
                self.waits.append(f"copy from {args[source].device.type} to {out.device.type}")
        return out

    def _read(self, tensor):
        if tensor.device.type == "cuda":
            self.waits.append(f"value of {tensor.dtype}")
        if tensor.dtype != torch.bool:
            return 1.0 if tensor.is_floating_point() else 1
        self._falses_left -= 1
        return self._falses_left < 0


class FakeGpu:
    """Moves models to fake tensors, and runs code on them."""

    def __init__(self):
        # A tensor of the CPU that meets those of the GPU becomes a fake one of the CPU: an error.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def move(self, module):
        """Replace a module's tensors by fake ones on the GPU."""
        with self._mode:
            for part in module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    moved = self._mode.from_tensor(parameter.detach()).to(DEVICE)
                    part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
                for name, buffer in part.named_buffers(recurse=False):
                    part._buffers[name] = self._mode.from_tensor(buffer).to(DEVICE)
        return module

    @contextlib.contextmanager
    def running(self, patience=0):
        """Run the body on fake tensors, uncompiled; yields its `HostWaits`."""
        # A list is one copy from a real GPU; from a fake one it is one value after the other.
        one_by_one = FakeTensor.tolist
        with (
            self._mode,
            HostWaits(patience) as waits,
            mock.patch.object(FakeTensor, "tolist", lambda tensor: one_by_one(tensor.cpu())),
            torch.compiler.set_stance("force_eager"),
        ):
            yield waits
