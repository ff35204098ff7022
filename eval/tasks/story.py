"""Short illustrated stories: text and pictures alternate, and each picture shows its own sentence."""

from __future__ import annotations

from pydantic import Field

from eval.requests import (
    RequestOptions,
    atlas_of,
    expected_scenes,
    judge_of,
    panel,
    picture_list,
    read_pictures,
    replies,
    requests,
    shape_of,
)
from eval.task import Context, Measure, Outcome, percentage, task
from omni.data.emoji_world import Scene, render
from omni.data.emoji_world.stories import story_scene
from omni.generation.events import TextPart


class StoryOptions(RequestOptions):
    """pictures: the requested number of pictures in a story (2-5)."""

    requests: int = 100
    pictures: int = Field(default=3, ge=2, le=5)


@task("story", StoryOptions, rows=("in_place", "sentences", "pictures"))
def story(context: Context, options: StoryOptions) -> Outcome:
    """A story in three pictures: each after its sentence, no more and no fewer; and what they show."""
    documents = requests(
        context, {"story": 1.0}, options.requests, lambda meta: meta["num_pictures"] == options.pictures
    )
    answers, note = replies(context, documents, options, max_images=8)
    judge, atlas = judge_of(context), atlas_of(context)
    form = " ".join(["text image"] * options.pictures)
    in_place = [shape_of(reply) == form and None not in picture_list(reply) for reply in answers]
    sentences: list[bool] = []  # of stories in place: whether it is a sentence of the world, about the requested hero
    pictures: list[bool] = []  # of those: whether the picture shows it
    panels = []
    for document, reply, fine in zip(documents, answers, in_place, strict=True):
        reference = [render(scene, atlas) for scene in expected_scenes(document)]
        note_lines = [f"parts: {shape_of(reply)}"]
        if fine:
            texts = [part.text for part in reply.parts if isinstance(part, TextPart)]
            parsed = [story_scene(document.meta["hero"], text) for text in texts]
            sentences += [scene is not None for scene in parsed]
            scenes = [scene if scene is not None else Scene() for scene in parsed]
            readings = read_pictures(judge, picture_list(reply), scenes)
            for text, scene, reading in zip(texts, parsed, readings, strict=True):
                shown = reading is not None and reading.clear and reading.scene == scene
                pictures.append(shown)
                note_lines.append(f"{'ok' if shown else 'NOT SHOWN'}: {text.strip()}")
        panels.append(panel(document, reply, reference, "\n".join(note_lines), fine))
    measures = [Measure("in_place", percentage(in_place), "%")]
    if sentences:
        measures += [Measure("sentences", percentage(sentences), "%"), Measure("pictures", percentage(pictures), "%")]
    return Outcome(measures, panels, notes=[note, "sentences and pictures: among the stories that are in place"])
