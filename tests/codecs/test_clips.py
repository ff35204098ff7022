"""Clips through causal video autoencoders: blocks of equal latent frames, the first of one media frame."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import omni
from eval.tasks.pretrained.autoencoders import TINY, random_pixels, write_published
from omni.codecs import AutoencoderCodec, CodecSpec, PixelCodec, PixelConfig, load_codec
from omni.codecs.autoencoders import to_pictures
from omni.codecs.families import FAMILIES
from omni.codecs.networks import decoded_pictures, encoded_latents
from omni.document import Document, Image, Text, Video
from omni.media.preparation import Limits, Preparation, prepare_clip
from omni.sequence.layout import LatentSpan, TokenSpan
from tests.scripted import follow

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")
CLIPS = [  # the others in the slow tests
    name if name in ("Wan 2.1", "CogVideoX") else pytest.param(name, marks=pytest.mark.slow)
    for name, (class_name, _) in TINY.items()
    if FAMILIES[class_name].takes_clips
]


@pytest.fixture(scope="module")
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AutoencoderCodec:
    folder = tmp_path_factory.mktemp("clips")
    write_published(request.param, folder)
    loaded = load_codec(folder)
    assert isinstance(loaded, AutoencoderCodec)
    return loaded


@pytest.mark.parametrize("codec", CLIPS, indirect=True, scope="module")
class TestClips:
    def test_blocks_are_the_latent_frames_of_the_class(self, codec: AutoencoderCodec) -> None:
        """T = 1 + 4 k frames give 1 + k blocks, each (1, h, w, C)."""
        frames = random_pixels(9, 16, 32)
        chunks = codec.encode_video(frames)
        h, w = codec.grid(16, 32)
        assert [tuple(chunk.shape) for chunk in chunks] == [(1, h, w, codec.spec.channels)] * 3
        clip = to_pictures(frames).transpose(0, 1)[None]
        with torch.no_grad():
            raw = encoded_latents(codec.module, clip)
            theirs = decoded_pictures(codec.module, raw)[0].permute(1, 2, 3, 0)
        expected = (raw[0].permute(1, 2, 3, 0) - codec.mean) / codec.deviation
        torch.testing.assert_close(torch.cat(chunks), expected, atol=1e-5, rtol=1e-4)
        pixels = codec.decode_video(chunks)
        assert pixels.shape == frames.shape and pixels.dtype == torch.uint8
        assert (pixels - ((theirs + 1) * 127.5).clamp(0, 255)).abs().max() < 0.51
        assert codec.num_latents(frames.shape) == 3 * h * w

    def test_a_picture_is_a_clip_of_one_frame(self, codec: AutoencoderCodec) -> None:
        frame = random_pixels(1, 16, 32)
        [chunk] = codec.encode_video(frame)
        torch.testing.assert_close(chunk, codec.encode(frame), atol=1e-6, rtol=1e-6)
        assert (codec.decode_video([chunk]).int() - codec.decode(chunk).int()).abs().max() <= 1

    def test_any_number_of_blocks_decodes(self, codec: AutoencoderCodec) -> None:
        chunks = codec.encode_video(random_pixels(13, 16, 16))
        sizes = [codec.decode_video(chunks[:n]).shape[0] for n in range(1, 5)]
        assert sizes == [codec.spec.media_frames(n) for n in range(1, 5)] == [1, 5, 9, 13]

    def test_each_frame_is_decoded_from_its_own_latent(self, codec: AutoencoderCodec) -> None:
        """Two blocks: the class computes five frames of them, or the first five of three where it takes odd numbers."""
        latents = torch.cat(codec.encode_video(random_pixels(5, 16, 16, seed=3)))
        given = torch.cat([latents, latents[1:]]) if "CogVideoX" in codec.configuration.class_name else latents
        with torch.no_grad():
            theirs = decoded_pictures(codec.module, codec.denormalised(given[None]))[0].permute(1, 2, 3, 0)
        assert len(theirs) == 1 + 4 * (len(given) - 1)
        pixels = codec.decode_video(list(latents.split(1)))
        assert (pixels - ((theirs[:5] + 1) * 127.5).clamp(0, 255)).abs().max() < 0.51

    def test_the_latents_of_a_prefix_are_the_first_latents_where_that_is_claimed(self, codec: AutoencoderCodec) -> None:
        frames = random_pixels(13, 16, 16, seed=2)
        whole = torch.cat(codec.encode_video(frames))
        prefixes = [torch.cat(codec.encode_video(frames[:n])) for n in (1, 5, 9)]
        differences = [float((part - whole[: len(part)]).abs().max()) for part in prefixes]
        if codec.configuration.class_name in ("AutoencoderKLWan", "AutoencoderKLQwenImage"):
            assert codec.spec.causal and differences == [0.0] * 3
        elif codec.spec.causal:
            assert max(differences) < 1e-5
        else:
            assert max(differences) > 0.01  # group norms over time: no claim

    def test_clips_of_other_lengths_raise(self, codec: AutoencoderCodec) -> None:
        with pytest.raises(ValueError, match="4 frames does not fill chunks of 4 frames, the first of 1; cut it"):
            codec.encode_video(random_pixels(4, 16, 16))


@pytest.mark.parametrize("codec", ["Wan 2.1"], indirect=True)
def test_blocks_of_several_latent_frames_and_packed_positions(codec: AutoencoderCodec, tmp_path: Path) -> None:
    """Two latent frames a block: 5 frames, then 8 more for each; positions of 2 x 2 latents."""
    codec.save(tmp_path / "plain")
    other = load_codec(tmp_path / "plain", frames_per_chunk=2, patch=2)
    frames = random_pixels(13, 16, 16)
    chunks, plain = other.encode_video(frames), torch.cat(codec.encode_video(frames))
    assert [tuple(chunk.shape) for chunk in chunks] == [(2, 2, 2, 16)] * 2
    assert other.spec.media_frames(2) == 13 and other.spec.missing_frames == 3
    assert torch.equal(torch.cat(chunks)[3, 1, 0, 4:8], plain[3, 2, 1])
    assert torch.equal(other.decode_video(chunks), codec.decode_video(list(plain.split(1))))
    with pytest.raises(ValueError, match="9 frames does not fill chunks of 8 frames, the first of 5"):
        other.encode_video(frames[:9])
    other.save(tmp_path / "packed")
    assert load_codec(tmp_path / "packed").spec == other.spec


@pytest.mark.parametrize("codec", ["Wan 2.1"], indirect=True)
def test_a_clip_is_sampled_and_tiled_as_its_first_picture_is(codec: AutoencoderCodec, tmp_path: Path) -> None:
    codec.save(tmp_path / "plain")
    frames = random_pixels(5, 16, 128)
    exact = torch.cat(codec.encode_video(frames))
    tiled = load_codec(tmp_path / "plain", tile=32, overlap=40)
    assert (torch.cat(tiled.encode_video(frames)) - exact).abs().max() < 1e-3
    assert (tiled.decode_video([exact]).int() - codec.decode_video([exact]).int()).abs().max() <= 1
    sampled = load_codec(tmp_path / "plain", posterior="sample")
    one, again = (torch.cat(sampled.encode_video(frames)) for _ in range(2))
    assert torch.equal(one, again) and 0.01 < (one - exact).abs().mean() < 100


def test_a_codec_frame_by_frame_has_no_shorter_first_chunk() -> None:
    spec = PixelCodec(PixelConfig(patch=4, frames_per_chunk=2)).spec
    assert spec.media_frames(3) == 6 and spec.missing_frames == 0
    video = CodecSpec(name="v", channels=1, stride=(4, 8, 8), frames_per_chunk=3, single_first_frame=True)
    assert [video.media_frames(n) for n in (1, 2)] == [9, 21] and video.media_frames_per_chunk == 12


@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        (1, {}, 1),
        (2, {}, 5),
        (5, {}, 5),
        (6, {}, 9),
        (6, {"tail": "cut"}, 5),
        (8, {"tail": "cut"}, 5),
        (4, {"tail": "cut"}, 1),
        (40, {"max_frames": 16}, 13),
        (40, {"max_frames": 17}, 17),
        (40, {"max_frames": 1}, 1),
    ],
)
def test_preparation_makes_clips_of_one_and_fours(given: int, options: dict, expected: int) -> None:
    frames = random_pixels(given, 16, 16)
    prepared, _ = prepare_clip(frames, 8.0, Preparation(**options), Limits((8, 8), 4, 8, 8, missing=3))
    assert len(prepared) == expected and torch.equal(prepared[:given], frames[:expected])
    assert (prepared[given:] == frames[-1]).all()
    again, _ = prepare_clip(prepared, 8.0, Preparation(**options), Limits((8, 8), 4, 8, 8, missing=3))
    assert again is prepared


def test_too_long_clips_name_the_length_that_fits() -> None:
    with pytest.raises(ValueError, match="30 frames makes 9 chunks of 4 frames.*cut it to 29 frames"):
        prepare_clip(random_pixels(30, 16, 16), 8.0, Preparation(), Limits((8, 8), 4, 8, 8, missing=3))


def model_with(codec: AutoencoderCodec, directory: Path) -> omni.Omni:
    from omni.heads import FlowHeadConfig
    from omni.model import Omni, OmniConfig
    from omni.nn.transformer import TransformerConfig
    from omni.text.bpe import BPETokenizer

    tokenizer = BPETokenizer.train([], 256)
    transformer = TransformerConfig(width=32, depth=1, num_heads=2, num_kv_heads=2, head_dim=16)
    flow = FlowHeadConfig(channels=codec.spec.channels, num_frequencies=4)
    model = Omni(OmniConfig(transformer=transformer, flow=flow, vocab_size=tokenizer.vocab_size))
    model.tokenizer, model.codec = tokenizer, codec
    model.save_pretrained(directory)
    return omni.from_pretrained(directory)


@pytest.mark.parametrize("codec", ["Wan 2.2", pytest.param("Qwen-Image", marks=pytest.mark.slow)], indirect=True)
def test_a_model_with_a_video_codec_reads_pictures_and_clips(codec: AutoencoderCodec, tmp_path: Path) -> None:
    model = model_with(codec, tmp_path / "model")
    assert model.codec is not None and model.codec.spec == codec.spec
    theirs, ours = codec.weights(), model.codec.weights()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    side = 2 * codec.spec.stride[1]
    picture, clip = Image(random_pixels(side, side)), Video(random_pixels(7, side, side), fps=8.0)
    blocks = model.encode_media([picture, clip])
    assert [[tuple(b.shape[:3]) for b in one] for one in blocks] == [[(1, 2, 2)], [(1, 2, 2)] * 3]
    assert torch.equal(blocks[0][0], codec.encode(picture.pixels[None]))
    filled = torch.cat([clip.frames, clip.frames[-1:].expand(2, -1, -1, -1)])
    assert torch.equal(torch.cat(blocks[1]), torch.cat(codec.encode_video(filled)))
    spans = model.spans(Document((Text("see"), picture, clip)))
    assert [span.grid for span in spans if isinstance(span, LatentSpan)] == [(1, 2, 2)] * 4


@pytest.mark.parametrize("codec", ["Wan 2.2"], indirect=True)
def test_the_engine_generates_clips_of_a_video_codec(codec: AutoencoderCodec, tmp_path: Path) -> None:
    """A scripted header of three blocks: nine frames, decoded as one clip."""
    model = model_with(codec, tmp_path / "model")
    side = 2 * codec.spec.stride[1]
    clip = Video(random_pixels(9, side, side), fps=8.0)
    [header] = [span.ids for span in model.spans(Document((clip,)))[:1] if isinstance(span, TokenSpan)]
    engine = omni.Engine(model)
    follow(engine, lambda request: header[header.index(engine.control.video) :])
    reply = engine.generate("move", max_images=1, max_tokens=8, steps=1)
    [made] = [segment for segment in reply.document.segments if isinstance(segment, Video)]
    assert made.frames.shape == clip.frames.shape
