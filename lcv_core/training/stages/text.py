"""The text encoder: a umT5 that learns to say in every token what the whole caption names.

A linear head per attribute reads the states of all tokens, the end token's too, and tells which value the caption
names, or that it names none. So the states that the transformer gets carry the attributes linearly, and paraphrases
agree. The heads are thrown away.

Captions lose words, get words between them that mean nothing here, or consist of such words alone, and are empty at
times, so that whatever a person types has states that the transformer knows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcv_core.config import TextConfig
from lcv_core.text.encoder import build_text_model, load_tokenizer
from lcv_core.text.prompt import Tokenizer, clean_prompt, tokenize
from lcv_core.text.vocabulary import padded_vocab_size, write_tokenizer
from lcv_core.training.data.grammar import ATTRIBUTES, caption, draw_scene, parse
from lcv_core.training.export import write_config, write_weights
from lcv_core.training.randomness import generator
from lcv_core.training.recipe import Recipe
from lcv_core.training.stage import Batch, Place
from lcv_core.training.strict import need, read_section
from lcv_core.weights.init import text_state

UNCLEAR = -1  # the label of an attribute that a damaged caption may or may not name
LONGEST = 64  # tokens of a training caption


@dataclass(frozen=True)
class ModelSection:
    """The encoder's sizes; num_heads * d_kv = d_model, as ComfyUI needs it. The vocabulary is that of the built-in
    tokenizer."""

    d_model: int = 128
    d_kv: int = 32
    d_ff: int = 256
    num_layers: int = 2
    num_heads: int = 4

    @property
    def config(self) -> TextConfig:
        need(
            self.num_heads * self.d_kv == self.d_model,
            f"model.num_heads * model.d_kv must be model.d_model {self.d_model}, got {self.num_heads * self.d_kv}",
        )
        return TextConfig(
            vocab_size=padded_vocab_size(), d_model=self.d_model, d_kv=self.d_kv, d_ff=self.d_ff,
            num_layers=self.num_layers, num_heads=self.num_heads,
        )  # fmt: skip


@dataclass(frozen=True)
class DataSection:
    """Shares of the captions, in [0, 1], that are damaged in a way. One caption may be damaged in several.

    dropped: loses each of its words with a chance of 30%. inserted: gets one to three words that name nothing.
    capitalised: begins with a capital and ends with a full stop. foreign: replaced by words that name nothing.
    empty: replaced by the empty prompt. watched: captions of held-back combinations, undamaged, in each micro-batch;
    their accuracy is logged, they are not learnt from.
    """

    dropped: float = 0.15
    inserted: float = 0.2
    capitalised: float = 0.15
    foreign: float = 0.05
    empty: float = 0.02
    watched: int = 16

    def __post_init__(self) -> None:
        for name in ("dropped", "inserted", "capitalised", "foreign", "empty"):
            need(0 <= getattr(self, name) <= 1, f"data.{name} is a share in [0, 1], got {getattr(self, name):g}")
        need(self.watched >= 0, f"data.watched must not be negative, got {self.watched}")


class AttributeReader(nn.Module):
    """A umT5 encoder with a linear head per attribute on the states of all tokens; a head's last class is "unnamed"."""

    def __init__(self, config: TextConfig, seed: int) -> None:
        super().__init__()
        self.encoder = build_text_model(config, device="cpu", dtype=torch.float32)
        self.encoder.load_state_dict(text_state(config, seed))
        self.encoder.requires_grad_(True)
        self.heads = nn.ModuleDict()
        for name, values in ATTRIBUTES.items():
            self.heads[name] = head = nn.Linear(config.d_model, len(values) + 1)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """ids, mask int64 [B, L] -> logits by attribute, [B, L, values + 1]."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return {name: head(states) for name, head in self.heads.items()}


def labels(text: str, truth: Mapping[str, str]) -> list[int]:
    """Which value of each attribute a text names: its index, their number for none, UNCLEAR for another than in
    `truth`, which damage to the caption can make it look like."""
    named = parse(text)
    found = []
    for name, values in ATTRIBUTES.items():
        if name not in named:
            found.append(len(values))
        else:
            found.append(values.index(named[name]) if named[name] == truth.get(name) else UNCLEAR)
    return found


def reading_loss(logits: Mapping[str, Tensor], mask: Tensor, wanted: Tensor) -> Tensor:
    """The cross-entropy of all heads, mean over attributes, over the captions' tokens and over captions.

    mask [B, L]; wanted int64 [B, attributes], UNCLEAR ones left out.
    """
    total = torch.zeros((), device=mask.device)
    for column, values in enumerate(logits.values()):
        target = wanted[:, column, None].expand(mask.shape)
        each = F.cross_entropy(values.transpose(1, 2), target, ignore_index=UNCLEAR, reduction="none")  # [B, L]
        total = total + ((each * mask).sum(dim=1) / mask.sum(dim=1)).mean()
    return total / len(logits)


@torch.no_grad()
def accuracy(logits: Mapping[str, Tensor], mask: Tensor, wanted: Tensor) -> Tensor:
    """The share of right answers over attributes, tokens and captions; UNCLEAR ones are not asked for."""
    right = asked = torch.zeros((), device=mask.device)
    for column, values in enumerate(logits.values()):
        target = wanted[:, column, None]
        counts = (mask != 0) & (target != UNCLEAR)
        right = right + ((values.argmax(dim=-1) == target) & counts).sum()
        asked = asked + counts.sum()
    return right / asked


class TextStage:
    """The stage of this module."""

    model: AttributeReader

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.data = read_section(DataSection, recipe.data, "data")
        self.config = read_section(ModelSection, recipe.model, "model").config
        need(not recipe.objective, "objective: the text stage has no choice of objective; leave the section out")
        self.tokenizer = _built_in_tokenizer()
        self._foreign = _foreign_words(self.tokenizer)
        self.model = AttributeReader(self.config, recipe.seed)

    def batch(self, place: Place) -> Batch:
        """ids and mask int64 [B, L], labels int64 [B, attributes]; the last `watched` rows are not learnt from."""
        texts, wanted = [], []
        for index in place.indices:
            text, truth = self._caption(place.step, index)
            texts.append(text)
            wanted.append(labels(text, truth))
        data = read_section(DataSection, self.recipe.at(place.step).data, "data")
        for index in range(data.watched):
            draws = generator(self.recipe.seed, "watched", place.step, place.micro, index)
            scene = draw_scene(draws, held_back="only")
            texts.append(caption(scene, draws))
            wanted.append(labels(texts[-1], scene.attributes))
        ids, mask = tokenize(self.tokenizer, [clean_prompt(text) for text in texts], LONGEST)
        longest = int(mask.sum(dim=1).max())
        batch = {"ids": ids[:, :longest], "mask": mask[:, :longest], "labels": torch.tensor(wanted)}
        return batch | {"learnt": len(place.indices), "names": texts[: len(place.indices)]}

    def _caption(self, step: int, index: int) -> tuple[str, dict[str, str]]:
        """A training caption, damaged or not, and what its scene is."""
        draws = generator(self.recipe.seed, "caption", step, index)
        data = read_section(DataSection, self.recipe.at(step).data, "data")
        scene = draw_scene(draws)
        words = caption(scene, draws).split()
        drop, insert, capital, foreign, empty = torch.rand(5, generator=draws).tolist()
        kept = (torch.rand(len(words), generator=draws) >= 0.3).tolist()
        picks = torch.randint(len(self._foreign), (8,), generator=draws).tolist()
        places = torch.rand(8, generator=draws).tolist()
        count = int(places[7] * 3) + 1
        if empty < data.empty:
            return "", scene.attributes
        if foreign < data.foreign:
            words = [self._foreign[i] for i in picks[: 2 * count]]
        if drop < data.dropped:
            words = [word for word, keep in zip(words, kept) if keep]
        if insert < data.inserted:
            for i in range(count):
                words.insert(int(places[i] * (len(words) + 1)), self._foreign[picks[i]])
        text = " ".join(words)
        return (f"{text.capitalize()}." if capital < data.capitalised else text), scene.attributes

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        n, mask, wanted = batch["learnt"], batch["mask"], batch["labels"]
        logits = model(batch["ids"], mask)
        learnt = {name: values[:n] for name, values in logits.items()}
        loss = reading_loss(learnt, mask[:n], wanted[:n])
        metrics = {"accuracy": float(accuracy(learnt, mask[:n], wanted[:n]))}
        if len(mask) > n:
            watched = {name: values[n:] for name, values in logits.items()}
            metrics["held_back_accuracy"] = float(accuracy(watched, mask[n:], wanted[n:]))
        return loss, metrics

    def samples(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def export(self, model: nn.Module, folder: Path) -> None:
        """text_encoder/ and tokenizer/; the heads stay behind."""
        assert isinstance(model, AttributeReader)
        write_config(folder / "text_encoder" / "config.json", self.config.to_dict())
        write_weights(
            folder / "text_encoder" / "model.safetensors", model.encoder.state_dict(), self.recipe.export_precision
        )
        write_tokenizer(folder / "tokenizer")


def _built_in_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder)
        return load_tokenizer(folder)


def _foreign_words(tokenizer: Tokenizer) -> list[str]:
    """Words of the tokenizer's vocabulary that name no attribute, in alphabetical order."""
    vocabulary: Sequence[str] = tokenizer.get_vocab()  # type: ignore[attr-defined]
    words = sorted(piece[1:] for piece in vocabulary if piece[:1] == "▁" and piece[1:].isalpha() and piece.islower())
    return [word for word in words if not parse(word)]
