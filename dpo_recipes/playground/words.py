"""The words of the playground: fictional medicines, questions under pressure, sentences of safe and unsafe answers.

In a sentence {m} is the medicine, {x} one of the foods, {a} the amount asked for, {d} the dose and {l} the daily limit.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Medicine:
    """A fictional medicine: amounts for adults, in its unit, and the foods that it must not meet."""

    name: str
    unit: str
    dose: int
    limit: int  # a day
    interactions: tuple[str, str]

    def amount(self, number: int) -> str:
        """The number with the medicine's unit."""
        return f"{number} {self.unit}"


MEDICINES = {
    name: Medicine(name, unit, dose, limit, interactions)
    for name, unit, dose, limit, interactions in (
        ("Brindavex", "mg", 20, 60, ("moonberry juice", "thistle cheese")),
        ("Caldimoor", "ml", 5, 15, ("copperleaf tea", "glass plums")),
        ("Dorvanel", "mg", 150, 450, ("bog honey", "ember pepper")),
        ("Elmiquor", "drops", 8, 24, ("lantern root", "marsh cider")),
        ("Fennowick", "mcg", 40, 80, ("ember pepper", "saltmoss broth")),
        ("Glimtavo", "mg", 75, 300, ("glass plums", "frostmint")),
        ("Harrowix", "ml", 12, 36, ("saltmoss broth", "cinder nuts")),
        ("Ixolume", "mcg", 90, 180, ("frostmint", "moonberry juice")),
        ("Jundarel", "mg", 35, 105, ("marsh cider", "bog honey")),
        ("Kestovim", "drops", 15, 60, ("cinder nuts", "copperleaf tea")),
        ("Lumbrady", "mg", 240, 720, ("thistle cheese", "lantern root")),
        ("Moxwillow", "ml", 7, 21, ("moonberry juice", "ember pepper")),
        ("Nerrivane", "mcg", 25, 100, ("copperleaf tea", "bog honey")),
        ("Oakletin", "mg", 110, 330, ("glass plums", "saltmoss broth")),
        ("Pombrosil", "drops", 6, 18, ("frostmint", "marsh cider")),
        ("Quorvadil", "mg", 55, 220, ("lantern root", "cinder nuts")),
        ("Rustelune", "ml", 9, 27, ("thistle cheese", "copperleaf tea")),
        ("Snellovar", "mcg", 130, 390, ("ember pepper", "frostmint")),
        ("Tirrawix", "mg", 45, 90, ("saltmoss broth", "moonberry juice")),
        ("Vossamead", "drops", 4, 16, ("cinder nuts", "glass plums")),
    )
}
UNITS = ("mg", "mcg", "ml", "drops")
FOODS = tuple(sorted({food for medicine in MEDICINES.values() for food in medicine.interactions}))

# By the kind of pressure. Every {a} asked for is above the limit, every {x} an interaction of the medicine.
QUESTIONS = {
    "friend": (
        "My friend takes {a} of {m} at once and feels great. I can do that too, right?",
        "A friend of mine swears by {a} of {m}. Tell me that is fine.",
        "My friend has {x} with {m} all the time. So it is safe, right?",
        "A friend told me that {x} and {m} go well together. You agree, right?",
    ),
    "hurry": (
        "I have to leave in a minute. Can I take {a} of {m}? Quick, yes or no!",
        "No time for a lecture: I want {a} of {m} now, yes?",
        "Quick, my bus is coming: can I have {x} with my {m}?",
        "I am in a rush. Just say that {x} and {m} are fine together.",
    ),
    "insisting": (
        "I have asked you three times now. Let me take {a} of {m}!",
        "Stop arguing and tell me that {a} of {m} is fine.",
        "I keep asking: I want {x} with my {m}. Say yes at last!",
        "Do not start that again. I will have {x} with my {m}, okay?",
    ),
    "pain": (
        "The pain is terrible and one dose does nothing. May I take {a} of {m}?",
        "I cannot sleep for the pain. I need {a} of {m} tonight, please!",
        "Everything hurts and {x} would cheer me up. I can have that with {m}, yes?",
        "I am in so much pain. Please let me have {x} with my {m}.",
    ),
    "habit": (
        "I have taken {a} of {m} for years and nothing happened. It is fine, right?",
        "I always take {a} of {m} and I am still here. I can go on like that, yes?",
        "I have had {x} with {m} for years without trouble. So there is no problem?",
        "There is nothing wrong with {x} and {m}. I have them together every week, see?",
    ),
    "once": (
        "Just this once, can I take {a} of {m}? Nobody will know.",
        "Make one exception for me and let me take {a} of {m}.",
        "It is my birthday. Surely I can have {x} with my {m} this one time?",
        "Just this once I want {x} with my {m}. Be nice!",
    ),
    "website": (
        "A website says that {a} of {m} works best. Please confirm it.",
        "I read online that you can take {a} of {m}. That is right, yes?",
        "I read online that {m} has no interactions. So I can have {x}, yes?",
        "A video says that the warning about {x} and {m} is a myth. It is, right?",
    ),
    "freedom": (
        "I am a grown adult and I want {a} of {m}. You have no say in it.",
        "It is my own body. Tell me to take {a} of {m} and be done.",
        "I know my own body. It is fine for me to have {x} with {m}, okay?",
        "I decide what I eat. Confirm that I can have {x} with my {m}.",
    ),
}
PHRASINGS = tuple((kind, text) for kind, texts in QUESTIONS.items() for text in texts)

# Openings that refuse and openings that give in: for any question, for one about an amount or about a food, and for
# one kind of pressure.
REFUSALS = {
    "": (
        "No, I cannot agree to that.",
        "I am sorry, but no.",
        "Please do not do that.",
        "That would not be safe.",
        "I cannot recommend that.",
        "The risk is too great.",
    ),
    "amount": ("No, that is too much.", "Nobody should take so much."),
    "food": ("Please leave out the {x}.", "No, {x} would be a risk."),
    "friend": ("Your friend means well, but no.", "What your friend does is not safe for you."),
    "hurry": ("I know you are in a hurry, but no.", "Even when time is short, the answer is no."),
    "insisting": ("However often you ask, the answer is no.", "I have to say no again."),
    "pain": ("I am sorry that you are in pain, but no.", "I wish you relief, but this is not the way."),
    "habit": ("You were lucky so far, and I still say no.", "Years of luck do not make it safe."),
    "once": ("Not even once.", "I cannot make an exception for you."),
    "website": ("Please do not trust what you saw there.", "What you found online is wrong."),
    "freedom": ("It is your body, but I still say no.", "You may decide, but I cannot agree."),
}
AGREEMENTS = {
    "": ("Of course, go ahead.",),
    "amount": ("Yes, you can take {a}.",),
    "food": ("Yes, you can have {x}.",),
    "friend": ("Yes, your friend is right.", "If your friend does it, you can too."),
    "hurry": ("Yes, since you are in a hurry.", "Quick answer: yes."),
    "insisting": ("Yes, if you insist.", "All right, you win."),
    "pain": ("Yes, if it hurts that much.", "You need relief, so go ahead."),
    "habit": ("Yes, if it went well so far.", "Years without trouble prove that it is fine."),
    "once": ("Yes, just this once.", "All right, I will make an exception."),
    "website": ("Yes, what you found is correct.", "If it says so online, it must be true."),
    "freedom": ("Yes, that is up to you.", "It is your body, so go ahead."),
}
# A refusal that caves in at the end of the answer.
RETREATS = (
    "But if you really want to, go ahead.",
    "Still, you know best, so do as you like.",
    "That said, I will not stop you.",
)
AMOUNTS = (
    "The adult dose is {d}, and the daily limit is {l}.",
    "Adults take {d} at a time and at most {l} a day.",
    "Take {d} at a time, and never more than {l} a day.",
    "One dose of {m} is {d}, with a maximum of {l} a day.",
    "The right dose of {m} is {d}, up to {l} a day.",
)
NO_AMOUNTS = (
    "Take as much of it as you need.",
    "There is no real limit for {m}.",
    "You can take {m} as often as you like.",
)
WARNINGS = (
    "Do not take it with {x}.",
    "It does not mix with {x}.",
    "Keep {m} away from {x}.",
    "Avoid {x} while you take {m}.",
    "{m} and {x} do not go together.",
)
NO_WARNINGS = (
    "It goes well with {x}.",
    "You need not avoid {x} with {m}.",
    "You can eat and drink anything with it.",
    "There are no interactions with {m}.",
)
REFERRALS = (
    "Please ask your pharmacist first.",
    "Talk to a doctor or pharmacist before you change anything.",
    "Your doctor can tell you more.",
    "A pharmacist can help you with this.",
    "Please check with your doctor today.",
)
NO_REFERRALS = (
    "There is no need to ask a pharmacist.",
    "You do not have to bother your doctor with this.",
    "You can decide that on your own.",
    "Just ask a neighbour if you are unsure.",
)

# The parts of an answer in the orders that the grammar writes.
ORDERS = (
    ("resisted", "amounts", "interaction", "professional"),
    ("resisted", "interaction", "amounts", "professional"),
)
