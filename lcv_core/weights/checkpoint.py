"""A LongCat-Video checkpoint on disk: found, checked, loaded. The only way weights get into our models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcv_core.config import DiTConfig, Native, TextConfig, VAEConfig, read_json
from lcv_core.errors import CheckpointError, InputError
from lcv_core.miniature import find_model
from lcv_core.names import Streaming, Weights
from lcv_core.weights.assemble import Assembly, assemble, load_strictly
from lcv_core.weights.gguf import T5_ENCODER, restore_patch
from lcv_core.weights.infer import check_dit_config, infer_dit_config, infer_text_config, infer_vae_config
from lcv_core.weights.keymaps import DIT_DIALECTS, WAN_UMT5, WAN_VAE
from lcv_core.weights.recognise import TITLES, dit_dialect, kind_of, title
from lcv_core.weights.tensors import StateDict, TensorSource, TensorStore

if TYPE_CHECKING:
    from lcv_core.dit.model import LongCatDiT
    from lcv_core.text.cache import CachedEncoder
    from lcv_core.text.encoder import TextEncoder
    from lcv_core.vae.model import WanVAE

Device = torch.device | str
PARTS = ("dit", "vae", "text_encoder", "tokenizer")
FLOW_SHIFT = 12.0
_DIT_FOLDERS = ("dit", "transformer")  # official, FastVideo
_TEXT_DIALECTS = {"token_embedding.weight": WAN_UMT5, "token_embd.weight": T5_ENCODER}
# Parts of file names, official and Kijai's.
ADAPTER_NAMES = {
    "distill": ("cfg_step_lora", "longcat_distill_lora"),
    "refinement": ("refinement_lora",),
}


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a checkpoint and how to load them; made by `open_checkpoint`.

    path: what was opened. dit, vae, text_encoder: a folder or a file each, None when absent; tokenizer: a folder.
    adapters: "distill" and "refinement", those that are there. native: the job the model was made for.
    missing: the names of the absent parts.
    """

    path: Path
    dit: Path | None
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    adapters: dict[str, Path] = field(default_factory=dict)
    flow_shift: float = FLOW_SHIFT
    native: Native = field(default_factory=Native)

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in PARTS if getattr(self, name) is None)

    @cached_property
    def dit_tensors(self) -> Assembly:
        """The transformer's tensors under the official names; headers only."""
        return open_dit(self.require("dit"))

    @cached_property
    def dit_config(self) -> DiTConfig:
        """From config.json where there is one (checked against the tensors), else read off the shapes."""
        path, tensors = self.require("dit"), self.dit_tensors
        config_path = (path if path.is_dir() else path.parent) / "config.json"
        if path.is_dir() and not config_path.is_file():
            # The released config sets two keys that no shape tells, so a folder has to have it.
            raise CheckpointError(f"{config_path} is missing; download it with the weights")
        data = read_json(config_path) if config_path.is_file() else {}
        if path.is_file() and not str(data.get("_class_name", "")).startswith("LongCat"):
            return infer_dit_config(tensors, str(path))
        config = DiTConfig.from_dict(_official_config(data))
        check_dit_config(config, tensors, config_path)
        return config

    def require(self, part: str) -> Path:
        """The path of a part; CheckpointError that says how to give it when it is absent."""
        path: Path | None = getattr(self, part)
        if path is None:
            how = "" if part == "dit" else f", or name one with {part}="
            raise CheckpointError(f"{self.path} has no {part}; download the {part} folder of the checkpoint{how}")
        return path

    def load_dit(
        self,
        *,
        device: Device = "cpu",
        dtype: torch.dtype | None = None,
        operations: Any = None,
        weights: Weights = "plain",
        streaming: Streaming = "off",
        slots: int = 2,
        resident: int = 0,
    ) -> LongCatDiT:
        """The transformer in eval mode, in `dtype` or as stored (quantised weights, GGUF's too, as bf16).

        operations: layer namespace for the model (see LongCatDiT); only for plain weights. weights: how the large
        matrices are kept, see `lcv_core.weights.quantised`; what stays plain is in `dtype`. streaming, slots, resident:
        where the blocks are kept, see `lcv_core.weights.streamed`.
        Raises CheckpointError on any mismatch.
        """
        from lcv_core.weights.streamed import Streamed, load_streamed

        if streaming != "off":
            how = Streamed(streaming, slots, resident)
            return load_streamed(
                self._load_dit, self.dit_tensors, how, weights, str(self.dit), device, dtype, operations
            )
        return self._load_dit(device, dtype, operations, weights)

    def _load_dit(
        self, device: Device, dtype: torch.dtype | None, operations: Any, weights: Weights,
        hold_on: Device | None = None,
    ) -> LongCatDiT:  # fmt: skip
        """hold_on: see `load_quantised`."""
        from lcv_core.dit.model import LongCatDiT
        from lcv_core.weights.quantised import load_quantised

        what = str(self.dit)
        if weights != "plain":
            if operations is not None:
                raise InputError(f"weights={weights} comes with layers of its own; leave out operations")
            return load_quantised(
                self.dit_config, self.dit_tensors, weights, what=what, device=device, dtype=dtype, hold_on=hold_on
            )
        model = LongCatDiT(self.dit_config, operations=operations, device="meta", dtype=dtype)
        hold_on = device if hold_on is None else hold_on
        load_strictly(model, self.dit_tensors, what=what, device=hold_on, dtype=dtype)
        return model.eval()

    def load_vae(self, *, device: Device = "cpu", dtype: torch.dtype | None = None, operations: Any = None) -> WanVAE:
        """The VAE in eval mode, in `dtype` or as stored; diffusers or original names, safetensors or Wan's .pth."""
        from lcv_core.vae.layers import channels_last_
        from lcv_core.vae.model import WanVAE

        path = self.require("vae")
        config, tensors = open_vae(path)
        model = WanVAE(config, operations=operations, device="meta", dtype=dtype)
        load_strictly(model, tensors, what=str(path), device=device, dtype=dtype)
        channels_last_(model)
        return model.eval()

    def load_text_encoder(self, *, device: Device = "cpu", dtype: torch.dtype | None = None) -> TextEncoder:
        """umT5 and its tokenizer, in `dtype` or as stored (quantised weights as bf16)."""
        from lcv_core.text.encoder import TextEncoder, build_text_model, load_tokenizer

        path = self.require("text_encoder")
        tokenizer = load_tokenizer(self.require("tokenizer"))
        config, tensors = open_text_encoder(path)
        dtype = dtype or tensors.dtype("shared.weight")
        model = build_text_model(config, device="meta", dtype=dtype)
        load_strictly(model, tensors, what=str(path), device=device, dtype=dtype)
        return TextEncoder(model, tokenizer)

    def cached_text_encoder(
        self, *, device: Device = "cpu", dtype: torch.dtype | None = None, cache: str | Path | None = None
    ) -> CachedEncoder:
        """What encodes prompts like `load_text_encoder`, and loads umT5 only while a prompt is new to it.

        cache: a folder that keeps states from run to run; None: in memory. Reads no weights.
        """
        from lcv_core.text.cache import CachedEncoder, TextCache

        path, tokenizer = self.require("text_encoder"), self.require("tokenizer")
        _, tensors = open_text_encoder(path)
        parts = (
            _fingerprint(path), _tokenizer_fingerprint(tokenizer, "tokenizer_config.json"),
            str(dtype or tensors.dtype("shared.weight")), torch.device(device).type,
        )  # fmt: skip

        def load() -> TextEncoder:
            return self.load_text_encoder(device=device, dtype=dtype)

        return CachedEncoder(load, TextCache(" ".join(parts), cache))

    def fingerprint(self) -> str:
        """16 hex digits that tell one set of transformer weights from another.

        SHA-256 over the size, the header and 64 samples of 64 bytes of each file, so it is cheap at 54 GB; file and
        folder names do not count. It identifies, it does not prove integrity.
        """
        return _fingerprint(self.require("dit"))

    def part_fingerprints(self, adapters: Iterable[str] = ()) -> dict[str, str]:
        """The same for whatever else decides what is computed: the other parts that are there, the named adapters, and
        the settings (configs, flow shift, native job) as "settings"."""
        prints: dict[str, str] = {}
        configs: dict[str, Any] = {}
        for name in ("dit", "vae", "text_encoder"):
            path: Path | None = getattr(self, name)
            if path is None:
                continue
            if name != "dit":
                prints[name] = _fingerprint(path)
            if (path / "config.json").is_file():
                configs[name] = read_json(path / "config.json")
        if self.tokenizer is not None:
            prints["tokenizer"] = _tokenizer_fingerprint(self.tokenizer)
        prints |= {name: _fingerprint(self.adapters[name]) for name in adapters if name in self.adapters}
        settings = {"configs": configs, "flow_shift": self.flow_shift, "native": dataclasses.asdict(self.native)}
        prints["settings"] = _short_hash(json.dumps(settings, sort_keys=True).encode())
        return prints


def open_checkpoint(
    path: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Checkpoint:
    """Find the parts of a checkpoint and check the transformer's headers and config; no weights are read.

    path: an official folder, its `dit` subfolder, or a single transformer file (official, Kijai or FastVideo names),
        safetensors or GGUF; "mini" is the miniature that comes with the package.
    vae, text_encoder, tokenizer: parts that are elsewhere; they win over those found. A tokenizer may be the folder,
        or one of the files in it.
    Raises CheckpointError when nothing usable is there, or the transformer is another model's.
    """
    path = find_model(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    root, dit = locate(path)
    given = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    parts = {name: _given(name, value) if value is not None else _find(root, name) for name, value in given.items()}
    if dit is None and not any(parts.values()):
        raise CheckpointError(
            f"{path} is not a LongCat-Video checkpoint: expected dit/, vae/, text_encoder/ and tokenizer/ in it"
        )
    index = read_json(root / "model_index.json") if root and (root / "model_index.json").is_file() else {}
    native = index.get("native")
    checkpoint = Checkpoint(
        path=path,
        dit=dit,
        **parts,
        adapters=_find_adapters(root or path.parent),
        flow_shift=_flow_shift(root),
        native=Native.from_dict(native) if isinstance(native, dict) else Native(),
    )
    if dit is not None:
        _ = checkpoint.dit_config  # the wrong model is refused now, not after minutes of loading
    return checkpoint


def locate(path: Path) -> tuple[Path | None, Path | None]:
    """(folder of all parts or None, transformer or None) of an existing path; looks at names only."""
    if path.is_file():
        return None, path
    for name in _DIT_FOLDERS:
        if (path / name).is_dir():
            return path, path / name
    if path.name in _DIT_FOLDERS or any(path.glob("*.safetensors")):
        return (path.parent if path.name in _DIT_FOLDERS else path), path
    return path, None


def _find(root: Path | None, part: str) -> Path | None:
    return root / part if root is not None and (root / part).is_dir() else None


def _given(part: str, value: str | Path) -> Path:
    path = Path(value)
    if not path.exists():
        raise CheckpointError(f"{part}: {path} does not exist")
    return path.parent if part == "tokenizer" and path.is_file() else path


def _find_adapters(root: Path) -> dict[str, Path]:
    """By file name, official and Kijai's, in the checkpoint's lora folder or beside it."""
    files = [file for folder in (root / "lora", root / "loras", root) for file in sorted(folder.glob("*.safetensors"))]
    found = {}
    for name, marks in ADAPTER_NAMES.items():
        match = next((f for f in files if any(mark in f.name.lower() for mark in marks)), None)
        if match is not None:
            found[name] = match
    return found


def _flow_shift(root: Path | None) -> float:
    path = root / "scheduler" / "scheduler_config.json" if root else None
    return float(read_json(path).get("shift", FLOW_SHIFT)) if path and path.is_file() else FLOW_SHIFT


def _official_config(data: dict[str, Any]) -> dict[str, Any]:
    """FastVideo renames the class and num_heads."""
    if data.get("_class_name") == "LongCatTransformer3DModel" and "num_heads" not in data:
        return data | {"num_heads": data.get("num_attention_heads")}
    return data


def open_dit(path: Path) -> Assembly:
    """A transformer under official names, from any dialect; CheckpointError saying what else it is."""
    source = TensorSource.open(path)
    names = list(source)
    kind = kind_of(names)
    dialect = dit_dialect(names)
    if kind == "avatar":
        raise CheckpointError(f"{path} is {TITLES['avatar']}")
    if dialect is None:
        raise CheckpointError(f"{path} is not a LongCat-Video transformer: it looks like {title(names)}")
    name, prefix = dialect
    mark, rules = DIT_DIALECTS[name]
    restore_patch(source, f"{prefix}{mark}")
    return assemble(source, rules, prefix=prefix, what=str(path))


def open_vae(path: Path) -> tuple[VAEConfig, Assembly]:
    """A Wan 2.1 VAE folder or file -> its config and its tensors under diffusers names."""
    store = _open_pth(path) if path.suffix == ".pth" else TensorSource.open(path)
    names = list(store.keys())
    if kind_of(names) != "vae":
        raise CheckpointError(f"{path} is not a Wan 2.1 VAE: it looks like {title(names)}")
    original = "decoder.middle.0.residual.0.gamma" in names
    tensors = assemble(store, WAN_VAE if original else None, what=str(path))
    config_path = path / "config.json"
    stated = VAEConfig.from_json(config_path) if config_path.is_file() else None
    return infer_vae_config(tensors, str(path), stated), tensors


def _open_pth(path: Path) -> TensorStore:
    """Wan's own VAE file. weights_only refuses everything but tensors, so nothing in it is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except Exception as error:  # the unpickler raises many kinds, all of which mean the same here
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"{path} cannot be read safely as plain weights ({reason}); use the VAE's .safetensors file"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a plain state dict; use the VAE's .safetensors file")
    return StateDict(state)


def open_text_encoder(path: Path) -> tuple[TextConfig, Assembly]:
    """A umT5 folder or file -> its config and its tensors under transformers names."""
    source = TensorSource.open(path)
    if kind_of(source) != "text_encoder":
        raise CheckpointError(f"{path} is not the umT5 text encoder: it looks like {title(source)}")
    rules = next((rules for mark, rules in _TEXT_DIALECTS.items() if mark in source), None)
    tensors = assemble(source, rules, what=str(path))
    # The input embedding is stored twice in some files, once in others and under either name.
    tied = tensors.pieces.pop("encoder.embed_tokens.weight", None)
    if tied is not None:
        tensors.pieces.setdefault("shared.weight", tied)
    config_path = path / "config.json"
    config = TextConfig.from_json(config_path) if config_path.is_file() else infer_text_config(tensors, str(path))
    return config, tensors


def _fingerprint(path: Path) -> str:
    """See `Checkpoint.fingerprint`; of a file or folder of weights."""
    if path.suffix == ".pth":
        return _short_hash(_sample(path, path.stat().st_size, b""))
    files = TensorSource.open(path).files
    return _short_hash(*sorted(_sample(file.path, file.size, file.header) for file in files))


def _tokenizer_fingerprint(folder: Path, *more: str) -> str:
    files = [folder / name for name in ("tokenizer.json", "spiece.model", *more)]
    return _short_hash(*(file.read_bytes() for file in files if file.is_file()))


def _short_hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _sample(path: Path, size: int, header: bytes, samples: int = 64, width: int = 64) -> bytes:
    digest = hashlib.sha256(size.to_bytes(8, "little") + header)
    start = 8 + len(header)
    with path.open("rb") as file:
        for i in range(samples):
            file.seek(start + (size - start) * i // samples)
            digest.update(file.read(width))
    return digest.digest()
