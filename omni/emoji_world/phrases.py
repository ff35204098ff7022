"""What users say, as data: templates by kind. {a} "a red apple", {x} "red apple", {b}/{y} a second one, {c} a colour,
{on} "an orange".

Every list has a multiple of five templates; each fifth one is held out (`is_heldout`): training never uses it.
A phrasing is named "kind/number". The last word of a kind after a dot is a variant of the same request.
"""

from __future__ import annotations

from functools import cache

TEMPLATES: dict[str, tuple[str, ...]] = {
    kind: tuple(t.strip() for t in block.strip().splitlines())
    for kind, block in {
        "draw": """
            draw {a}
            draw me {a}
            please draw {a}
            show me {a}
            please show me {a}
            can you draw {a}?
            could you draw {a}?
            paint {a}
            make a picture of {a}
            could you paint {a}?
            a picture of {a}, please
            i want to see {a}
            i would like a picture of {a}
            give me a picture of {a}
            please give me {a}
            sketch {a}
            create an image of {a}
            generate {a}
            i want {a}
            create a picture of {a}
            can you show me {a}?
            could you make {a} for me?
            let me see {a}
            {a}, please
            i would like to see {a}
            draw a picture of {a}
            an image of {a}
            show a picture of {a}
            i need a drawing of {a}
            can you make a picture of {a}?
            please paint {a} for me
            i want you to draw {a}
            {a}
            make {a}
            please make an image of {a}
            would you draw {a}?
            can you make {a}?
            will you draw {a} for me?
            could you sketch {a}?
            can you sketch {a} for me?
            would you show me {a}?
            could you show {a}?
            can you create {a}?
            would you make me {a}?
            would you sketch {a} for me?
        """,
        "background": """
            {request} on {on} background
            {request} with {on} background
            {request} on {c}
            {request} in front of {on} background
            {request} with {c} behind it
        """,
        "name": """
            what is this?
            what is it?
            what do you see?
            name this
            what is this called?
            what is this emoji?
            name this emoji
            which emoji is this?
            what is in the picture?
            which emoji do you see?
            what is shown here?
            what does this show?
            say what this is
            tell me what this is
            tell me what you see
            what do you call this?
            what is the name of this?
            give me the name of this
            what am i looking at?
            what is the name of this emoji?
            please name this
            can you name this?
            do you know what this is?
            what is on the picture?
            can you tell me what this is?
        """,
        "name.es": """
            ¿qué es esto?
            ¿cómo se llama esto?
            ¿cómo se llama esto en español?
            dime qué es esto en español
            ¿qué es esto en español?
        """,
        "name.fr": """
            qu'est-ce que c'est ?
            comment s'appelle ceci ?
            comment s'appelle ceci en français ?
            c'est quoi, en français ?
            qu'est-ce que c'est en français ?
        """,
        "name.de": """
            was ist das?
            wie heißt das?
            wie heißt das auf deutsch?
            sag mir, was das ist
            was ist das auf deutsch?
        """,
        "name.it": """
            che cos'è questo?
            come si chiama questo?
            come si chiama questo in italiano?
            dimmi che cos'è
            che cos'è questo in italiano?
        """,
        "name.pt": """
            o que é isto?
            como se chama isto?
            como se chama isto em português?
            diga o que é isto
            o que é isto em português?
        """,
        "name.id": """
            apa ini?
            ini apa?
            apa nama benda ini?
            apa ini dalam bahasa indonesia?
            apa nama ini dalam bahasa indonesia?
        """,
        "name.tr": """
            bu ne?
            bu nedir?
            bunun adı ne?
            bu nedir, türkçe söyle
            bunun türkçe adı nedir?
        """,
        "name.language": """
            what is this in {language}?
            name this in {language}
            what is this called in {language}?
            how do you say this in {language}?
            what is the name of this in {language}?
        """,
        "scene": """
            draw {scene}
            show me {scene}
            please draw {scene}
            can you draw {scene}?
            please show me {scene}
            make a picture of {scene}
            a picture of {scene}
            paint {scene}
            i want to see {scene}
            could you draw {scene}?
            {scene}
            draw a picture of {scene}
            create an image of {scene}
            i would like to see {scene}
            create a picture of {scene}
        """,
        "scene.left": """
            {a} to the left of {b}
            {a} left of {b}
            {a} on the left and {b} on the right
            {b} with {a} on its left
            {a} on the left side of {b}
        """,
        "scene.right": """
            {a} to the right of {b}
            {a} right of {b}
            {a} on the right and {b} on the left
            {b} with {a} on its right
            {a} on the right side of {b}
        """,
        "scene.above": """
            {a} above {b}
            {a} on top of {b}
            {a} at the top and {b} at the bottom
            {b} with {a} above it
            {b} with {a} on top of it
        """,
        "scene.below": """
            {a} below {b}
            {a} under {b}
            {a} at the bottom and {b} at the top
            {b} with {a} below it
            {b} with {a} under it
        """,
        "scene.row": """
            {a}, {b} and {d} in a row
            a row of {a}, {b} and {d}
            {a}, {b} and {d} side by side
            {a}, then {b}, then {d}
            a row: {a}, {b}, {d}
        """,
        "scene.count": """
            {n} {many}
            a picture with {n} {many}
            exactly {n} {many}
            {n} {many}, nothing else
            a picture of {n} {many}
        """,
        "describe": """
            describe this
            describe the picture
            describe what you see
            what is where in this picture?
            describe this picture
            say what is where
            tell me what is where
            describe it
            say all that you see
            please describe the picture
        """,
        "edit.tone": """
            give it a {tone} skin tone
            make the skin tone {tone}
            change the skin tone to {tone}
            use a {tone} skin tone
            change it to a {tone} skin tone
        """,
        "edit.swap": """
            replace the {x} with {b}
            swap the {x} for {b}
            change the {x} into {b}
            turn the {x} into {b}
            change the {x} to {b}
            make the {x} {b}
            let the {x} become {b}
            please replace the {x} with {b}
            put {b} in place of the {x}
            please swap the {x} for {b}
        """,
        "edit.move": """
            move the {x} to the {place}
            put the {x} at the {place}
            place the {x} at the {place}
            shift the {x} to the {place}
            put the {x} to the {place}
            bring the {x} to the {place}
            please move the {x} to the {place}
            now the {x} at the {place}
            have the {x} at the {place}
            please put the {x} at the {place}
        """,
        "edit.exchange": """
            swap their places
            exchange the {x} and the {y}
            let the {x} and the {y} change places
            swap the {x} and the {y}
            let the {x} and the {y} swap places
        """,
        "edit.add": """
            add {b} {side} the {x}
            put {b} {side} the {x}
            also draw {b} {side} the {x}
            now add {b} {side} it
            also put {b} {side} the {x}
            please add {b} {side} the {x}
            draw {b} {side} the {x}, too
            place {b} {side} the {x}
            {b} {side} the {x}, too
            please put {b} {side} the {x}
        """,
        "edit.remove": """
            remove the {x}
            take the {x} away
            delete the {x}
            take away the {x}
            please take the {x} away
            please remove the {x}
            now without the {x}
            drop the {x}
            erase the {x}
            please delete the {x}
        """,
        "edit.recolour": """
            make the background {c}
            change the background to {c}
            use {on} background
            put it on {on} background
            now with {on} background
        """,
        "open": """
            draw any {x}
            draw some {x}
            show me some {x}
            show me any {x}
            please draw any {x}
            surprise me with some {x}
            draw a random {x}
            paint some {x}
            some {x}, please
            please show me some {x}
            draw some kind of {x}
            any {x} you like
            pick any {x} and draw it
            show me a random {x}
            draw any {x} you like
            i want to see some {x}
            i want to see any {x}
            make a picture of some {x}
            choose some {x} and draw it
            make a picture of any {x}
            can you draw any {x}?
            could you draw some {x}?
            can you show me some {x}?
            i would like to see any {x}
            could you show me some {x}?
        """,
        "open.background": """
            {request} on any background
            {request} on some background
            {request} on a random background
            {request}, any background
            {request} with any background
        """,
        "open.anywhere": """
            draw two {many} anywhere
            show me two {many} anywhere
            two {many}, anywhere you like
            put two {many} anywhere
            two {many} anywhere
        """,
        "story": """
            tell a story in {n} pictures about {a}
            tell me a story about {a} in {n} pictures
            a story about {a} in {n} pictures
            tell a {n}-picture story about {a}
            tell me a story in {n} pictures about {a}
            write a story about {a} with {n} pictures
            make a picture story about {a} with {n} pictures
            i want a story about {a} in {n} pictures
            a story of {n} pictures about {a}
            write a story in {n} pictures about {a}
            please tell a story about {a} with {n} pictures
            {n} pictures that tell a story about {a}
            tell a story about {a}, {n} pictures
            illustrate a story about {a} in {n} pictures
            please tell me a story about {a} in {n} pictures
            make up a story about {a} in {n} pictures
            i would like a story about {a} with {n} pictures
            can you tell a story about {a} in {n} pictures?
            could you tell a story in {n} pictures about {a}?
            can you tell me a story in {n} pictures about {a}?
            give me a story about {a} in {n} pictures
            please write a story about {a} with {n} pictures
            a {n}-picture story about {a}
            tell the story of {a} in {n} pictures
            i want a {n}-picture story about {a}
        """,
        "text.is": """
            is {a} {b}?
            would you say {a} is {b}?
            do you think {a} is {b}?
            is {a} {b} or not?
            would you say that {a} is {b}?
        """,
        "text.translate": """
            what is '{x}' in {language}?
            how do you say '{x}' in {language}?
            translate '{x}' into {language}
            what is the {language} word for '{x}'?
            how do i say '{x}' in {language}?
        """,
        "text.english": """
            what does '{x}' mean?
            what is '{x}' in English?
            translate '{x}' into English
            what is the English word for '{x}'?
            what does '{x}' mean in English?
        """,
        "text.member": """
            name {b}
            tell me the name of {b}
            do not draw, just name {b}
            say the name of {b}
            just tell me the name of {b}
        """,
        "text.rewrite": """
            in words: {a}. {edit}
            only in words: {a}. {edit}
            do not draw: {a}. {edit}
            just say it: there is {a}. {edit}
            just in words: there is {a}. {edit}
        """,
        "text.hello": """
            hello
            hi
            hello there
            good morning
            hi there
        """,
        "text.who": """
            who are you?
            what are you?
            what is your name?
            tell me who you are
            tell me what you are
        """,
        "text.can": """
            what can you do?
            help
            how can you help me?
            what do you do?
            tell me what you can do
        """,
        "text.thanks": """
            thank you
            thanks
            thank you very much
            thanks a lot
            thank you so much
        """,
        "text.bye": """
            goodbye
            bye
            see you later
            good night
            bye, see you later
        """,
        "series": """
            draw {a} and then {b}
            first draw {a}, then {b}
            one picture of {a} and one of {b}
            draw two pictures: {a} and {b}
            first {a}, then {b}
        """,
        "video": """
            {a} moving {direction}
            a video of {a} moving {direction}
            show {a} moving {direction}
            a clip of {a} moving {direction}
            show a video of {a} moving {direction}
        """,
    }.items()
}

HELDOUT_EACH = 5


def is_heldout(number: int) -> bool:
    """Whether the template of this number, in any list, is kept for the heldout split."""
    return number % HELDOUT_EACH == HELDOUT_EACH - 1


@cache
def numbers(kind: str, split: str) -> tuple[int, ...]:
    """The numbers of the templates of a kind that a split may use."""
    return tuple(i for i in range(len(TEMPLATES[kind])) if is_heldout(i) == (split == "heldout"))
