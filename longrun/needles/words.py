"""Word lists and sentence patterns of the generated haystack, written for this project.

Every pattern has at least six slots, so that the number of different sentences (over 10**15) is far beyond what ten
million tokens need. No pattern and no word holds a digit or a colon: those belong to the needles alone. The names
appear in needles and questions only, so that a name in a question has exactly one place in the haystack.
"""

from __future__ import annotations

_PEOPLE = """actor admiral adviser architect artist astronomer athlete author baker banker barber biologist
blacksmith bookseller botanist brewer bricklayer builder butcher captain caretaker carpenter cashier chemist clerk
coach cobbler collector composer conductor constable cook courier dancer dentist designer detective diplomat director
diver doctor driver editor electrician engineer explorer farmer ferryman fisherman florist forester gardener
geologist glazier goldsmith governor grocer guard guide harbourmaster historian hunter innkeeper inspector inventor
jeweller journalist judge juggler lawyer lecturer librarian locksmith magistrate manager mason
mathematician mechanic merchant messenger midwife miller miner minister musician nurse officer optician organist
painter pharmacist philosopher photographer physician pianist pilot plumber poet porter postman potter printer
professor ranger reporter sailor scholar scientist sculptor secretary sheriff shepherd singer smuggler soldier
surgeon surveyor tailor teacher translator traveller treasurer typist umpire undertaker violinist visitor waiter
watchmaker weaver widow wrestler writer zoologist"""

_THINGS = """almanac anchor apple armchair axe bag ball banner barrel basin basket bell bench blanket boat book bottle
bowl box bracelet bread brick bridle broom brush bucket button cabinet cake camera candle canvas carpet cart chain
chair chart cheese chest clock cloak coat coin compass crate crown cup curtain cushion dagger desk diary dish door
drawer dress drum engine envelope feather fence fiddle flag flask flute fork fountain furnace gate glove goblet guitar
hammer harness hat helmet hook jar jug kettle key knife ladder lamp lantern ledger lens letter lid lock magnet mantle
map mask mattress medal mirror mug nail napkin needlework net notebook oar oven package paddle pail painting pan
parcel pen pencil piano pillow pipe pitcher plate plough portrait pot pouch pump purse quilt radio rake ring robe rope
rug sack saddle sail saw scarf scroll shawl shelf shield shovel sickle signpost spoon stamp statue stool stove
suitcase sword table tablet teapot telescope tent ticket tile toolbox towel tray trumpet trunk umbrella vase violin
wagon wallet wardrobe watch wheel whistle window wreath"""

_PLACES = """abbey airfield alley archive arena attic avenue bakery balcony ballroom bank barn barracks basement bay
beach boathouse border brewery bridge bus camp canal canyon castle cathedral cave cellar cemetery chapel city clearing
cliff clinic coast college cottage courthouse courtyard creek crossroads dairy desert dock factory farm farmhouse
field foothills forest fort foundry gallery garage garden glacier grove gulf hall harbour headland highway hill
hospital hotel house inn island junction kitchen laboratory lagoon lake lane library lighthouse lodge manor marina
market marsh meadow mill mine monastery moor mountain museum nursery observatory office orchard palace park pasture
path pavilion pier plain plateau playground plaza pond port prairie prison quarry quay railway ranch reef reservoir
restaurant ridge river road ruins school shed shore shop square stable stadium staircase station stream street studio
swamp tavern temple terrace theatre tower town tunnel university valley vault viaduct village vineyard warehouse
waterfall wharf woods workshop yard zoo"""

_ADJECTIVES = """ancient anxious awkward bitter black blue bold brave brief bright broken brown calm careful careless
cautious cheap cheerful clean clever clumsy coarse cold common costly crooked curious damp dark deep delicate distant
dull dusty eager early elegant empty faded faint faithful famous fancy fierce foreign fragile fresh friendly gentle
giant gloomy golden graceful grand green grey handsome happy harmless heavy hidden hollow honest huge humble hungry
idle jolly kind large lazy light little lively lonely long loud low loyal lucky massive merry mighty modern modest
muddy mysterious narrow nervous new noble noisy odd old orange ordinary painted pale patient peaceful plain pleasant
polished polite poor precious proud purple quaint quick quiet rare red reliable rich robust rough round rusty sad
scarlet secret serious shabby shallow sharp shiny short shy silent silver simple sleepy slender slow small smooth
solemn solid splendid steady stern stiff stout strange strong stubborn sturdy sunny swift tall tame thick thin
thoughtful tidy timid tiny tired tough unusual useful useless vast violet warm weary wet white wide wild wise wonderful
wooden yellow young"""

_VERBS = """abandoned accepted admired adored appreciated arranged assembled auctioned bought borrowed bothered built
burned buried carried carved caught checked chose cleaned collected compared concealed copied counted covered created
damaged decorated delivered described designed destroyed discovered displayed divided dragged drew dropped dusted
emptied examined exchanged feared fetched filled finished fixed flung followed forgot found gathered grabbed guarded
handed held hid hired ignored imported inherited inspected invented kept knocked labelled leased lent lifted loaded
lost loved measured mended mentioned moved noticed offered opened ordered owned packed painted photographed placed
polished praised prepared preserved protected pulled purchased pushed raised received recognised recommended recorded
refused remembered removed rented repaired replaced requested rescued restored returned revealed ruined sealed seized
selected sent shared shook showed sketched smashed sold spotted stole stored studied surrendered swapped tested threw
touched traded trusted unpacked used valued visited wanted washed watched weighed wrapped"""

_ACTIONS = """argued arrived begged blushed bowed breathed camped celebrated complained coughed cried dozed dreamed
escaped fainted fished frowned gambled giggled grew grinned grumbled hesitated hurried jumped knelt laughed leaned
listened lingered marched mumbled nodded paused prayed promised quarrelled rested rode sang sat shivered shouted sighed
slept slipped smiled sneezed sobbed spoke stood stumbled swam swore talked travelled trembled vanished waited walked
wandered waved wept whispered whistled winked wondered worked worried yawned"""

_ADVERBS = """abruptly absently again almost alone always angrily anxiously awkwardly badly barely boldly bravely
briefly brightly calmly carefully carelessly casually cautiously cheerfully clearly cleverly closely coldly courteously
deliberately discreetly eagerly easily evenly eventually faithfully finally firmly fondly frankly freely gently gladly
gracefully gradually greedily happily hastily honestly hungrily idly immediately innocently instantly kindly lazily
lightly loudly loyally merrily mostly neatly nervously nicely nobly noisily obediently oddly often openly patiently
perfectly politely poorly promptly proudly punctually quickly quietly rapidly rarely readily reluctantly rudely sadly
safely seldom secretly seriously sharply shyly silently simply skilfully sleepily slowly smoothly softly solemnly
sometimes soon steadily sternly stiffly strangely suddenly surely sweetly swiftly tenderly thoroughly tightly truly
urgently usually vaguely vainly warmly wearily wildly willingly wisely"""

_TIMES = """afternoon april august autumn birthday carnival century christmas concert dawn day daybreak december decade
dinner drought dusk easter eclipse election evening examination exhibition february festival flood friday frost funeral
fortnight harvest heatwave holiday hour january july june lunch march marriage may meeting midday midnight midsummer
minute monday month morning night noon november october parade peace plague quarter rehearsal reunion revolution
saturday season september snowfall spring storm strike summer sunday sunrise sunset supper term thunderstorm thursday
tournament trial truce tuesday twilight vote war wedding wednesday week weekend winter year"""

_ABSTRACTS = """accident adventure advice agreement anger argument arrangement bargain beauty belief bravery business
chance charity comfort complaint confidence conversation courage curiosity custom danger debt decision delay delight
departure disaster discovery dispute doubt dream duty effort error experiment failure fame fate favour fear fortune
freedom friendship game generosity gossip greed habit happiness history honour hope hunger idea illness inheritance
injury insult invention jealousy journey joke journal justice kindness knowledge laughter law legend lesson lie luck
luxury memory mercy mistake mood music mystery nonsense notion oath opinion patience plan pleasure politics poverty
prayer pride problem profit progress promise proposal prophecy proverb punishment quarrel question reputation reward
riddle rumour sadness scandal secret shame silence sorrow story success superstition surprise tale talent taste tax
theory thought tradition tragedy treaty trick trouble truth vanity victory wealth weather wisdom wish"""

_PREPOSITIONS = """above across against along around behind below beside beyond inside near opposite outside past
through toward under within"""

_NAMES = """Abigail Adrian Agatha Alastair Albert Alexander Alfred Alice Amelia Andrew Angela Anthony Arabella Archibald
Arthur Audrey Barbara Barnaby Beatrice Benedict Benjamin Bernard Bertram Bridget Camilla Caroline Cassandra Catherine
Cecilia Charlotte Christopher Clara Clarence Claudia Clement Conrad Cordelia Cornelius Daniel Daphne Deborah Dominic
Dorothy Edgar Edith Edmund Edward Eleanor Elizabeth Emily Emma Ernest Esther Eugene Felicity Felix Ferdinand Flora
Florence Frances Francis Frederick Gabriel Genevieve Geoffrey George Georgia Gerald Gertrude Gilbert Gregory Gwendolyn
Hannah Harold Harriet Hector Helena Henrietta Henry Herbert Horace Howard Hubert Hugo Humphrey Imogen Ingrid Irene
Isabella Isadora Jacob Jasper Jeremy Jessica Joanna Jonathan Josephine Joshua Judith Julian Juliet Katherine Kenneth
Lambert Lawrence Leonard Leopold Louisa Lucinda Ludwig Lydia Magnus Malcolm Marcus Margaret Marianne Martha Matilda
Matthew Maurice Maximilian Melissa Meredith Michael Mildred Millicent Miranda Miriam Montgomery Muriel Nathaniel
Nicholas Nigel Norman Octavia Oliver Olivia Oscar Oswald Patricia Penelope Percival Peregrine Philippa Phoebe Quentin
Rachel Raymond Rebecca Reginald Roderick Roland Rosalind Rosemary Rupert Samantha Sebastian Septimus Sidney Silvester
Sophia Stanley Stephanie Susannah Sylvia Tabitha Theodora Theodore Thomas Timothy Tobias Ursula Valentine Vanessa
Veronica Victoria Vincent Virginia Vivian Walter Wilfred Wilhelmina William Winifred Xavier Yolanda Zachary"""

SLOTS: dict[str, tuple[str, ...]] = {
    "person": tuple(_PEOPLE.split()),
    "thing": tuple(_THINGS.split()),
    "place": tuple(_PLACES.split()),
    "adj": tuple(_ADJECTIVES.split()),
    "verb": tuple(_VERBS.split()),
    "act": tuple(_ACTIONS.split()),
    "adv": tuple(_ADVERBS.split()),
    "time": tuple(_TIMES.split()),
    "idea": tuple(_ABSTRACTS.split()),
    "prep": tuple(_PREPOSITIONS.split()),
}
"""Slot name -> the words that may fill it."""

NAMES: tuple[str, ...] = tuple(_NAMES.split())
"""One-word names for needles; none of them is a haystack word."""

PATTERNS: tuple[str, ...] = (
    "During the {time} the {adj} {person} {adv} {verb} the {adj} {thing} {prep} the {place}.",
    "The {adj} {person} {act} {adv} {prep} the {adj} {place} while the {person} {verb} the {thing}.",
    "Before the {time}, no {person} from the {adj} {place} had ever {verb} such a {adj} {thing} so {adv}.",
    "When the {person} {verb} the {adj} {thing}, the {adj} {person} {act} {prep} the {place}.",
    "In the {adj} {place} there was once a {adj} {person} who {adv} {verb} every {thing} after the {time}.",
    "Nobody in the {place} believed the {idea} that the {adj} {person} {adv} {verb} the {adj} {thing}.",
    "A {adj} {thing} and a {adj} {thing} stood {prep} the {place} until the {person} {verb} them {adv}.",
    "It was the {person} of the {adj} {place} who {verb} the {thing}, not the {adj} {person} with the {adj} {thing}.",
    "After the {idea} of the {time}, the {person} {adv} {verb} a {adj} {thing} for the {adj} {person}.",
    "The {person} {act} and the {person} {act}, because the {adj} {thing} was {adv} {verb} {prep} the {place}.",
    "Every {time} the {adj} {person} {verb} a {thing} to the {person} {prep} the {adj} {place}.",
    "Although the {adj} {idea} had {adv} {verb} the {person}, the {thing} stayed {prep} the {adj} {place}.",
    "Some said that the {idea} of the {adj} {person} began {prep} the {place}, where a {thing} was {adv} {verb}.",
    "With {adj} {idea} and {adj} {idea}, the {person} {verb} the {thing} {prep} the {place}.",
    "Once the {person} had {verb} the {adj} {thing}, the {idea} of the {adj} {place} was {adv} forgotten.",
    "Toward the {time} a {adj} {person} came from the {place} and {adv} {verb} the {thing} of the {adj} {person}.",
    "If the {adj} {thing} is {adv} {verb} before the {time}, the {person} of the {adj} {place} will hear of it.",
    "They {adv} {verb} the {thing} {prep} the {adj} {place}, and the {adj} {person} {act} about the {idea}.",
    "Because of a {adj} {idea}, each {person} {prep} the {place} {adv} {verb} one {adj} {thing}.",
    "His {adj} {thing} was {verb} {prep} the {place} by a {adj} {person} who {adv} {act} that {time}.",
    "Her {idea} about the {adj} {thing} made the {person} {prep} the {adj} {place} look {adv} at the {person}.",
    "Far from the {adj} {place}, two people {adv} {verb} a {thing} and called it the {idea} of the {adj} {person}.",
    "What the {adj} {person} {verb} that {time} was only a {adj} {thing}, left {adv} {prep} the {place}.",
    "Neither the {person} nor the {adj} {person} {adv} {verb} the {adj} {thing} {prep} the {place}.",
)
"""Sentence patterns; `{slot}` is filled from `SLOTS`. Each begins with a literal word and ends with a period."""
