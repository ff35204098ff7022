"""Names in scenes of several objects, names in rows of three, and bases of skin tones. Data only.

Samples are by index: any change of a list changes the corpus.
"""

from __future__ import annotations


def listed(text: str) -> tuple[str, ...]:
    """The names in a text that separates them by bars or line breaks."""
    return tuple(name.strip() for name in text.replace("\n", "|").split("|") if name.strip())


SCENE_NAMES = listed(
    """
    cat|dog|cow|pig|rabbit|tiger|horse|ewe|elephant|mouse|bear|panda|koala|fox|lion|frog|monkey|zebra|giraffe|kangaroo
    penguin|owl|duck|eagle|rooster|flamingo|parrot|goose|turtle|snake|crocodile|whale|dolphin|octopus|crab|tropical fish
    shark|snail|butterfly|honeybee|lady beetle|ant|spider|red apple|green apple|banana|pear|lemon|watermelon|grapes
    strawberry|cherries|peach|pineapple|mango|kiwi fruit|tomato|carrot|ear of corn|broccoli|eggplant|avocado|mushroom
    bread|cheese wedge|hamburger|pizza|hot dog|taco|egg|cookie|doughnut|birthday cake|ice cream|hot beverage|beer mug
    teapot|automobile|bus|taxi|fire engine|tractor|bicycle|motorcycle|airplane|helicopter|rocket|sailboat|locomotive
    ambulance|delivery truck|soccer ball|basketball|tennis|baseball|trophy|guitar|violin|trumpet|drum|saxophone
    house|castle|tent|rose|tulip|sunflower|cactus|palm tree|evergreen tree|sun|cloud|star|rainbow|snowman|fire|red heart
    blue heart|green heart|key|hammer|scissors|umbrella|balloon|wrapped gift|blue book|pencil|camera|mantelpiece clock
    crown|top hat|t-shirt|running shoe|glasses|robot|ghost|alien|skull|bell|light bulb|candle|chair|bed|telephone
    television|gem stone
    """
)

ROW_NAMES = listed(
    """
    cat|dog|pig|lion|frog|monkey|panda|penguin|owl|turtle|octopus|crab|butterfly|lady beetle|red apple|banana
    lemon|watermelon|grapes|strawberry|pineapple|carrot|tomato|pizza|doughnut|automobile|bus|rocket|sailboat
    soccer ball|basketball|guitar|house|rose|sunflower|cactus|star|red heart|balloon|crown
    """
)

# People and hands that take a skin tone. `vocabulary.py` stores their characters.
TONE_BASES = listed(
    """
    waving hand|raised hand|vulcan salute|ok hand|victory hand|crossed fingers|love-you gesture
    sign of the horns|call me hand|backhand index pointing left|backhand index pointing right
    backhand index pointing up|thumbs up|thumbs down|raised fist|oncoming fist|clapping hands|raising hands
    open hands|folded hands|nail polish|flexed biceps|ear|nose|leg|foot|baby|child|boy|girl|man|woman|old man
    old woman|police officer|princess|santa claus|man dancing|woman dancing|person running|person surfing
    person swimming|mermaid
    """
)
