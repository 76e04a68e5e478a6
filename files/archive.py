"""What a torch file claims to hold, read without running its code and without allocating memory for it.

`header` walks the pickle of a file with stand-ins: tensors come out on the meta device, and a tensor larger than the
file is refused. `torch.load(weights_only=True)` then reads the files that pass.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAX_PICKLE = 64_000_000  # bytes of structure, beside the tensors; a DeiT-B with its optimizer has 200,000
MAX_RECORDS = 200_000
LIBRARIES = {"timm", "torch", "torchvision", "transformers", "models"}  # whose classes are models
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
DTYPES = dict(
    FloatStorage=torch.float32,
    DoubleStorage=torch.float64,
    HalfStorage=torch.float16,
    BFloat16Storage=torch.bfloat16,
    LongStorage=torch.int64,
    IntStorage=torch.int32,
    ShortStorage=torch.int16,
    CharStorage=torch.int8,
    ByteStorage=torch.uint8,
    BoolStorage=torch.bool,
    UntypedStorage=torch.uint8,
)


class ArchiveError(ValueError):
    """A file that is refused; the message continues after the file's name."""


class NeedsCode(ArchiveError):
    """A file that would call something other than the functions that rebuild tensors."""


class Damaged(ArchiveError):
    """An incomplete or damaged file."""


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    numel: int


class _Namespace:
    """Stands in for an argparse.Namespace, which training scripts store with their arguments."""


@dataclass(frozen=True)
class _Number:
    """Stands in for a numpy dtype of numbers."""

    kind: str


def _number(kind: Any, *_: Any) -> _Number:
    if not isinstance(kind, str) or not re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", kind):
        raise NeedsCode("needs unpickling of code")  # an array of objects could hold anything
    return _Number(kind)


def _scalar(kind: Any, content: Any = b"") -> float:
    if not isinstance(kind, _Number) or not isinstance(content, bytes | str):
        raise NeedsCode("needs unpickling of code")
    return 0.0


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise Damaged(f"is damaged: {str(value)[:40]!r} is not a size")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> torch.Tensor:
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        raise Damaged("is damaged: a tensor has no values")
    sizes, steps = [_count(n) for n in shape], [_count(n) for n in stride]
    last = _count(offset) + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if (elements := math.prod(sizes)) and (last >= storage.numel or elements > storage.numel):
        raise Damaged(f"is damaged: a tensor of {elements:,} elements over {storage.numel:,}")
    return torch.empty_strided(sizes, steps, dtype=storage.dtype, device="meta")


def _same(value: Any, *_: Any) -> Any:
    return value


def _subclass(rebuild: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    if rebuild not in (_tensor, _same):
        raise NeedsCode("needs unpickling of code")
    return rebuild(*arguments)


KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _same,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    ("torch.nn.parameter", "Parameter"): "Parameter",
    ("torch", "Size"): tuple,
    ("torch", "device"): _same,
    ("builtins", "set"): list,
    ("__builtin__", "set"): list,
    ("argparse", "Namespace"): _Namespace,
    ("numpy", "dtype"): _number,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,  # of numpy 2
    ("_codecs", "encode"): _same,  # of a scalar's bytes
}


class _Header(pickle._Unpickler):  # the one in Python: its memo is a dict, and each instruction can be overridden
    def __init__(self, file: BinaryIO, sizes: dict[str, int] | None) -> None:
        """sizes: bytes of each storage by its key; None where the storages follow the pickle."""
        super().__init__(file, encoding="utf-8")
        self.sizes, self.claimed = sizes, {}

    def find_class(self, module: str, name: str) -> Any:
        if (known := KNOWN.get((module, name))) is not None:
            return known
        if module in ("torch", "torch.cuda", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        hint = "; save the model's state_dict() in place of the model" if module.split(".")[0] in LIBRARIES else ""
        raise NeedsCode(
            f"needs unpickling of code ({module[:60]}.{name[:60]}), which could run anything: only tensors "
            f"and plain values are read{hint}"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise Damaged("is damaged: it refers to something that is not a storage")
        claimed = _count(numel) * dtype.itemsize
        if self.sizes is not None and self.sizes.get(key) != claimed:
            raise Damaged(f"is damaged: storage {key[:20]} has {self.sizes.get(key)} bytes, not {claimed:,}")
        self.claimed[key] = claimed
        return _Storage(dtype, numel)

    def load_reduce(self) -> None:
        if not any(self.stack[-2] is known for known in KNOWN.values()):
            raise NeedsCode("needs unpickling of code")
        super().load_reduce()

    def load_newobj(self) -> None:
        if self.stack[-2] is not _Namespace:
            raise NeedsCode("needs unpickling of code")
        super().load_newobj()

    def load_build(self) -> None:
        """Ignore the attributes that a state dict carries along."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict | _Namespace | _Number):
            raise NeedsCode("needs unpickling of code")

    def refuse(self) -> None:
        raise NeedsCode("needs unpickling of code")

    dispatch = dict(pickle._Unpickler.dispatch)
    for _code, _action in ((pickle.REDUCE, load_reduce), (pickle.NEWOBJ, load_newobj), (pickle.BUILD, load_build)):
        dispatch[_code[0]] = _action
    for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8):
        dispatch[_code[0]] = refuse


def _records(archive: zipfile.ZipFile, size: int) -> tuple[str, dict[str, int]]:
    """(name of the pickle, bytes of each storage). Raises Damaged for names and sizes that torch does not write."""
    infos = archive.infolist()
    if len(infos) > MAX_RECORDS or len({info.filename for info in infos}) < len(infos):
        raise Damaged(f"is damaged: {len(infos):,} records, or two of one name")
    if sum(info.file_size for info in infos) > size or any(info.compress_type for info in infos):
        raise Damaged("is not a torch file: its records are compressed, or larger than the file")
    root = infos[0].filename.split("/")[0] if infos else ""
    for info in infos:
        parts = info.filename.split("/")
        if parts[0] != root or not root or len(parts) < 2 or {"", ".", ".."} & set(parts) or "\\" in info.filename:
            raise Damaged(f"is not a torch file: it holds {info.filename[:80]!r}")
    sizes = {
        info.filename.removeprefix(f"{root}/data/"): info.file_size
        for info in infos
        if info.filename.startswith(f"{root}/data/")
    }
    return f"{root}/data.pkl", sizes


def _of_zip(path: Path, size: int) -> Any:
    with zipfile.ZipFile(path) as archive:
        name, sizes = _records(archive, size)
        if archive.getinfo(name).file_size > MAX_PICKLE:
            raise Damaged(f"is not a torch file: {archive.getinfo(name).file_size:,} bytes of structure")
        with archive.open(name) as file:
            return _Header(file, sizes).load()


def _of_legacy(path: Path, size: int) -> Any:
    with open(path, "rb") as file:
        if _Header(file, {}).load() != LEGACY_MAGIC or _Header(file, {}).load() != LEGACY_PROTOCOL:
            raise Damaged("is truncated or not a torch file")
        _Header(file, {}).load()  # describes the machine that wrote it
        header = _Header(file, None)
        content = header.load()
        _Header(file, {}).load()
        if (claimed := sum(header.claimed.values())) > size - file.tell():
            raise Damaged(f"is truncated: its tensors take {claimed:,} bytes, {size - file.tell():,} are left")
        return content


def header(path: str | Path) -> Any:
    """The content of a torch file, with tensors on the meta device. Raises ArchiveError; runs and allocates nothing."""
    path = Path(path)
    size = os.path.getsize(path)
    try:
        return _of_zip(path, size) if zipfile.is_zipfile(path) else _of_legacy(path, size)
    except ArchiveError:
        raise
    except (RecursionError, MemoryError) as error:
        raise Damaged(f"is damaged ({type(error).__name__})") from None
    except Exception:  # a damaged pickle can fail at any instruction
        with open(path, "rb") as file:
            begun = file.read(4) == b"PK\3\4"
        what = (
            "truncated or damaged: it begins like a torch file but does not end like one"
            if begun
            else "truncated or not a torch file"
        )
        raise Damaged(f"is {what}") from None
