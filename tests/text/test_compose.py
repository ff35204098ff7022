"""compose: exact ids and flags of every kind of segment; names of control tokens in text stay text."""

from __future__ import annotations

import math

import pytest
import torch

from omni.document import Document, Image, Role, Text, Video
from omni.sequence.layout import LatentSpan, Span, TokenSpan, context_length
from omni.text.compose import compose, prompt_length
from omni.text.tokenizer import Tokenizer

A = Role.ASSISTANT
PIXELS = torch.zeros(16, 32, 3, dtype=torch.uint8)
FRAMES = torch.zeros(6, 16, 16, 3, dtype=torch.uint8)


def encode_media(segments: list[Image | Video]) -> list[list[torch.Tensor]]:
    """8-pixel patches, 2 frames a chunk; each latent holds its position in the block."""
    out: list[list[torch.Tensor]] = []
    for segment in segments:
        t, count = (1, 1) if isinstance(segment, Image) else (2, len(segment.frames) // 2)
        height, width, _ = segment.pixels.shape if isinstance(segment, Image) else segment.frames.shape[1:]
        n = t * (height // 8) * (width // 8)
        out.append([torch.arange(n * 3.0).reshape(t, height // 8, width // 8, 3)] * count)
    return out


def flat(spans: list[Span], tokenizer: Tokenizer) -> list[str]:
    """Names of control ids, text, latent grids; supervised items have a star."""
    names: list[str] = []
    for span in spans:
        if isinstance(span, LatentSpan):
            names.append(f"{span.grid}" + "*" * span.supervise)
            continue
        for token, supervise in zip(span.ids, span.supervise, strict=True):
            is_text = token < tokenizer.num_text
            names.append((tokenizer.decode([token]) if is_text else tokenizer.control.name(token)) + "*" * supervise)
    return names


def test_every_kind_of_segment(tokenizer: Tokenizer) -> None:
    document = Document(
        (
            Text("!", Role.SYSTEM),
            Text("?"),
            Image(PIXELS),
            Text("#", A, True),
            Image(PIXELS, A, True),
            Video(FRAMES, 8.0, A, True),
        )
    )
    expected = ["begin", "system", "!", "end", "user", "?"]
    expected += ["image", "size_2", "size_4", "(1, 2, 4)", "media_end", "end"]
    expected += ["assistant", "#*", "image*", "size_2*", "size_4*", "(1, 2, 4)*", "media_end"]
    expected += ["video*", "size_3*", "size_8*", "size_2*", "size_2*", *["(2, 2, 2)*"] * 3, "media_end", "end*"]
    spans = compose(document, tokenizer, encode_media)
    assert flat(spans, tokenizer) == expected
    latents = next(s for s in spans if isinstance(s, LatentSpan)).latents
    assert latents.shape == (8, 3) and torch.equal(latents.flatten(), torch.arange(24.0))
    kinds = [type(s) for s in spans]
    assert all(not (a is b is TokenSpan) for a, b in zip(kinds, kinds[1:], strict=False))


def test_generation_prompt(tokenizer: Tokenizer) -> None:
    document = Document((Text("?"),))
    spans = compose(document, tokenizer, _no_media, generation_prompt=True)
    assert flat(spans, tokenizer) == ["begin", "user", "?", "end", "assistant"] and len(spans) == 1
    assert flat(compose(Document(()), tokenizer, _no_media), tokenizer) == ["begin"]


def test_unsupervised_assistant(tokenizer: Tokenizer) -> None:
    spans = compose(Document((Text("#", A), Image(PIXELS, A))), tokenizer, encode_media)
    assert not any("*" in name for name in flat(spans, tokenizer))


def test_names_of_control_tokens_stay_text(tokenizer: Tokenizer) -> None:
    text = "<|image|><|im_end|>[INST] end begin size_4 </s>"
    span = compose(Document((Text(text),)), tokenizer, _no_media)[0]
    assert isinstance(span, TokenSpan)
    assert tokenizer.decode(span.ids[2:-1]) == text
    assert sum(token >= tokenizer.num_text for token in span.ids) == 3


def header_of(fps: float, tokenizer: Tokenizer) -> list[str]:
    return flat(compose(Document((Video(FRAMES, fps),)), tokenizer, encode_media), tokenizer)[2:7]


def test_clips_of_different_rates_have_different_ids(tokenizer: Tokenizer) -> None:
    for fps, name in ((8, "size_8"), (24, "size_24"), (23.976, "size_24"), (0.5, "size_1"), (64.49, "size_64")):
        assert header_of(fps, tokenizer) == ["video", "size_3", name, "size_2", "size_2"]


@pytest.mark.parametrize("fps", [0.49, 64.5, 120])
def test_a_rate_without_a_token_raises(tokenizer: Tokenizer, fps: float) -> None:
    with pytest.raises(ValueError, match=f"a clip of {fps:g} frames per second has no rate token .0.5 to 64"):
        header_of(fps, tokenizer)


def test_prompt_length_equals_compose(tokenizer: Tokenizer) -> None:
    """The length equals that of `compose`, for every kind of segment and turn."""

    def latents(segment: Image | Video) -> int:
        return sum(len(block.flatten()) // 3 for block in encode_media([segment])[0])

    parts = (Text("!", Role.SYSTEM), Text("what?"), Image(PIXELS), Text("so", A), Video(FRAMES, 24, A), Text(""))
    for count in range(1, len(parts) + 1):
        document = Document(parts[:count])
        spans = compose(document, tokenizer, encode_media, generation_prompt=True)
        assert prompt_length(document, tokenizer, latents, 1000) == context_length(spans)
        with pytest.raises(ValueError, match=rf"{context_length(spans)} positions.* longest context is 5, "):
            prompt_length(document, tokenizer, latents, 5)


def test_a_hundred_megabytes_raise_before_encoding(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "encode", lambda text: pytest.fail("it was tokenized"))
    fewest = math.ceil(10**8 / tokenizer.longest_id)
    with pytest.raises(ValueError, match=f"at least {fewest + 4:,} positions"):
        prompt_length(Document((Text("x" * 10**8),)), tokenizer, lambda segment: 0, 4096)


@pytest.mark.parametrize("side", [65 * 8, 8 * 200])
def test_sizes_without_a_token_raise(tokenizer: Tokenizer, side: int) -> None:
    wide = torch.zeros(8, side, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"a picture of 1 x {side // 8} latents is too large.*{side // 8}.*resize"):
        compose(Document((Image(wide),)), tokenizer, encode_media)
    long = torch.zeros(side // 4, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"video of {side // 8} chunks"):
        compose(Document((Video(long),)), tokenizer, encode_media)
    limit = torch.zeros(64 * 8, 8, 3, dtype=torch.uint8)
    assert "size_64" in flat(compose(Document((Image(limit),)), tokenizer, encode_media), tokenizer)


def test_wrong_latents_raise(tokenizer: Tokenizer) -> None:
    document = Document((Image(PIXELS),))
    for wrong in ([], [[]], [[torch.zeros(2, 2, 4, 3)]], [[torch.zeros(1, 2, 4, 3)] * 2], [[torch.zeros(8, 3)]]):
        with pytest.raises(ValueError, match="encode_media gave"):
            compose(document, tokenizer, lambda _, wrong=wrong: wrong)


def _no_media(segments: list[Image | Video]) -> list[list[torch.Tensor]]:
    raise AssertionError("there is no media to encode")
