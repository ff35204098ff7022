"""Joint-token heads on real text, byte by byte: one backbone trained once, then every head on the frozen backbone.

Bytes need no tokenizer and suit heads whose tables grow with the vocabulary; a block of K bytes is a word or two.
Documents are windows of T bytes of a training text; measurements are on another text.

Legend: R batch rows, T bytes of a window, N blocks of a row, B = R N blocks, K bytes of a block, V = 256 and BOS.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from eval.experiments.joint.decode import Pace, Rounds, decode_plain, decode_rounds
from eval.experiments.joint.training import Budget, beside, head_of, optimise, toy_batch, toy_call, toy_model
from omni.config import Frozen
from omni.heads.joint import JointConfig, JointHead, build_head
from omni.heads.joint.training import BatchCall, joint_loss, teacher_log_probs
from omni.model import Omni
from omni.rng import Key
from omni.sequence.layout import Batch
from omni.sequence.placeholders import Blocks, choose_blocks

BYTES = 256
CHUNK = 64  # batch rows when measuring


class TextLine(Frozen):
    """One head of the comparison. log_q_options: options under which the same weights sample with known probabilities,
    for the verifications that need them; None: `options`. passes: numbers of passes, besides one, for unverified
    blocks."""

    head: str
    options: dict[str, Any] = Field(default_factory=dict)
    log_q_options: dict[str, Any] | None = None
    passes: tuple[int, ...] = ()


class TextOptions(Frozen):
    """Options of the model, of training (`blocks` of a window at once) and of measuring: `contexts` of half a window
    are continued by `num_tokens`; `scored` windows give likelihoods. length: K."""

    length: int = Field(default=8, ge=2, le=64)
    width: int = Field(default=128, ge=8, multiple_of=4)
    depth: int = Field(default=4, ge=1)
    adapter_rank: int = Field(default=32, ge=0)
    window: int = Field(default=128, ge=8)
    rows: int = Field(default=16, ge=1)
    blocks: int = Field(default=12, ge=1)
    backbone_steps: int = Field(default=800, ge=1)
    head_steps: int = Field(default=400, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    contexts: int = Field(default=64, ge=1)
    num_tokens: int = Field(default=96, ge=1)
    scored: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)

    @property
    def budget(self) -> Budget:
        """Steps, rows and rate as `optimise` takes them."""
        return Budget(self.backbone_steps, self.head_steps, self.rows, self.rate)


@dataclass(frozen=True)
class Text:
    """Two texts without common lines, as bytes (n,) uint8."""

    train: Tensor
    test: Tensor

    @staticmethod
    def of(train: str, test: str) -> Text:
        """Two texts as bytes."""
        return Text(*(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for text in (train, test)))

    @staticmethod
    def read(train: str | Path, test: str | Path) -> Text:
        """Raises ValueError naming a file that does not exist or is not UTF-8."""
        found = []
        for path in (train, test):
            try:
                found.append(Path(path).read_text("utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"cannot read {path} as UTF-8 text: {error}; give the path of a text file") from None
        return Text.of(*found)


def windows(text: Tensor, num: int, length: int, key: Key) -> Tensor:
    """(num, length) int64: pieces of a text at any start. ValueError where the text is shorter than a piece."""
    if len(text) <= length:
        raise ValueError(f"a text of {len(text)} bytes has no windows of {length}; give more text or a shorter window")
    at = (key.uniform((num,), torch.float64) * (len(text) - length)).long()
    return text[at[:, None] + torch.arange(length)].long()


# ---- training ------------------------------------------------------------------------------------------------------


def train_backbone(text: Text, run: TextOptions, key: Key) -> Omni:
    """A small Omni trained on next bytes. Depends on the arguments alone."""
    model = toy_model(None, BYTES, key.fold("model"), run.width, run.depth)

    def loss(step: int, progress: float) -> dict[str, Tensor]:
        batch = _batch(windows(text.train, run.rows, run.window, key.fold("backbone", step)))
        hidden, _ = model.context(batch)
        logits = model.token.read(hidden[:, :-1])
        return {"next_token": torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.target[:, :-1].flatten())}

    parameters = [p for name, p in model.named_parameters() if not name.startswith("flow.")]
    optimise(parameters, run.backbone_steps, run.budget, loss)
    return model.eval()


def train_head(backbone: Omni, line: TextLine, text: Text, run: TextOptions, key: Key) -> Omni:
    """A model with the backbone's weights and a trained head. Depends on the arguments alone."""
    config = JointConfig(head=line.head, length=run.length, adapter_rank=run.adapter_rank, options=line.options)
    model = beside(backbone, config, key.fold("model"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("joint."))

    def loss(step: int, progress: float) -> dict[str, Tensor]:
        batch = _batch(windows(text.train, run.rows, run.window, key.fold("head", step)))
        with torch.no_grad():
            hidden, memory = model.context(batch)
        terms = joint_loss(model, batch, hidden, memory, run.blocks, key.fold("noise", step), progress)
        return {name: term.weight * term.sum / max(term.count, 1.0) for name, term in terms.items()}

    optimise([p for p in model.parameters() if p.requires_grad], run.head_steps, run.budget, loss)
    return model.eval()


def _batch(windows_RT: Tensor) -> Batch:
    """Windows (R, T) as a batch, every byte supervised."""
    return toy_batch(torch.zeros(len(windows_RT), 0, dtype=torch.int64), windows_RT, BYTES)[0]


# ---- measuring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Nats per byte of whole blocks of held-out text, and of each of their K positions given the ones before it, where
    the head has them. kind: "exact", "bound" (an upper bound), or None without a likelihood."""

    mean: float
    positions: tuple[float, ...] | None
    kind: str | None


@dataclass(frozen=True)
class TextResult:
    """rounds: by verification. free: nats per byte, under the backbone, of unverified blocks by number of passes.
    plain_pace: tokens per second of autoregressive decoding in the same process. seconds: processor time of training.
    """

    scores: Scores
    rounds: Mapping[str, Rounds]
    free: Mapping[int, float]
    plain_pace: float
    seconds: float


@dataclass(frozen=True)
class PlainResult:
    """scores and free: of the backbone, on held-out text and on its own samples."""

    scores: Scores
    pace: Pace
    free: float


def measure_plain(model: Omni, text: Text, run: TextOptions, key: Key) -> PlainResult:
    """The backbone: likelihood, speed, and nats of its own samples."""
    contexts = contexts_of(text, run, key)
    pace = decode_plain(model, contexts, run, key.fold("decode"))
    drawn = pace.ids[:, : run.length]
    return PlainResult(_plain_scores(model, text, run, key), pace, _backbone_nats(model, contexts, drawn))


def train_and_measure(backbone: Omni, line: TextLine, text: Text, run: TextOptions, key: Key) -> TextResult:
    """Train a head and measure it. The contexts and the noise of tokens are the same for every head."""
    start = time.process_time()
    model = train_head(backbone, line, text, run, key.fold("train"))
    seconds = time.process_time() - start
    contexts, noise = contexts_of(text, run, key), key.fold("decode")
    plain_pace = decode_plain(model, contexts, run, noise).tokens_per_second
    rounds = {kind: decode_rounds(model, contexts, kind, run, noise) for kind in ("coupled", "greedy")}
    own = head_of(model)
    if line.log_q_options is not None:
        _set_head(model, _same_weights(own, line.head, line.log_q_options))
    if _has_log_q(model, contexts, key):
        rounds |= {kind: decode_rounds(model, contexts, kind, run, noise) for kind in ("rejection", "block")}
    _set_head(model, own)
    free = {n: free_nats(model, contexts, n, run.length, key.fold("free")) for n in sorted({1, *line.passes})}
    return TextResult(held_out(model, text, run, key), rounds, free, plain_pace, seconds)


def _same_weights(head: JointHead, name: str, options: dict[str, Any]) -> JointHead:
    """A head of the same weights with other options."""
    other = build_head(name, options, head.length, head.vocab_size, head.width)
    other.load_state_dict(head.state_dict())
    return other.eval()


def _set_head(model: Omni, head: JointHead) -> None:
    """Replace the head of a model, in place."""
    assert model.joint is not None
    model.joint.head = head


def contexts_of(text: Text, run: TextOptions, key: Key) -> Tensor:
    """(contexts, T / 2) int64 of the held-out text."""
    return windows(text.test, run.contexts, run.window // 2, key.fold("contexts"))


@torch.inference_mode()
def _has_log_q(model: Omni, contexts: Tensor, key: Key) -> bool:
    """Whether drafts of the head have the probabilities that they were sampled from."""
    call = toy_call(model, contexts[:1], 2)
    return head_of(model).sample(call, torch.full((1, 2), 0.5, dtype=torch.float64), key).log_q is not None


@torch.inference_mode()
def free_nats(model: Omni, contexts: Tensor, passes: int, length: int, key: Key) -> float:
    """Nats per byte, under the backbone, of unverified blocks that the head samples in `passes` passes."""
    found = []
    for at, part in enumerate(contexts.split(CHUNK)):
        own = key.fold("chunk", at)
        noise = own.fold("uniforms").uniform((len(part), length), torch.float64)
        found.append(head_of(model).sample(toy_call(model, part, length), noise, own, passes).ids)
    return _backbone_nats(model, contexts, torch.cat(found))


@torch.inference_mode()
def _backbone_nats(model: Omni, contexts: Tensor, ids: Tensor) -> float:
    """Nats per byte of ids (B, K) after contexts, under the backbone."""
    total = 0.0
    for prefix, block in zip(contexts.split(CHUNK), ids.split(CHUNK), strict=True):
        batch, starts, blocks = toy_batch(prefix, block, BYTES)
        log_probs = teacher_log_probs(model, model.context(batch)[0], starts, blocks)
        total -= float(log_probs.gather(-1, block.unsqueeze(-1)).sum())
    return total / ids.numel()


@torch.inference_mode()
def held_out(model: Omni, text: Text, run: TextOptions, key: Key) -> Scores:
    """The head's likelihood of whole blocks of held-out windows."""
    head = head_of(model)
    total = torch.zeros(run.length, dtype=torch.float64)
    number, value, kind = 0, 0.0, None
    for call, blocks, own in _held_out_blocks(model, text, run, key):
        whole = blocks.valid.all(1)
        number += int(whole.sum())
        if head.conditional:
            total -= _of_ids(head.conditionals(call, blocks.ids), blocks.ids)[whole].sum(0)
        if _has_likelihood(head):
            found = head.log_prob(call, blocks.ids, own)
            value, kind = value - float(found.value[whole].sum()), found.kind
    positions = tuple((total / number).tolist()) if head.conditional else None
    return Scores(value / number / run.length if kind else float("nan"), positions, kind)


@torch.inference_mode()
def _plain_scores(model: Omni, text: Text, run: TextOptions, key: Key) -> Scores:
    """`held_out` of the backbone by autoregressive decoding."""
    total, number = torch.zeros(run.length, dtype=torch.float64), 0
    for call, blocks, _ in _held_out_blocks(model, text, run, key):
        whole = blocks.valid.all(1)
        log_probs = teacher_log_probs(model, call.hidden, call.starts, blocks)
        total -= _of_ids(log_probs, blocks.ids)[whole].sum(0)
        number += int(whole.sum())
    return Scores(float(total.sum()) / number / run.length, tuple((total / number).tolist()), "exact")


def _held_out_blocks(model: Omni, text: Text, run: TextOptions, key: Key) -> Iterator[tuple[BatchCall, Blocks, Key]]:
    """Blocks of held-out windows, the same for every head, and a key for each batch of them."""
    own = key.fold("scored")
    for at, part in enumerate(windows(text.test, run.scored, run.window, own).split(run.rows)):
        batch, chunk = _batch(part), own.fold("chunk", at)
        starts, blocks = choose_blocks(batch, run.length, run.blocks, chunk)
        yield BatchCall(model, starts, *model.context(batch)), blocks, chunk


def _of_ids(log_probs: Tensor, ids: Tensor) -> Tensor:
    """(B, K) float64: entries of log-probabilities (B, K, V) at ids (B, K)."""
    return log_probs.double().gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _has_likelihood(head: JointHead) -> bool:
    """Whether the family overrides `log_prob`."""
    return type(head).log_prob is not JointHead.log_prob
