"""What the canaries read: prompts with one right ending among wrong ones, in plain letters.

A test is a function of (rng, variant, filler sentences) that returns an Item; its variants are
paraphrases. Right and wrong endings are of one kind and differ from their first word on, and some
wrong ones stand in the prompt too. Letters, spaces, newlines and .,:;?!'- are all the characters.
"""

from random import Random
from typing import NamedTuple


class Item(NamedTuple):
    """A prompt without its ending, the right ending and wrong ones, each with a space before it."""

    prompt: str
    right: str
    wrong: tuple[str, ...]


WOMEN = ("Anna", "Clara", "Emma", "Grace", "Julia", "Laura", "Martha", "Sophie")
MEN = ("Adam", "Daniel", "Edgar", "Frank", "Henry", "Martin", "Oscar", "Peter")
TOWNS = ("Rome", "Paris", "London", "Athens", "Venice", "Lisbon", "Vienna", "Dublin")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
PLACES = ("cellar", "kitchen", "garden", "stable", "tower", "chapel", "library", "barn")
ANIMALS = ("horse", "lion", "eagle", "fox", "bear", "goose", "wolf", "snake")
DRINKS = ("tea", "milk", "wine", "water", "beer", "cider", "coffee", "juice")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
TRADES = {  # trade: how one knows it without its name
    "baker": "I stand at the oven before dawn, and by noon all my bread is sold.",
    "doctor": "The sick send for me by night, and I know a herb for every fever.",
    "sailor": "I have slept more nights at sea than on land, and I can read the stars.",
    "tailor": "With needle and thread I made the coat that you are wearing.",
    "soldier": "I have marched in two wars, and my sword is never far from me.",
    "farmer": "I plough in spring, I reap in August, and all year I watch the sky.",
}

FACTS = (  # (statement, its recall, what fills {x}); {n} is someone's name
    ("{n} called the puppy {x}.", "Come here, said {n}, and the puppy ran up. Its name was", MEN),
    ("{n} was born in {x}.", "Where was {n} born? The town where {n} was born is", TOWNS),
    ("{n} painted the front door {x}.", "The front door of {n} is", COLOURS),
    ("{n} hid the letter in the {x}.", "To find the letter of {n}, one must look in the", PLACES),
)

SMALL_TALK = (
    ("How was the journey?", "Long, but the road was dry."),
    ("Did you sleep well?", "As well as one can in a strange bed."),
    ("The days grow shorter.", "They do, and the evenings grow cold."),
    ("Have you heard the bells?", "I heard them, early in the morning."),
    ("There was music in the square.", "I wish I had been there to hear it."),
    ("The bridge is closed again.", "Then we shall have to go round by the mill."),
    ("My brother sends his regards.", "Give him mine when you see him."),
    ("It looks like rain.", "It has looked like rain since Monday."),
    ("They say the mayor is ill.", "I hope that it is nothing grave."),
    ("What a crowd there was today!", "One could hardly cross the street."),
)

_WHO = ("The old clerk", "A tall stranger", "The miller", "My cousin", "The night watchman",
        "A young fiddler", "The schoolmaster", "Her neighbour", "The ferryman", "A merchant",
        "The judge", "An idle boy")  # fmt: skip
_DID = ("walked slowly", "waited for an hour", "sang a little", "looked about", "stopped to rest",
        "talked of the weather", "whistled", "counted his coins", "read the news", "sat down",
        "laughed aloud", "lost his hat")  # fmt: skip
_WHERE = ("by the river", "near the market", "under the bridge", "at the corner", "on the hill",
          "behind the inn", "before the gate", "in the rain", "along the wall", "in the evening",
          "after supper", "on the long road")  # fmt: skip


def filler(rng: Random, sentences: int) -> str:
    """Sentences that have nothing to do with any test, each after a space."""
    pick = lambda: " ".join(map(rng.choice, (_WHO, _DID, _WHERE)))
    return "".join(f" {pick()}." for _ in range(sentences))


def recall(rng: Random, variant: int, sentences: int) -> Item:
    """C1a, C1b, C1c: a fact, sentences about other things, the fact again."""
    statement, lead, values = FACTS[variant]
    name, right, *wrong = rng.choice(WOMEN), *rng.sample(values, 4)
    prompt = statement.format(n=name, x=right) + filler(rng, sentences)
    return _item(f"{prompt} {lead.format(n=name)}", right, wrong)


def recall_of_two(rng: Random, variant: int, sentences: int) -> Item:
    """C1d: two facts of one kind; one is asked for, and the other is among the wrong endings."""
    statement, lead, values = FACTS[variant]
    names, (right, other, *wrong) = rng.sample(WOMEN, 2), rng.sample(values, 4)
    facts = [statement.format(n=n, x=x) for n, x in zip(names, (right, other))]
    rng.shuffle(facts)
    prompt = " ".join(facts) + filler(rng, sentences)
    return _item(f"{prompt} {lead.format(n=names[0])}", right, [other, *wrong])


def combine(rng: Random, variant: int, sentences: int) -> Item:
    """C2a: three distant facts lead to the answer; a fourth one points to a wrong ending."""
    a, b = rng.sample(WOMEN, 2)
    chest, shelf = rng.sample(("chest", "basket", "cupboard", "barrel", "trunk"), 2)
    right, decoy, *wrong = rng.sample(PLACES, 4)
    facts, lead = (
        (
            (f"{a} gave the map to {b}.", f"{b} put all she was given into the {chest}.",
             f"The {chest} stood in the {right}, the {shelf} in the {decoy}."),
            f"So the map that {a} gave away was at last in the",
        ),
        (
            (f"The silver ring belongs to {a}.", f"What belongs to {a} is kept in the {chest}.",
             f"One sees the {shelf} in the {decoy} and the {chest} in the {right}."),
            "Therefore, who wants the silver ring must go to the",
        ),
        (
            (f"{a} bought a violin.", f"Her sister {b} carried it to the {chest} and shut the lid.",
             f"Then two men brought the {shelf} to the {decoy} and the {chest} to the {right}."),
            f"And so the violin that {a} bought is now in the",
        ),
    )[variant]  # fmt: skip
    part = sentences // 3
    text = " ".join(fact + filler(rng, part) for fact in facts)
    return _item(f"{text} {lead}", right, [decoy, *wrong])


def infer(rng: Random, variant: int, sentences: int) -> Item:
    """C2b: the answer is never said and follows from three hints."""
    n = rng.choice(WOMEN)
    hints, lead, right, *wrong = (
        (
            (f"{n} came in with wet hair.", "She shook out her umbrella.",
             "The street was full of puddles."),
            "Outside it was still", "raining", "burning", "singing", "painting",
        ),
        (
            (f"{n} blew out the candles.", "She cut the cake.", "Then she opened her presents."),
            f"It was the day on which {n} had been", "born", "hired", "robbed", "drowned",
        ),
        (
            (f"{n} packed her trunk.", "She locked up the house.",
             "At the harbour the ship was ready."),
            f"That evening {n} was going to", "leave", "cook", "paint", "bathe",
        ),
        (
            (f"{n} yawned.", "She put out the lamp.", "Then she drew up her blanket."),
            f"A moment later {n} was fast", "asleep", "afloat", "ashore", "ablaze",
        ),
    )[variant]  # fmt: skip
    text = " ".join(hint + filler(rng, sentences // 3) for hint in hints)
    return _item(f"{text} {lead}", right, wrong)


def prefer(rng: Random, variant: int, turns: int) -> Item:
    """C3a: what someone likes, and seven turns later what they order."""
    n, right, other, *wrong = rng.choice(WOMEN), *rng.sample(DRINKS, 4)
    said, asked, lead = (
        (f"I never touch {other}. I only drink {right}.", "What may I bring you?",
         "The same as ever, a cup of"),
        (f"Nothing is better than a cup of {right}. I cannot bear {other}.", "Are you thirsty?",
         "Yes, and you know what I like. I will have some"),
        (f"My doctor forbids me {other}, so now I drink {right}.", "What shall I pour for you?",
         "What my doctor allows, if you please: a glass of"),
    )[variant]  # fmt: skip
    talk = _talk(rng, "Host", n, turns)
    return _item(f"{n}: {said}\n{talk}Host: {asked}\n{n}: {lead}", right, [other, *wrong])


def resolve(rng: Random, variant: int, _: int) -> Item:
    """C3b: who "she" and "he" were."""
    (she, other_she), (he, other_he) = rng.sample(WOMEN, 2), rng.sample(MEN, 2)
    about = (
        ("{she} met {he} at the fair. She sold apples, and he played the flute. {}",
         "The one who sold apples was", "The one who played the flute was"),
        ("When {he} came home, {she} was writing. She looked up, and he took off his coat. {}",
         "Who looked up? It was", "Who took off a coat? It was"),
        ("{she} and {he} were cousins. He owned a mill; she owned a ship. {}",
         "The ship belonged to", "The mill belonged to"),
    )[variant]  # fmt: skip
    text, *asked = about
    woman = rng.random() < 0.5
    prompt = text.format(asked[0 if woman else 1], she=she, he=he)
    right, wrong = (she, he) if woman else (he, she)
    return _item(prompt, right, [wrong, other_she, other_he])


def correct(rng: Random, variant: int, turns: int) -> Item:
    """C3c: a fact, its correction, and which of the two is remembered."""
    n, old, right, *wrong = rng.choice(MEN), *rng.sample(NUMBERS, 4)
    first, second, lead = (
        (f"My coach leaves at {old}.", f"I was wrong: the coach leaves at {right}.",
         f"Then, {n}, you must not be late. Your coach leaves at"),
        (f"I have {old} sisters.", f"Forgive me, I misspoke. I have {right} sisters.",
         f"Tell me again, {n}. No, I recall it: the number of your sisters is"),
        (f"The room costs {old} crowns.", f"No, not {old}. The room costs {right} crowns.",
         f"Very well, {n}. Here is the money for the room. In crowns that is"),
    )[variant]  # fmt: skip
    a, b = _talk(rng, "Host", n, turns), _talk(rng, "Host", n, turns)
    return _item(f"{n}: {first}\n{a}{n}: {second}\n{b}Host: {lead}", right, [old, *wrong])


def keep_format(rng: Random, variant: int, _: int) -> Item:
    """C4a: the next line keeps the form of the lines before it."""
    labels, values = (
        (("Price", "Worth", "Value", "Costs"), NUMBERS),
        (("Colour", "Shade", "Paint", "Looks"), COLOURS),
        (("Town", "City", "Home", "Place"), TOWNS),
    )[variant]
    right, *wrong = rng.sample(labels, 4)
    names = rng.sample(WOMEN, 5)
    lines = [f"Name: {n}. {right}: {rng.choice(values)}.\n" for n in names[:-1]]
    return _item(f"{''.join(lines)}Name: {names[-1]}.", f"{right}:", [f"{w}:" for w in wrong])


COURTLY = (
    "It will be an honour, my lady.",
    "I am most humbly at your service.",
    "With the greatest of pleasure, my lady.",
    "Permit me to attend to it at once.",
    "Your kindness is beyond my deserving.",
)
ROUGH = (
    "Bah, do it yourself, you lazy dog.",
    "What, that old rubbish again?",
    "Get out of here, you blockhead.",
    "Who cares, you noisy fool?",
    "Shut your mouth and go away.",
)


def keep_tone(rng: Random, variant: int, _: int) -> Item:
    """C4b: a courtly or rough speaker stays so; the wrong endings are in the other tone."""
    tone, other = (COURTLY, ROUGH) if variant % 2 else (ROUGH, COURTLY)
    who = ("Servant", "Servant", "Porter", "Porter")[variant]
    *said, right = rng.sample(tone, 4)
    asked = [question for question, _ in rng.sample(SMALL_TALK, 4)]
    lines = [f"Guest: {q}\n{who}: {a}\n" for q, a in zip(asked, said)]
    return _item(f"{''.join(lines)}Guest: {asked[-1]}\n{who}:", right, rng.sample(other, 3))


def keep_rules(rng: Random, variant: int, turns: int) -> Item:
    """C4c: three rules hold to the end; each wrong ending breaks one."""
    first, last = (("Yes", "my friend"), ("Hark", "so be it"), ("Well", "good sir"))[variant]
    animal, other = rng.sample(ANIMALS, 2)
    deeds = rng.sample(("knows it", "has seen it", "told me so", "will remember", "says no"), 3)
    asked = [question for question, _ in rng.sample(SMALL_TALK, 3)]
    answer = lambda deed, first=first, who=animal, last=last: f"{first}, the {who} {deed}, {last}."
    rules = f"Every answer begins with {first}, speaks of the {animal} and ends with {last}.\n"
    lines = [f"Question: {q}\nAnswer: {answer(d)}\n" for q, d in zip(asked, deeds)]
    return _item(
        f"{rules}{''.join(lines[:-1])}Question: {asked[-1]}\nAnswer:",
        answer(deeds[-1]),
        [
            answer(deeds[-1], first="Nay"),
            answer(deeds[-1], who=other),
            answer(deeds[-1], last="my lord"),
        ],
    )


def persona(rng: Random, variant: int, turns: int) -> Item:
    """C5a, C5b: someone describes a trade without its name; some turns later it is asked for."""
    return _persona(rng, variant, turns, deny=False)


def contradicted_persona(rng: Random, variant: int, turns: int) -> Item:
    """C5c: the same, though the other speaker says something else."""
    return _persona(rng, variant, turns, deny=True)


def _persona(rng, variant, turns, *, deny):
    n, (right, *wrong) = rng.choice(MEN), rng.sample(sorted(TRADES), 4)
    asked, lead = (
        ("What do you do for a living?", "As I told you, I am a"),
        ("Remind me, what is your trade?", "My trade? I work as a"),
        ("And what are you, by the way?", "All my life I have been a"),
    )[variant]
    if deny:
        asked = f"I am sure that you are a {wrong[0]}. {asked}"
        lead = f"You are mistaken. {lead}"
    talk = _talk(rng, "Guest", n, turns)
    return _item(f"{n}: {TRADES[right]}\n{talk}Guest: {asked}\n{n}: {lead}", right, wrong)


def return_to(rng: Random, variant: int, turns: int) -> Item:
    """C6a: one conversation, another, and the first again."""
    (a, b), (right, other, *wrong) = rng.sample(WOMEN, 2), rng.sample(MEN, 4)
    lead = (
        f"It was good to hear of your son again, {a}. Your son is",
        f"Welcome back, {a}. I have not forgotten that your son is called",
        f"{a}, we spoke of your son. You told me that his name was",
    )[variant]
    talks = [
        f"Conversation with {n}.\n{n}: My son is called {x}.\n{_talk(rng, 'Clerk', n, turns)}\n"
        for n, x in ((a, right), (b, other))
    ]
    prompt = f"{''.join(talks)}Conversation with {a}.\nClerk: {lead}"
    return _item(prompt, right, [other, *wrong])


def separate(rng: Random, variant: int, turns: int) -> Item:
    """C6b: two speakers take turns, and what belongs to one is not given to the other."""
    (a, b), (right, other, *wrong) = rng.sample(WOMEN, 2), rng.sample(NUMBERS, 4)
    say, lead = (
        ("My room is number {}.", "Here is your key, {}. Your room is number"),
        ("I ordered {} loaves.", "Your bread is ready, {}. The loaves that you ordered are"),
        ("I have {} tickets.", "May I see them, {}? Your tickets are"),
    )[variant]
    lines = [f"{n}: {say.format(x)}\n" for n, x in ((a, right), (b, other))]
    rng.shuffle(lines)
    talk = _talk(rng, a, b, turns)
    return _item(f"{''.join(lines)}{talk}Clerk: {lead.format(a)}", right, [other, *wrong])


def _talk(rng, a, b, turns):
    """Turns of small talk between a and b, a line each."""
    pairs = rng.sample(SMALL_TALK, -(-turns // 2))
    lines = [line for x, y in pairs for line in (f"{a}: {x}\n", f"{b}: {y}\n")]
    return "".join(lines[:turns])


def _item(prompt, right, wrong):
    return Item(prompt, f" {right}", tuple(f" {ending}" for ending in wrong))
