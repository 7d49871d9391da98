"""Common words for things, animals, people, places and looks: what an edit might harm unnoticed (EAP's vocabulary)."""

_WORDS = """
    person man woman child baby girl boy face hand crowd doctor teacher soldier king queen dancer farmer chef dog cat
    horse cow sheep pig goat lion tiger bear wolf fox deer rabbit mouse elephant monkey zebra giraffe camel bird eagle
    owl duck penguin parrot swan fish shark whale dolphin turtle frog snake lizard spider bee butterfly crab tree
    forest flower rose tulip sunflower grass leaf cactus mushroom garden field mountain hill valley river lake sea
    beach island desert snow ice rain storm cloud sky sun moon star sunset night fire smoke rock sand waterfall cave
    house castle church tower bridge city street road village farm barn temple palace school hospital shop market
    station airport stadium park room kitchen bedroom bathroom office library door window wall roof stairs car truck
    bus train bicycle motorcycle boat ship sailboat airplane helicopter rocket tractor chair table bed sofa lamp clock
    mirror book pen pencil phone computer keyboard camera television radio guitar piano violin drum bottle cup glass
    plate bowl spoon fork knife key lock box bag umbrella hat shirt dress coat shoe crown ring watch glasses ball kite
    toy doll flag coin candle hammer rope ladder wheel apple banana orange lemon grape strawberry cherry pear peach
    watermelon pineapple tomato potato carrot corn bread cheese egg meat pizza hamburger cake cookie chocolate coffee
    tea milk wine beer juice soup salad rice portrait landscape painting drawing sketch photograph sculpture poster
    cartoon pixel watercolor mosaic
"""
VOCABULARY: tuple[str, ...] = tuple(_WORDS.split())
