"""Classes of emoji for open requests ("draw any fruit"): class noun -> members. Data only.

Every noun is countable. FAMILY groups classes with disputable members; a "no" question uses another family.
Samples are by index: any change of a list changes the corpus.
"""

from __future__ import annotations

from omni.data.emoji_world.objects import listed

CLASSES: dict[str, tuple[str, ...]] = {
    noun: listed(members)
    for noun, members in {
        "fruit": """
            red apple|green apple|pear|tangerine|lemon|banana|watermelon|grapes|strawberry|blueberries|melon|cherries
            peach|mango|pineapple|coconut|kiwi fruit|lime
        """,
        "vegetable": """
            carrot|ear of corn|broccoli|eggplant|cucumber|garlic|onion|potato|bell pepper|hot pepper|leafy green|pea pod
            roasted sweet potato
        """,
        "drink": """
            hot beverage|beer mug|wine glass|cocktail glass|tropical drink|glass of milk|teacup without handle
            tumbler glass|beverage box|bubble tea|mate|cup with straw|sake
        """,
        "dessert": """
            birthday cake|shortcake|cupcake|doughnut|cookie|ice cream|soft ice cream|shaved ice|pie|custard
            chocolate bar|candy|lollipop
        """,
        "animal": """
            cat|dog|cow|pig|rabbit|tiger|horse|ewe|goat|elephant|mouse|bear|panda|koala|fox|lion|frog|monkey|zebra
            giraffe|kangaroo|wolf|gorilla|hippopotamus|rhinoceros|camel|deer|raccoon|hedgehog|skunk|beaver|badger|otter
            sloth
        """,
        "bird": """
            penguin|owl|duck|eagle|rooster|flamingo|parrot|goose|turkey|peacock|chicken|dove|dodo|hatching chick
        """,
        "insect": """
            butterfly|honeybee|lady beetle|ant|beetle|cricket|fly|mosquito|cockroach
        """,
        "sea creature": """
            whale|spouting whale|dolphin|octopus|crab|tropical fish|fish|shark|blowfish|lobster|shrimp|squid|seal
            jellyfish|oyster
        """,
        "vehicle": """
            automobile|bus|taxi|fire engine|tractor|bicycle|motorcycle|airplane|helicopter|locomotive|ambulance
            delivery truck|police car|racing car|articulated lorry|tram|motor scooter|minibus|trolleybus|pickup truck
        """,
        "flower": """
            rose|tulip|sunflower|hibiscus|blossom|cherry blossom|bouquet|lotus|hyacinth|wilted flower
        """,
        "ball": """
            soccer ball|basketball|baseball|softball|volleyball|american football|rugby football|pool 8 ball|tennis
        """,
        "musical instrument": """
            guitar|violin|trumpet|drum|saxophone|banjo|accordion|musical keyboard|long drum|maracas|flute
        """,
        "heart": """
            red heart|blue heart|green heart|yellow heart|purple heart|orange heart|black heart|brown heart|pink heart
            grey heart|light blue heart|broken heart
        """,
        "tool": """
            hammer|axe|wrench|screwdriver|carpentry saw|pick|hammer and wrench|nut and bolt|ladder|hook|gear|toolbox
        """,
        "building": """
            house|castle|japanese castle|school|hospital|bank|hotel|factory|church|post office|office building
            department store|convenience store|stadium|mosque|synagogue|hindu temple|hut
        """,
        "weather sign": """
            sun|cloud|rainbow|tornado|snowflake|umbrella with rain drops|cloud with rain|cloud with lightning|snowman
            sun behind cloud|high voltage|sun behind rain cloud
        """,
        "piece of clothing": """
        t-shirt|jeans|dress|scarf|gloves|coat|socks|kimono|bikini|necktie|lab coat|shorts|top hat|billed cap
        running shirt|sari|briefs
        """,
    }.items()
}

FAMILY: dict[str, str] = {
    "fruit": "plant", "vegetable": "plant", "flower": "plant", "drink": "sweet", "dessert": "sweet",
    "animal": "creature", "bird": "creature", "insect": "creature", "sea creature": "creature",
}  # fmt: skip
