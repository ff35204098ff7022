"""The emoji world: an unbounded, keyed corpus of chat documents with rendered emoji. It downloads nothing."""

from omni.data.emoji_world.atlas import Atlas
from omni.data.emoji_world.classes import CLASSES
from omni.data.emoji_world.documents import TASKS, EmojiWorld, prompt_of
from omni.data.emoji_world.font import find_font
from omni.data.emoji_world.objects import ROW_NAMES, SCENE_NAMES
from omni.data.emoji_world.scene import BACKGROUNDS, SIDE, Placement, Scene, random_scene, render
from omni.data.emoji_world.stories import story_scene

__all__ = [
    "BACKGROUNDS",
    "CLASSES",
    "ROW_NAMES",
    "SCENE_NAMES",
    "SIDE",
    "TASKS",
    "Atlas",
    "EmojiWorld",
    "Placement",
    "Scene",
    "find_font",
    "prompt_of",
    "random_scene",
    "render",
    "story_scene",
]
