"""Reads weights that torch has saved, without torch."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_TYPES = {"FloatStorage": np.float32, "LongStorage": np.int64}


def read_state_dict(file: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict by name, from a file in the format of torch before version 1.6.

    Only the objects of a state dict are created; a file that asks for others is refused.

    Raises:
        OSError: the file cannot be read.
        pickle.UnpicklingError: it is not such a file.
    """
    with file.open("rb") as stream:
        for _ in range(3):  # a magic number, the version of the format, and the sizes of the machine's numbers
            _Unpickler(stream, {}).load()
        storages: dict[str, _Storage] = {}
        state = _Unpickler(stream, storages).load()
        if not isinstance(state, dict) or not all(isinstance(tensor, _Tensor) for tensor in state.values()):
            raise pickle.UnpicklingError("the file has no state dict")
        for key in _Unpickler(stream, {}).load():
            storages[key].read(stream)
    return {name: tensor.array() for name, tensor in state.items()}


class _Storage:
    def __init__(self, kind: str, count: int) -> None:
        self.dtype, self.count = np.dtype(_TYPES[kind]), count
        self.values = np.empty(0, self.dtype)

    def read(self, stream: BinaryIO) -> None:
        count = int(np.frombuffer(stream.read(8), "<i8")[0])
        content = stream.read(count * self.dtype.itemsize)
        if count != self.count or len(content) != count * self.dtype.itemsize:
            raise pickle.UnpicklingError("the file is cut short")
        self.values = np.frombuffer(content, self.dtype.newbyteorder("<"))


class _Tensor:
    """The arguments that torch rebuilds a tensor from."""

    def __init__(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def array(self) -> np.ndarray:
        last = self.offset + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))
        if min(self.offset, *self.shape, *self.stride, 0) < 0 or last >= self.storage.count:
            raise pickle.UnpicklingError("a tensor is not within its storage")
        values = self.storage.values[self.offset :]
        view = np.lib.stride_tricks.as_strided(values, self.shape, [step * values.itemsize for step in self.stride])
        return np.ascontiguousarray(view)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, storages: dict[str, _Storage]) -> None:
        super().__init__(stream)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _TYPES:
            return name
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count, _ = pid
        return self._storages.setdefault(key, _Storage(kind, count))
