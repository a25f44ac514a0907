"""GGUF files: the tensors that the package gives, the model that the original gives, clear words about damage."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lcv_core.errors import CheckpointError
from lcv_core.text.encoder import build_text_model
from lcv_core.weights import gguf as ours
from lcv_core.weights.checkpoint import open_checkpoint, open_text_encoder
from lcv_core.weights.gguf import CHUNK, GGUFFile
from lcv_core.weights.inspect import inspect_checkpoint
from lcv_core.weights.keymaps import FASTVIDEO_DIT, WAN_DIT, sources
from lcv_core.weights.tensors import TensorSource

QUANTISED = ("Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
PATCH = "x_embedder.proj.weight"


def type_of(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind]


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Bytes of a tensor of `shape`: quantised where the package can, else random blocks with moderate scales."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype(np.float32)
    try:
        return gguf.quantize(values, type_of(kind))
    except NotImplementedError:
        elements, width = gguf.GGML_QUANT_SIZES[type_of(kind)]
        blocks = rng.integers(0, 256, (math.prod(shape) // elements, width), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
        places = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}[kind]
        for place in places:
            blocks[:, place : place + 2] = scale
        return blocks.reshape(*shape[:-1], -1)


def write(
    path: Path,
    tensors: Mapping[str, Tensor | np.ndarray],
    kind: Callable[[str, Tensor], str] = lambda name, tensor: "F32",
    architecture: str = "longcat",
    **metadata: Any,
) -> Path:
    """A GGUF file by the package's own writer; `kind` chooses a type for each tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            writer.add_tensor(name, tensor)
            continue
        values = tensor.float().numpy()
        chosen = type_of(kind(name, tensor))
        writer.add_tensor(name, gguf.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def matrices(kind: str) -> Callable[[str, Tensor], str]:
    """`kind` for matrices whose rows fill its blocks, F32 for the rest, as packers do."""
    elements, _ = gguf.GGML_QUANT_SIZES[type_of(kind)]
    return lambda name, tensor: kind if tensor.dim() == 2 and tensor.shape[1] % elements == 0 else "F32"


@pytest.fixture(scope="module")
def state(tiny_checkpoint: Path) -> dict[str, Tensor]:
    source = TensorSource.open(tiny_checkpoint / "dit")
    return {name: source.read(name, dtype=torch.float32) for name in source}


def flat_patch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the writer of a four-dimensional format does with five."""
    return {name: tensor.flatten(1) if tensor.dim() == 5 else tensor for name, tensor in state.items()}


# tensors


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_tensors_are_what_the_package_makes_of_them(tmp_path: Path, kind: str) -> None:
    shape = (3, 512)
    raw = random_blocks(kind, shape)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "any")
    writer.add_tensor("w", raw, raw_dtype=type_of(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = TensorSource.open(tmp_path / "a.gguf")
    expected = torch.from_numpy(gguf.dequantize(raw, type_of(kind)))
    assert source.shape("w") == shape and source.dtype("w") == torch.bfloat16
    assert source.storage("w") == (kind, raw.nbytes) and source.nbytes >= raw.nbytes
    got = source.read("w", dtype=torch.float32)
    assert torch.isfinite(got).all() and got.std() > 0
    assert got.equal(expected)
    assert source.read("w").equal(expected.to(torch.bfloat16))


@pytest.mark.parametrize("kind, dtype", [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats_keep_every_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    file = GGUFFile(write(tmp_path / "a.gguf", {"w": values, "b": values[0]}, lambda name, tensor: kind))
    assert file.dtype("w") == dtype and set(file.keys()) == {"w", "b"}
    assert file.read("w").equal(values) and file.read("b").equal(values[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_files_are_read_in_every_mode(tmp_path: Path, mode: Callable[[], Any]) -> None:
    """ComfyUI loads models in inference mode, of which the threads that read know nothing."""
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    file = GGUFFile(write(tmp_path / "a.gguf", {"w": values}))
    with mode():
        assert file.read("w").equal(values)


def test_tensors_longer_than_a_piece_and_meta(tmp_path: Path) -> None:
    shape = (CHUNK // 512 + 3, 1024)
    raw = random_blocks("Q8_0", shape)
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "any")
    writer.add_tensor("first", np.arange(3, dtype=np.float32))
    writer.add_tensor("w", raw, raw_dtype=type_of("Q8_0"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.read("w", dtype=torch.float32).equal(torch.from_numpy(gguf.dequantize(raw, type_of("Q8_0"))))
    path.unlink()
    meta = file.read("w", "meta")
    assert meta.is_meta and meta.shape == shape and meta.dtype == torch.bfloat16


def test_vocabularies_and_other_metadata_are_passed_over(tmp_path: Path) -> None:
    words = [f"word {i}" for i in range(500)]
    scores = [float(i) for i in range(500)]
    path = write(tmp_path / "a.gguf", {"w": torch.ones(2)}, tokens=words, scores=scores, few=["a", "b"], number=7)
    file = GGUFFile(path)
    assert file.metadata["few"] == ["a", "b"] and file.metadata["number"] == 7
    assert file.metadata["tokens"] is None and file.metadata["scores"] is None
    assert file.read("w").tolist() == [1.0, 1.0]


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"w": torch.ones(2)})
    assert list(TensorSource.open(path)) == list(TensorSource.open(tmp_path)) == ["w"]
    path.rename(tmp_path / "model.gguf")
    assert list(TensorSource.open(tmp_path)) == ["w"]
    write(tmp_path / "other.gguf", {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(model.gguf, other.gguf\)"):
        TensorSource.open(tmp_path)


# the transformer


def noisy_input(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    config = model.config
    latents = torch.randn(1, config.in_channels, 3, 8, 12, generator=g)
    return latents, torch.tensor([500.0]), torch.randn(1, 6, config.caption_channels, generator=g)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind, limit", [("F32", 1e-6), ("BF16", 1e-2), ("Q8_0", 2e-2), ("Q5_1", 0.12), ("Q4_0", 0.3)])
def test_the_model_gives_what_the_original_gives(
    tmp_path: Path, tiny_checkpoint: Path, state: dict[str, Tensor], kind: str, limit: float
) -> None:
    path = write(tmp_path / "longcat.gguf", flat_patch(state), matrices(kind))
    expected = open_checkpoint(tiny_checkpoint).load_dit(dtype=torch.float32)
    checkpoint = open_checkpoint(path)
    assert checkpoint.dit_config == expected.config
    got = checkpoint.load_dit(dtype=torch.float32)
    with torch.no_grad():
        error = relative(got(*noisy_input(got)), expected(*noisy_input(expected)))
    assert error < limit
    if kind.startswith("Q"):
        assert error > 1e-4  # the file was quantised indeed


def test_quantised_files_load_in_one_dtype(tmp_path: Path, tiny_checkpoint: Path, state: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "a.gguf", flat_patch(state), matrices("Q8_0")))
    model = checkpoint.load_dit()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.dtype == torch.bfloat16
    reference = open_checkpoint(tiny_checkpoint).load_dit(dtype=torch.bfloat16)
    with torch.no_grad():
        assert relative(model(*noisy_input(model)), reference(*noisy_input(reference))) < 3e-2
    assert len(checkpoint.fingerprint()) == 16
    assert checkpoint.fingerprint() != open_checkpoint(tiny_checkpoint).fingerprint()


@pytest.mark.parametrize("architecture", ["wan", "flux", "longcat_video"])
@pytest.mark.parametrize("form", ["five", "original shape", "one row per channel", "without time", "joined channels"])
def test_every_form_of_the_patch_embedding(
    tmp_path: Path, state: dict[str, Tensor], form: str, architecture: str
) -> None:
    patch = state[PATCH]
    C, channels, _, p, _ = patch.shape
    stored, metadata = {
        "five": (patch, {}),
        "original shape": (patch.reshape(-1, 64), {f"comfy__gguf__orig_shape__{PATCH}": list(patch.shape)}),
        "one row per channel": (patch.flatten(1), {}),
        "without time": (patch.squeeze(2), {}),
        "joined channels": (patch.reshape(C * channels, 1, p, p), {}),
    }[form]
    path = write(tmp_path / "a.gguf", state | {PATCH: stored}, architecture=architecture, **metadata)
    assert open_checkpoint(path).load_dit().x_embedder.proj.weight.equal(patch)


@pytest.mark.parametrize("shape", [(7, 3), (64, 16, 4, 4), (64, 2)])
def test_a_patch_embedding_of_no_known_form_is_refused(
    tmp_path: Path, state: dict[str, Tensor], shape: tuple[int, ...]
) -> None:
    path = write(tmp_path / "a.gguf", state | {PATCH: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"stores x_embedder.proj.weight as \[.*another conversion"):
        open_checkpoint(path)


def test_a_reshaped_tensor_gets_its_shape_back(tmp_path: Path) -> None:
    values = torch.arange(24.0)
    path = write(tmp_path / "a.gguf", {"w": values.view(4, 6)}, comfy__gguf__orig_shape__w=[2, 3, 4])
    assert GGUFFile(path).read("w").equal(values.view(2, 3, 4))


@pytest.mark.parametrize("rules", [WAN_DIT, FASTVIDEO_DIT], ids=["kijai", "fastvideo"])
def test_other_packagers_names(tmp_path: Path, state: dict[str, Tensor], rules: tuple) -> None:
    foreign = {}
    for name, tensor in state.items():
        for source, slot in sources(name, rules):
            rows = tensor.shape[0] // slot.parts
            foreign[source] = tensor[slot.part * rows : (slot.part + 1) * rows]
    path = write(tmp_path / "a.gguf", flat_patch(foreign), matrices("Q8_0"))
    loaded = open_checkpoint(path).load_dit(dtype=torch.float32).state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in flat_patch(state).items():
        kind = type_of(matrices("Q8_0")(name, tensor))
        rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))
        assert loaded[name].equal(rounded.view(state[name].shape)), name


def test_parts_and_inspection(tmp_path: Path, tiny_checkpoint: Path, state: dict[str, Tensor]) -> None:
    path = write(tmp_path / "a.gguf", flat_patch(state), matrices("Q8_0"))
    checkpoint = open_checkpoint(path, vae=tiny_checkpoint / "vae")
    assert checkpoint.missing == ("text_encoder", "tokenizer")
    assert set(checkpoint.part_fingerprints()) == {"vae", "settings"}
    found = inspect_checkpoint(path)
    (part,) = found.parts
    assert found.kind == "single file" and found.config == checkpoint.dit_config
    assert part.parameters == sum(tensor.numel() for tensor in state.values())
    assert set(part.dtypes) == {"Q8_0", "F32"} and part.file_bytes == path.stat().st_size
    assert 0 < path.stat().st_size - part.stored_bytes < 60_000  # names and padding


def test_a_gguf_file_in_an_official_folder(tmp_path: Path, tiny_checkpoint: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "config.json").write_bytes((tiny_checkpoint / "dit" / "config.json").read_bytes())
    write(tmp_path / "dit" / "longcat-Q8_0.gguf", flat_patch(state), matrices("Q8_0"))
    assert open_checkpoint(tmp_path).dit_config == open_checkpoint(tiny_checkpoint).dit_config
    assert open_checkpoint(tmp_path / "dit").load_dit().dtype == torch.bfloat16


# the text encoder


def text_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the package's own table, the one that llama.cpp's converter uses."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    named = {table.get_name(name, (".weight",)): tensor for name, tensor in state.items()}
    assert len(named) == len(state) and None not in named
    return named  # type: ignore[return-value]


def test_text_encoder_under_the_names_of_llama_cpp(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config, tensors = open_text_encoder(tiny_checkpoint / "text_encoder")
    model = build_text_model(config, device="cpu", dtype=torch.float32)
    state = {name: tensors.read(name, dtype=torch.float32) for name in tensors.keys()}  # noqa: SIM118
    model.load_state_dict(state)
    path = write(tmp_path / "umt5.gguf", text_names(state), architecture="t5encoder", words=["a"] * 300)
    assert "enc.blk.0.attn_rel_b.weight" in TensorSource.open(path)
    checkpoint = open_checkpoint(tiny_checkpoint, text_encoder=path)
    encoder, original = checkpoint.load_text_encoder(), open_checkpoint(tiny_checkpoint).load_text_encoder()
    assert encoder.encode("a red ball").states.equal(original.encode("a red ball").states)
    assert inspect_checkpoint(path).kind == "text encoder"


def test_other_models_are_named(tmp_path: Path) -> None:
    llama = write(tmp_path / "llama.gguf", {"blk.0.attn_q.weight": torch.ones(2, 2)}, architecture="llama")
    with pytest.raises(CheckpointError, match="looks like a language model"):
        open_checkpoint(llama)
    wan = write(
        tmp_path / "wan.gguf", {"blocks.0.ffn.0.weight": torch.ones(2, 2), "patch_embedding.weight": torch.ones(2, 2)}
    )
    with pytest.raises(CheckpointError, match="looks like a Wan video model"):
        open_checkpoint(wan)


# damage


def header(version: int = 3, tensors: int = 1, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes = b"w", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


F32, Q8_0, I8 = 0, 8, 24
DAMAGE: dict[str, tuple[bytes, str]] = {
    "magic alone": (b"GGUF", "cut short.*header is whole"),
    "header cut": (header(rest=info())[:-3], "cut short.*header is whole"),
    "no data": (header(rest=info()), "cut short: .* bytes are missing"),
    "no tensors": (header(tensors=0), "without tensors"),
    "version 1": (header(version=1), "GGUF version 1; only"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "long name": (header(rest=struct.pack("<Q", 1 << 60)), "damaged GGUF header.*longer than"),
    "many tensors": (header(tensors=1 << 60, rest=info()), "cut short"),
    "not text": (header(rest=info(name=b"\xff\xfe")), "damaged.*not text"),
    "twice": (header(tensors=2, rest=info() + info()), "damaged.*two tensors are called w"),
    "dimensions": (header(rest=info(dims=(1,) * 9)), "damaged.*9 dimensions"),
    "half a block": (header(rest=info(dims=(48, 2), kind=Q8_0)), "damaged.*rows of 48 do not fill the Q8_0 blocks"),
    "off alignment": (header(rest=info(offset=3)) + bytes(400), "damaged.*off the alignment"),
    "future type": (header(rest=info(kind=999)), "type 999.*pip install -U gguf"),
    "integers": (header(rest=info(kind=I8)), "type I8, which cannot be read"),
    "metadata type": (header(pairs=1, rest=text(b"k") + struct.pack("<I", 77)), "damaged.*unknown type 77"),
    "nested": (header(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "damaged.*unknown type 9"),
    "alignment": (
        header(pairs=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0) + info()),
        "damaged.*alignment 0",
    ),
    "split": (
        header(pairs=1, rest=text(b"split.count") + struct.pack("<IH", 2, 3) + info()),
        "one of 3 parts.*--merge",
    ),
    "other shape": (
        header(pairs=1, rest=text(b"comfy.gguf.orig_shape.w") + struct.pack("<IIQI", 9, 4, 1, 31) + info()),
        "damaged.*original shape",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_say_what_is_wrong(tmp_path: Path, damage: str) -> None:
    content, message = DAMAGE[damage]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.gguf", {"a": torch.ones(40), "b": torch.ones(5, 32)}, few=["x", "y"]).read_bytes()
    path = tmp_path / "cut.gguf"
    for stop in range(4, len(whole), 7):
        path.write_bytes(whole[:stop])
        with pytest.raises(CheckpointError, match="cut short"):
            GGUFFile(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"w": torch.ones(4096)})
    file = GGUFFile(path)
    path.write_bytes(path.read_bytes()[:-8000])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        file.read("w")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.gguf", {"w": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="`pip install gguf`"):
        open_checkpoint(path)


def test_importing_the_reader_does_not_import_the_package() -> None:
    import subprocess

    code = "import sys, lcv_core.weights.checkpoint; sys.exit('gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert ours.MAGIC == b"GGUF"
