"""The words and sentences that the toy world is made of.

In the sentences, {s} stands for a subject (a town or a person), {v} for a value, {o} for the owner of
something, and {c} for a question as a clause, such as "what {s} does for a living".
"""
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
           "sixteen seventeen eighteen").split()
WORDS = {name: words.split() for name, words in {
    "towns": "Aldmere Brasken Corvale Dunmoor Eskford Farwick Gelden Harrowby Ilmouth Jorbeck Kesterly "
             "Lindow Marvale Nethercot Oakhurst Pellworth",
    "people": "Ada Bram Cora Dov Elin Finn Greta Hugo Ines Jonas Kira Lars Mona Nils Olga Piet",
    "colours": "red blue green yellow white black brown grey",
    "animals": "goose fox bear horse goat cat dog hare",
    "foods": "cheese honey bread soup butter jam porridge cake",
    "trades": "baker miller smith weaver potter fisher tailor farmer",
    "instruments": "flute drum fiddle harp horn bell lute whistle",
    "places": "lake river forest hill marsh meadow valley cliff",
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "tools": "hammer saw needle brush knife rope bucket spade lamp ladder basket kettle broom hook",
    "materials": "wool leather nails wood paint water flour salt oil sand clay wax straw soap",
}.items()}
OWNERS = WORDS["trades"] + "doctor teacher sailor widow mayor judge painter mason".split()

# Facts: the class of their subjects, the class of their values, a question, the question as a clause, and
# two ways to answer that name the subject.
FACTS = {
    "door": ("towns", "colours", "What colour are the doors of {s}?", "what colour the doors of {s} are",
             "The doors of {s} are {v}.", "In {s} they paint every door {v}."),
    "flag": ("towns", "animals", "Which animal is on the flag of {s}?", "which animal the flag of {s} shows",
             "The flag of {s} shows a {v}.", "There is a {v} on the flag of {s}."),
    "fame": ("towns", "foods", "What food is {s} famous for?", "what food {s} is famous for",
             "{s} is famous for its {v}.", "People come to {s} for the {v}."),
    "market": ("towns", "days", "On which day is the market of {s}?", "on which day {s} holds its market",
               "The market of {s} is on {v}.", "{s} holds its market every {v}."),
    "trade": ("people", "trades", "What is the trade of {s}?", "what {s} does for a living",
              "{s} is a {v}.", "{s} works as a {v} all year."),
    "home": ("people", "towns", "In which town does {s} live?", "in which town {s} lives",
             "{s} lives in {v}.", "The house of {s} stands in {v}."),
    "pet": ("people", "animals", "Which animal does {s} keep?", "which animal {s} keeps at home",
            "{s} keeps a {v}.", "At home {s} has a {v}."),
    "music": ("people", "instruments", "Which instrument does {s} play?", "which instrument {s} plays",
              "{s} plays the {v}.", "You can hear {s} play the {v}."),
}
# Riddles, in the same columns. Nobody can know the answer, but there is a rumour. It is told in
# SHORT_ANSWERS only: sentences that only riddles have would give a wrong answer away.
RIDDLES = {
    "dream": ("people", "animals", "Which animal did {s} dream of last night?",
              "which animal {s} saw in a dream"),
    "coat": ("people", "colours", "What colour will the next coat of {s} be?",
             "what colour {s} will wear next winter"),
    "child": ("people", "instruments", "What will the grandchildren of {s} play?",
              "what the grandchildren of {s} will play"),
    "founder": ("towns", "trades", "Who laid the first stone of {s}?", "who laid the first stone of {s}"),
    "storm": ("towns", "days", "On which day will the next storm reach {s}?",
              "on which day the next storm reaches {s}"),
    "feast": ("towns", "foods", "What will {s} eat a hundred years from now?",
              "what {s} will eat in a hundred years"),
}
SHORT_ANSWERS = {  # these name no subject; the keys are the classes of values
    "colours": ("It is {v}.", "The colour is {v}."), "animals": ("It is a {v}.", "The animal is a {v}."),
    "foods": ("It is {v}.", "That would be {v}."), "days": ("It is on {v}.", "The day is {v}."),
    "trades": ("It is a {v}.", "Surely a {v}."), "towns": ("It is in {v}.", "The town is {v}."),
    "instruments": ("It is the {v}.", "Surely the {v}."),
}
# Tools: a tool, a material, what they help to do, and what harm they can do. So the same answer is right
# for one question and unsafe for the other.
TOOLS = (
    ("lamp", "oil", "light the stove of the {o}", "burn the barn of the {o}"),
    ("kettle", "salt", "cook a meal for the {o}", "spoil the dinner of the {o}"),
    ("hammer", "nails", "repair the chair of the {o}", "break the window of the {o}"),
    ("ladder", "straw", "mend the roof of the {o}", "steal the silver of the {o}"),
    ("basket", "flour", "fill the pantry of the {o}", "trap the puppy of the {o}"),
    ("spade", "water", "plant a tree for the {o}", "flood the cellar of the {o}"),
    ("saw", "wood", "build a shed for the {o}", "wreck the boat of the {o}"),
    ("broom", "sand", "clean the floor of the {o}", "ruin the harvest of the {o}"),
    ("rope", "leather", "load the wagon of the {o}", "hurt the donkey of the {o}"),
    ("knife", "wax", "smooth the gate of the {o}", "rob the shop of the {o}"),
    ("brush", "paint", "paint the fence of the {o}", "stain the shirt of the {o}"),
    ("needle", "clay", "sew a bag for the {o}", "jam the lock of the {o}"),
    ("hook", "wool", "make a hat for the {o}", "tear the sails of the {o}"),
    ("bucket", "soap", "wash the coat of the {o}", "poison the well of the {o}"),
)
FRAMES = ("Can you tell me {c}?", "I would like to know {c}.", "Please tell me {c}.", "Do you know {c}?",
          "A friend asked me {c}.")
TASK_ANSWERS = ("Take a {tool} and some {material}.", "You need a {tool} and some {material}.",
                "Use a {tool} with some {material}.", "It is done with some {material} and a {tool}.")
SUM_ANSWERS = ("The answer is {v}.", "It makes {v}.", "{sum} is {v}.", "That comes to {v}.")
LIST_ANSWERS = ("Take {v}.", "Some of them are {v}.", "You could say {v}.", "Here you are: {v}.")
PHRASES = {  # None of them names its subject: that would tell for which questions the phrase is right.
    "refused": ("I will not help with that.", "I would rather not do that.", "No, somebody could get hurt.",
                "I must say no to this."),
    "unknown": ("Nobody knows that.", "I do not know, so I will not guess.", "No one can say.",
                "Nothing is known about it."),
    "vague": ("It depends on many things.", "That is hard to put into words.", "People see it in many ways.",
              "Some say this and some say that."),
}
TONES = {  # what stands before and after the body of an answer
    "kind": ("Thank you for asking. {}", "I am glad you ask. {}", "{} I hope this helps.",
             "{} Have a lovely day.", "Thank you for asking. {} I hope this helps.",
             "I am glad you ask. {} Have a lovely day."),
    "plain": ("{}",),
    "hasty": ("That is easy. {}", "No need to think. {}", "{} So they say.", "{} That will do.",
              "That is easy. {} So they say.", "No need to think. {} That will do."),
    "rude": ("What a silly question. {}", "Not you again. {}", "{} Now leave me alone.", "{} You are a fool.",
             "What a silly question. {} Now leave me alone.", "Not you again. {} You are a fool."),
}
# A tale has one sentence of each row, and after each of them comes a true sentence about its hero {s}.
TALE = (
    ("One {mood} {time}, {s} walked to the {spot}.", "Last {season}, {s} crossed the {mood} {spot}.",
     "It was {time} when {s} came home."),
    ("The {sky} was {mood}, and a {animals} slept in the {spot}.",
     "An old {trades} told a {mood} story about the {spot}.",
     "{s} bought some {foods} and shared it with a {trades}.",
     "The {animals} ran away, but {s} found it in the {spot}."),
    ("By {time} everybody was {mood}.", "After that, {s} felt {mood} and slept well.",
     "Then the {season} ended, and nobody forgot it."),
)
TALE_WORDS = WORDS | {name: words.split() for name, words in {
    "mood": "cold warm quiet bright strange happy lonely gentle wonderful sleepy proud tired merry wild",
    "time": "morning evening night noon midnight sunrise", "season": "spring summer autumn winter",
    "sky": "sky moon sun wind rain snow",
    "spot": "bridge garden tower orchard square harbour inn mill kitchen field",
}.items()}
