"""What a file is by its first bytes: safetensors, or what people give in place of weights."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder of Hugging Face's or timm's
BEGINNINGS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the weights: git lfs pull fetches them"),
    (b"<", "is a web page, not weights: the download went wrong"),
    (b"\x89HDF", "is an HDF5 file, of Keras perhaps: only torch and safetensors files are read"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first"),
    (b"GGUF", "is a GGUF file: only torch and safetensors files are read"),
    (b"\x93NUMPY", "is a NumPy array: only torch and safetensors files are read"),
    (b"{", "is JSON: give the file with the weights that it belongs to"),
)
MEMBERS = (  # parts of names in a zip file
    ("/code/", "is a TorchScript program, not weights: save the model's state_dict()"),
    (".npy", "is a NumPy archive, of JAX perhaps: only torch and safetensors files are read"),
    ("archive_format", "is an exported program, not weights: save the model's state_dict()"),
)
ENDINGS = {
    ".safetensors": "is a damaged safetensors file",
    ".onnx": "is an ONNX model: only torch and safetensors files are read",
    ".tflite": "is a TFLite model: only torch and safetensors files are read",
}


class NotWeights(ValueError):
    """A file that holds no weights; the message continues after its name."""


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like one of safetensors: the size of a JSON object, and the object."""
    with open(path, "rb") as file:
        begin = file.read(9)
    return begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= os.path.getsize(path) - 8


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Its tensors, on the CPU. Raises NotWeights for a damaged file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise NotWeights(f"is a damaged safetensors file ({str(error)[:100]})") from None


def weights_in(folder: Path) -> Path:
    """The file with the weights in a folder as Hugging Face and timm write it. Raises NotWeights."""
    if path := next((folder / name for name in WEIGHTS if (folder / name).is_file()), None):
        return path
    if parts := [name for name in WEIGHTS if (folder / f"{name}.index.json").is_file()]:
        raise NotWeights(f"holds weights in several files ({parts[0]}.index.json): save them as one")
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".pt", ".ckpt", ".bin", ".safetensors"))
    hint = f", one of {', '.join(files[:5])}" if files else ""
    raise NotWeights(f"is a folder: name the file{hint}")


def why_unreadable(path: Path) -> str:
    """What a file is that is not a torch file, '' where that is not known."""
    with open(path, "rb") as file:
        begin = file.read(64).lstrip()
    if not begin:
        return "is empty"
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        return next((what for mark, what in MEMBERS if any(mark in name for name in names)), "")
    known = next((what for mark, what in BEGINNINGS if begin.startswith(mark)), "")
    return known or ENDINGS.get(path.suffix.lower(), "")
