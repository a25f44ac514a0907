"""The safetensors reader: right where the library is, and clear about what is wrong with a file."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcv_core.errors import CheckpointError
from lcv_core.weights.checkpoint import open_checkpoint
from lcv_core.weights.tensors import TensorFile, TensorSource


def _header(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _entry(**change: object) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change
    return _header(json.dumps({"a": entry}).encode()) + bytes(8)


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"is empty \(0 bytes\); download"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer.*git lfs pull"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
    "zip": (b"PK\x03\x04" + bytes(range(30)), "PyTorch pickle.*safetensors"),
    "pickle": (pickle.dumps({"a": [1.0] * 20}), "Python pickle"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(20), "GGUF"),
    "noise": (b"\xff" * 64, "not a safetensors file"),
    "short": (b"abc", "not a safetensors file"),
    "huge header": (struct.pack("<Q", 200_000_000) + b"{}", "not a safetensors file"),
    "header cut": (struct.pack("<Q", 500) + b'{"a":', "cut short"),
    "json": (_header(b'{"a": nope}'), "damaged header"),
    "not utf-8": (_header(b'{"\xff\xfe": 1}'), "damaged header"),
    "list": (_header(b"[1, 2]"), "damaged header"),
    "no offsets": (_header(b'{"a": {"dtype": "F32", "shape": [2]}}'), "damaged header"),
    "deep": (_header(b"[" * 100_000), "damaged header"),
    "size": (_entry(shape=[3]), "damaged header"),
    "negative": (_entry(data_offsets=[-8, 0]), "damaged header"),
    "dtype": (_entry(dtype="F128"), "dtype F128, which is not supported"),
    "data cut": (_entry()[:-3], "cut short: 3 bytes are missing"),
    "data long": (_entry() + b"xx", "2 bytes after its last tensor"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_say_what_is_wrong(tmp_path: Path, damage: str) -> None:
    content, message = DAMAGE[damage]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_reader_agrees_with_the_library(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    state = {str(kind): torch.randint(0, 2, (3, 5)).to(kind) for kind in kinds}
    state |= {"f8": torch.randn(4, 4).to(torch.float8_e4m3fn), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    file = TensorFile(path)
    source = TensorSource.open(tmp_path)
    assert set(source) == set(state) and source.nbytes == sum(t.nbytes for t in state.values())
    for name, tensor in load_file(path).items():
        read = file.read(name)
        assert read.dtype == tensor.dtype == file.dtype(name) and read.shape == tensor.shape == file.shape(name)
        assert read.view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.dim() else read == tensor
    assert file.read("scalar", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_meta_reads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3, 2)}, path)
    file = TensorFile(path)
    path.unlink()
    tensor = file.read("a", "meta", torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.is_meta) == ((3, 2), torch.bfloat16, True)
