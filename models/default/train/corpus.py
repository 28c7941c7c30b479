"""Synthetic chat corpus: dialogues whose later turns depend on earlier ones.

dialogue(rng, split, turns=..., chars=...) -> list of (role, text)

Every value (name, town, word, code, ...) belongs to one of two splits.  Fresh
spellings are split by CRC32 (a tenth is held out); real names, towns and colours
have explicit held-out lists.  Split "train" never shows a held-out value, split
"test" shows nothing else, so a recall probe always asks for an unseen value.

Each question form has ONE right answer, which makes greedy replies checkable.
"""
import json
import random
import zlib


def words(text):
    return text.split()


# ---------------------------------------------------------------- value stocks

# (weight, onsets, vowels, codas): several spelling styles, so that copying does not lean on one
STYLES = [
    (5, words("b c d f g h j k l m n p r s t v w z br cr dr fr gr tr st sh ch th kl pr fl gl bl sk") + [""],
     words("a e i o u a e i o ai ea ee io ou y"), words("n r l s m d t k x z v th nd rn lk ss") + [""] * 8),
    (3, words("q qu x z j v w y zh kh ph wh sch cz ts kn gw rh vl zr") + [""],
     words("a e i o u ia ie au oo uu ae"), words("x q z ck rt mp nk ll tt rd sk ft w y gh ng") + [""] * 4),
    (2, words("k s t n h m r y w g d b p sh ch ts ky ry"), words("a i u e o a i u e o"), ["n"] + [""] * 5),
    (2, words("b c d f g l m n p r s t v z br gr st tr qu"), words("a e i o a e i o ia io"), words("n r l s") + [""] * 3),
    (2, words("b d f g h j k l m n p r s t v å bj fj gj hj st sv tr þ š ž č ł ñ ç"),
     words("a e i o u å ä ö ø é í ó ú á ü ê ã ı ő"), words("n r l s k t nd rg ld ß ń") + [""] * 4),
]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

FIRST = words("""James Mary John Linda Robert Susan Michael Karen David Nancy William Lisa Richard Betty Joseph Helen Thomas
Sandra Daniel Donna Paul Carol Mark Ruth George Sharon Kevin Laura Brian Emma Anna Peter Alice Oscar Lucas Maria Elena Sofia
Hugo Nora Ivan Olga Omar Layla Ahmed Fatima Chen Wei Yuki Hana Raj Priya Arjun Diego Carlos Luis Ana Marta Jonas Greta Felix
Clara Max Leo Mia Zoe Eva Adam Noah Liam Ethan Jack Henry Grace Chloe Amy Sam Tom Ben Kate Jane Rose Ella Lily Ruby Jake Luke
Ryan Sean Erik Lars Ingrid Astrid Xavier Xenia Quinn Queenie Zelda Zara Zachary Yusuf Vera Victor Wendy Walter Ursula Umberto
Theo Tessa Stella Simon Rita Rafael Petra Pablo Otto Olivia Nina Nadia Miguel Mila Louis Lena Klaus Kira Julia Jorge Isla Igor
Heidi Hector Gina Frida Franz Esther Emil Dora Dario Cora Cyrus Bruno Bianca Arthur Agnes Ada Alan Edsger Barbara Donald
Margaret Dennis Ken Bjarne Linus Jürgen Zoë Renée José André Chloé Søren Björk Łukasz Núria Åsa Óscar Inés Anaïs""")
LAST = words("""Smith Jones Brown Taylor Wilson Davies Evans Walker Wright Green Hall Wood Clark Lewis Young King Scott Baker
Adams Nelson Carter Mitchell Parker Collins Murphy Cook Bell Cooper Ward Gray Watson Brooks Kelly Sanders Price Bennett Ross
Foster Long Hughes Miller Garcia Lopez Perez Silva Santos Costa Rossi Ricci Weber Wagner Becker Schulz Koch Novak Kovacs
Nagy Ivanov Petrov Tanaka Sato Suzuki Kim Park Lee Nguyen Tran Khan Singh Patel Sharma Mehta Ali Hassan Larsen Hansen Berg
Lund Müller Köhler Gómez Núñez Sørensen Lovelace Hopper Turing Knuth Quirk Quick Xu Zhang Zimmerman Voss Yates O'Brien O'Hara""")
HELD_FIRST = words("""Dmitri Beatrice Rowan Sigrid Mateo Keiko Amara Tobias Yvonne Bjorn Camila Quentin Farah Wilhelm Zainab
Percy Odette Ravi Minerva Casper Imogen Alejandro Beatrix Xiomara Ezekiel Philippa Saoirse Quincy Zuzana Thaddeus""")
HELD_LAST = words("Thornbury Okafor Vasquez Lindqvist Abernathy Fitzgerald Quimby Zhou Nakamura Oyelaran Castellano Haddad")
CITIES = words("""Paris London Berlin Madrid Rome Tokyo Lisbon Vienna Oslo Dublin Prague Athens Cairo Lima Toronto Chicago
Boston Seattle Denver Austin Sydney Delhi Seoul Warsaw Zurich Geneva Milan Porto Leeds Bergen Munich Hamburg Cologne Lyon
Marseille Naples Turin Seville Glasgow Cardiff Antwerp Ghent Rotterdam Basel Graz Brno Gdansk Riga Tallinn Vilnius Kyiv Odessa
Istanbul Ankara Tehran Mumbai Pune Lagos Accra Tunis Xiamen Quebec Phoenix Dallas Miami Portland Málaga Zürich Göteborg""") + [
    "New York", "San Francisco", "Los Angeles", "Cape Town", "Hong Kong", "São Paulo", "Buenos Aires", "Mexico City"]
HELD_CITIES = words("""Reykjavik Zagreb Quito Havana Kyoto Utrecht Bristol Montreal Nairobi Valencia Bergamo Jakarta Krakow
Malmö Tromsø Ljubljana Casablanca Auckland Winnipeg Salzburg""")
COLOURS = words("""red blue green yellow purple orange pink black white brown gray grey silver gold teal violet crimson navy
maroon indigo turquoise beige cyan magenta olive ivory lilac plum rust coral lime tan azure bronze""")
HELD_COLOURS = words("chartreuse amber mauve ochre scarlet lavender emerald burgundy cobalt saffron khaki fuchsia vermilion sepia")
FOODS = words("""pizza pasta soup bread rice salad cheese curry sushi pancakes noodles apples tacos dumplings waffles stew beans
toast ramen pie""")
ANIMALS = words("dog cat rabbit hamster parrot horse turtle goldfish lizard ferret snake pony duck goat mouse")
WILD = words("fox bear owl wolf deer lion tiger whale eagle frog otter crow penguin squirrel hedgehog")
JOBS = words("""teacher baker doctor nurse pilot farmer painter lawyer engineer driver writer singer plumber carpenter chef
librarian dentist gardener programmer architect""")
HOBBIES = words("""chess reading swimming running painting dancing cooking gardening fishing hiking skating knitting cycling
singing sailing climbing drawing surfing""")
NOUNS = words("""apple river stone lamp window garden bridge castle forest candle mountain mirror pencil basket button cloud
engine feather hammer island jacket kettle ladder marble needle ocean paper queen ribbon saddle table umbrella valley wagon yard
zebra anchor bottle camera desert eagle flower guitar helmet iron jungle key lemon magnet nest orange pillow quilt rocket sailor
tunnel violin whistle tiger planet shadow silver copper winter summer thunder meadow harbor lantern compass drum coin tree star
moon fire water wind snow leaf bell book chair door glass knife plate spoon road ship train clock brick rope wheel""")
HELD = {w.lower() for w in HELD_FIRST + HELD_LAST + HELD_CITIES + HELD_COLOURS}


def allowed(value, split):
    """Does this fresh spelling belong to the split?"""
    v = value.lower()
    if v in HELD:
        return split == "test"
    return (zlib.crc32(v.encode()) % 10 == 0) == (split == "test")


def fresh(r, split, lo=2, hi=3):
    """A made-up word."""
    while True:
        if r.random() < .06:
            w = "".join(r.choice(ALPHABET) for _ in range(r.randint(3, 6)))
        else:
            _, on, vo, co = r.choices(STYLES, [s[0] for s in STYLES])[0]
            w = "".join(r.choice(on) + r.choice(vo) + r.choice(co) for _ in range(r.randint(lo, hi)))
        if 3 <= len(w) <= 11 and allowed(w, split):
            return w


def one_name(r, split, stock, held):
    if split == "test":
        return r.choice(held) if r.random() < .4 else fresh(r, split).capitalize()
    return r.choice(stock) if r.random() < .3 else fresh(r, split).capitalize()


def first_name(r, split):
    return one_name(r, split, FIRST, HELD_FIRST)


def full_name(r, split):
    """One to three words, now and then with a hyphen."""
    v, k = first_name(r, split), r.random()
    if k < .04:
        v += "-" + first_name(r, split)
    elif k < .09:
        v += " " + first_name(r, split)
    if r.random() < .35:
        v += " " + one_name(r, split, LAST, HELD_LAST)
    return v


def city(r, split):
    v = one_name(r, split, CITIES, HELD_CITIES)
    if r.random() < .06:
        v = r.choice(["New", "Old", "Saint", "Port", "San", "North", "Lake"]) + " " + fresh(r, split).capitalize()
    return v


def word(r, split):
    return fresh(r, split) if split == "test" or r.random() < .55 else r.choice(NOUNS)


def listed(r, split, stock, p_fresh=.3):
    return fresh(r, split) if r.random() < p_fresh else r.choice(stock)


def colour(r, split):
    return r.choice(HELD_COLOURS) if split == "test" else listed(r, split, COLOURS, .35)


def number(r, split, digits=None):
    while True:
        d = digits or r.choice([1, 2, 2, 3, 4, 4, 5, 6])
        v = str(r.randint(10 ** (d - 1) if d > 1 else 0, 10 ** d - 1))
        if d < 3 or allowed(v, split):
            return v


def code(r, split):
    k = r.random()
    if k < .3:
        return number(r, split, r.choice([3, 4, 4, 5, 6]))
    if k < .45:
        return word(r, split) + number(r, split, 2)
    if k < .6:
        return fresh(r, split).upper()
    if k < .75:
        return fresh(r, split, 1, 2).upper() + "-" + number(r, split, r.choice([2, 3, 4]))
    if k < .88:
        return "-".join(word(r, split) for _ in range(r.randint(2, 3)))
    return "".join(r.choice(ALPHABET.upper()) if r.random() < .5 else str(r.randint(0, 9)) for _ in range(r.randint(4, 6)))


def proper(r, split):
    return fresh(r, split).capitalize()


# ----------------------------------------------------------------------- facts

# "my X is Y": attributes of one line mean the same and are used interchangeably in questions
GENERIC = [
    ("favorite color|favourite colour|favourite color|favorite colour", colour, 4),
    ("lucky number|favorite number|favourite number", number, 2),
    ("favorite food|favourite food", lambda r, s: listed(r, s, FOODS), 2),
    ("favorite animal|favourite animal", lambda r, s: listed(r, s, ANIMALS + WILD), 1),
    ("favorite city|favourite city", city, 1), ("hometown|home town", city, 1),
    ("secret word|magic word", word, 1), ("favorite word|favourite word", word, 1), ("password", code, 1),
    ("passphrase", code, 1), ("wifi password", code, 1), ("locker code", code, 1), ("door code", code, 1),
    ("access code", code, 1), ("pin|PIN|pin code", lambda r, s: number(r, s, 4), 1), ("room number", number, 1),
    ("house number", number, 1), ("seat number", number, 1), ("ticket number", code, 1), ("order number", code, 1),
    ("flight number", code, 1), ("phone number", lambda r, s: number(r, s, 6), 1), ("project name", proper, 1),
    ("team name|team", proper, 1), ("company|company name", proper, 1), ("boss", full_name, 1), ("manager", full_name, 1),
    ("doctor", full_name, 1), ("teacher", full_name, 1), ("best friend", full_name, 1), ("sister", first_name, 1),
    ("brother", first_name, 1), ("mother", first_name, 1), ("father", first_name, 1), ("neighbor", full_name, 1),
    ("cousin", first_name, 1), ("daughter", first_name, 1), ("son", first_name, 1), ("wife", first_name, 1),
    ("husband", first_name, 1), ("favorite book|favourite book", proper, 1), ("favorite game|favourite game", proper, 1),
    ("favorite song|favourite song", proper, 1), ("favorite band|favourite band", proper, 1),
    ("hobby", lambda r, s: listed(r, s, HOBBIES), 1), ("favorite drink|favourite drink", word, 1),
    ("last name|surname", lambda r, s: one_name(r, s, LAST, HELD_LAST), 1), ("nickname", first_name, 1),
    ("username|user name", lambda r, s: fresh(r, s) + (number(r, s, 2) if r.random() < .4 else ""), 1),
    ("street", proper, 1), ("school", proper, 1), ("birthday", lambda r, s: r.choice(words(
        "January February March April May June July August September October November December")) + f" {r.randint(1, 28)}", 1),
]
GENERIC = [(names.split("|"), make, weight) for names, make, weight in GENERIC]
GENERIC_WEIGHTS = [g[2] for g in GENERIC]

NAME_Q = """What is my name?|What's my name?|Do you remember my name?|Who am I?|Tell me my name.|Can you tell me my name?
What did I say my name was?|Do you know my name?|What am I called?|What was my name again?|Please say my name.|whats my name
What is my name, please?|So, what is my name?|Do you still know my name?|And what is my name?|What name did I give you?
Could you tell me my name?|How am I called?|Say my name.|Do you know who I am?|Which name did I tell you?""".replace("\n", "|").split("|")
CITY_Q = """Where do I live?|What city do I live in?|Do you remember where I live?|Where am I from?|Which city do I live in?
What is my city?|In which town do I live?|What town do I live in?|Where is my home?|What's my city?|Do you know where I live?
Tell me where I live.|In which city do I live?|Can you tell me where I live?|where do i live again?|And where do I live?""".replace("\n", "|").split("|")


class Fact:
    """What the user says, the reply to it, and the questions about it (all with one answer)."""

    def __init__(self, kind, key, value, say, ack, ask, answer, update=None, updated=None):
        self.kind, self.key, self.value, self.say, self.ack = kind, key, value, say, ack
        self.ask, self.answer, self.update, self.updated = ask, answer, update, updated

    def question(self, r):
        q = r.choice(self.ask)
        return q, self.answer(q) if callable(self.answer) else self.answer


KINDS = [("name", 24), ("city", 12), ("age", 4), ("job", 4), ("like", 4), ("pet", 9), ("remember", 12), ("other", 6), ("gen", 32)]


def an(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def make_fact(r, split, kind=None, group=None, low=False):
    """Makes one fact; `low` writes the whole statement in lower case (the value too)."""
    kind = kind or r.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
    lc = (lambda x: x.lower()) if low else (lambda x: x)
    pick = r.choice
    if kind == "name":
        v = lc(full_name(r, split) if r.random() < .75 else first_name(r, split))
        say = pick([f"My name is {v}."] * 4 + [f"I am {v}.", f"I'm {v}.", f"Call me {v}.", f"Hi, my name is {v}.", f"Hello, I am {v}.",
                   f"Hello! My name is {v}.", f"Hi, I'm {v}.", f"You can call me {v}.", f"My name is {v}, nice to meet you.",
                   f"Hey, {v} here.", f"Please remember that my name is {v}.", f"Remember my name: {v}.", f"This is {v}.",
                   f"Hi there! I'm {v}.", f"Good morning, my name is {v}.", f"The name is {v}.", f"My name's {v}.",
                   f"People call me {v}.", f"Hello, my name is {v}. Please remember it.", f"I am called {v}."])
        upd = pick([f"Actually, my name is {v}.", f"Sorry, my name is {v}.", f"My name is now {v}.", f"Please call me {v} instead.",
                    f"I changed my name to {v}.", f"No, my name is {v}.", f"From now on my name is {v}."])
        return Fact(kind, "name", v, lc(say), f"Nice to meet you, {v}!", NAME_Q, f"Your name is {v}.", lc(upd), f"All right, your name is now {v}.")
    if kind == "city":
        v = lc(city(r, split))
        say = pick([f"I live in {v}."] * 4 + [f"I am from {v}.", f"My home is in {v}.", f"I live in a town called {v}.", f"My city is {v}.",
                   f"I moved to {v}.", f"I'm from {v}.", f"I live in the city of {v}.", f"I come from {v}.",
                   f"Please remember that I live in {v}.", f"I am living in {v}."])
        upd = pick([f"I moved to {v}.", f"I live in {v} now.", f"Actually, I live in {v}.", f"Now I live in {v}.", f"I have moved to {v}."])
        return Fact(kind, "city", v, lc(say), f"I will remember that you live in {v}.", CITY_Q, f"You live in {v}.", lc(upd), f"All right, you live in {v} now.")
    if kind == "age":
        v = str(r.randint(5, 99))
        say = pick([f"I am {v} years old.", f"I'm {v} years old.", f"My age is {v}.", f"I am {v}."])
        upd = pick([f"Now I am {v} years old.", f"Actually, I am {v} years old.", f"I turned {v} today."])
        return Fact(kind, "age", v, lc(say), f"I will remember that you are {v} years old.",
                    ["How old am I?", "What is my age?", "Do you remember my age?", "Tell me my age.", "Do you know how old I am?", "What's my age?"],
                    f"You are {v} years old.", lc(upd), f"All right, you are {v} years old now.")
    if kind == "job":
        v = listed(r, split, JOBS, .2)
        say = pick([f"I work as {an(v)}.", f"I am {an(v)}.", f"My job is {v}.", f"I'm {an(v)}."])
        return Fact(kind, "job", v, lc(say), f"I will remember that you work as {an(v)}.",
                    ["What is my job?", "What do I do?", "What do I do for work?", "What's my job?", "Do you remember my job?", "What do I work as?"],
                    f"You work as {an(v)}.", f"Now I work as {an(v)}.", f"All right, you work as {an(v)} now.")
    if kind == "like":
        v = listed(r, split, HOBBIES + FOODS)
        say = pick([f"I like {v}.", f"I love {v}.", f"I really like {v}.", f"I enjoy {v}."])
        return Fact(kind, "like", v, lc(say), f"I am glad that you like {v}.",
                    ["What do I like?", "What do I love?", "Do you remember what I like?", "What do I enjoy?"], f"You like {v}.")
    if kind == "pet":
        v, a = lc(first_name(r, split)), pick(ANIMALS)
        say = pick([f"I have {an(a)} named {v}.", f"I have {an(a)} called {v}.", f"My {a} is called {v}.", f"My {a}'s name is {v}.",
                    f"The name of my {a} is {v}.", f"My {a} is named {v}."])
        return Fact(kind, "pet", v, lc(say), f"{an(a).capitalize()} called {v}, how nice!",
                    [f"What is my {a} called?", f"What is my {a}'s name?", f"What is the name of my {a}?", f"Do you remember the name of my {a}?",
                     f"What's my {a}'s name?", "What is the name of my pet?", "What is my pet called?", f"What's the name of my {a}?",
                     f"Do you remember my {a}'s name?", f"How is my {a} called?", f"Tell me the name of my {a}."], f"Your {a} is called {v}.")
    if kind == "remember":
        n = group or pick(["word", "word", "number", "code", "code word"])
        v = {"word": word, "number": number, "code": code, "code word": lambda r, s: word(r, s) if r.random() < .5 else fresh(r, s).upper()}[n](r, split)
        say = pick([f"Remember the {n} {v}.", f"Please remember the {n} {v}.", f"Remember this {n}: {v}.", f"The secret {n} is {v}.",
                    f"The {n} is {v}.", f"Keep this {n} in mind: {v}.", f"Don't forget the {n} {v}.", f"The {n} is: {v}"])
        return Fact(kind, "remember:" + n, v, say, f"I will remember the {n} {v}.",
                    [f"What is the {n}?", f"What was the {n}?", f"What {n} did I ask you to remember?", f"Which {n} did I tell you?",
                     f"Tell me the {n}.", f"Do you remember the {n}?", f"What is the secret {n}?", f"What was the {n} again?", f"What's the {n}?"],
                    f"The {n} is {v}.", f"The {n} is now {v}.", f"All right, the {n} is now {v}.")
    if kind == "other":
        who, t = first_name(r, split), r.random()
        if t < .4:
            v = city(r, split); say, ask, ans = f"{who} lives in {v}.", [f"Where does {who} live?"], f"{who} lives in {v}."
        elif t < .6:
            v = pick(JOBS); say, ask, ans = f"{who} is {an(v)}.", [f"What is {who}'s job?", f"What does {who} do?"], f"{who} is {an(v)}."
        elif t < .8:
            v = listed(r, split, HOBBIES + FOODS); say, ask, ans = f"{who} likes {v}.", [f"What does {who} like?"], f"{who} likes {v}."
        else:
            v = str(r.randint(5, 99)); say, ask, ans = f"{who} is {v} years old.", [f"How old is {who}?"], f"{who} is {v} years old."
        say = pick([say, say, f"My friend {say}", f"Remember that {say}"])
        return Fact(kind, "other:" + who, v, say, "I will remember that " + ans, ask, ans)
    names, mk, _ = next(g for g in GENERIC if g[0] == group) if group else r.choices(GENERIC, GENERIC_WEIGHTS)[0]
    attr, v = pick(names), lc(mk(r, split))
    say = pick([f"My {attr} is {v}."] * 4 + [f"Remember that my {attr} is {v}.", f"Please remember that my {attr} is {v}.", f"By the way, my {attr} is {v}.",
               f"Just so you know, my {attr} is {v}.", f"Note that my {attr} is {v}.", f"Also, my {attr} is {v}.", f"my {attr} is {v}"])
    upd = pick([f"My {attr} is now {v}.", f"Actually, my {attr} is {v}.", f"Sorry, my {attr} is {v}.", f"I changed my {attr} to {v}."])
    asks, table = [], {}
    for a in names + [attr] * 3:
        for q in (f"What is my {a}?", f"What is my {a}?", f"What's my {a}?", f"Do you remember my {a}?", f"Tell me my {a}.", f"What was my {a}?",
                  f"Can you tell me my {a}?", f"What did I say my {a} was?", f"Do you know my {a}?", f"What was my {a} again?", f"whats my {a}"):
            asks.append(q); table[q] = a
    return Fact("gen", "gen:" + names[0], v, lc(say), f"I will remember that your {attr} is {v}.", asks,
                lambda q: f"Your {table[q]} is {v}.", lc(upd), f"All right, your {attr} is now {v}.")


def not_told(r, used):
    """A question about a fact that was never stated."""
    names, _, _ = r.choices(GENERIC, GENERIC_WEIGHTS)[0]
    a = r.choice(names)
    options = [("name", r.choice(NAME_Q), "You have not told me your name yet."), ("city", r.choice(CITY_Q), "You have not told me where you live."),
               ("age", "How old am I?", "You have not told me your age."), ("job", "What is my job?", "You have not told me your job."),
               ("gen:" + names[0], r.choice([f"What is my {a}?", f"What's my {a}?", f"Do you remember my {a}?"]), f"You have not told me your {a}.")]
    options = [o for o in options if o[0] not in used]
    return r.choice(options)[1:] if options else None


# ------------------------------------------------------------- other exchanges

WHO = "I am Mainstay's small built-in model. I can chat a little and remember what you tell me."
CAN = "I can remember facts that you tell me, repeat text, make short lists, write small JSON objects and tell short stories."
SMALL = "I am too small to know that."
FIXED = [(q.split("|"), a) for q, a in [
    ("Hello.|Hi.|Hi there!|Hello!|Hey.|Good morning.|Good evening.|Hey there.|Hello there.|Hi|hello|hi|hey|Good afternoon.|Greetings.", "Hello! How can I help you today?"),
    ("How are you?|How are you doing?|How is it going?|How do you feel?|Are you well?|how are you|How's it going?", "I am doing well, thank you. How can I help you?"),
    ("Thank you.|Thanks!|Thanks a lot.|Thank you very much.|Great, thanks.|Thanks|thank you|thanks|Thank you!|Many thanks.", "You are welcome!"),
    ("Goodbye.|Bye.|See you later.|Bye bye.|Good night.|I have to go.|bye|Goodbye!|thanks, bye|See you.", "Goodbye! Come back any time."),
    ("OK.|Okay.|I see.|Good.|Nice.|Great.|Cool.|ok|Yes.|No.", "Is there anything else that I can do for you?"),
    ("Who are you?|What are you?|What is your name?|Are you a human?|Are you a robot?|Introduce yourself.|Tell me about yourself.|who are you|What's your name?|Who made you?|What model are you?|Which model is this?", WHO),
    ("What can you do?|Help.|Help me.|What do you know?|How can you help me?|What are you good at?|what can you do|help", CAN),
    ("How do sessions work?|What is a session?|How do you remember things?|Will you forget me?|What happens if the server restarts?|Do you remember me after a restart?",
     "The server keeps the state of our conversation on disk. After a restart it loads that state and we can go on."),
    ("How do I load a bigger model?|How do I use another model?|Can I use a better model?|How do I change the model?", "Start the server with the path of another model."),
    ("Is my data safe?|Where is my data stored?|Do you send my data away?", "Everything stays on your own computer."),
    ("Tell me a joke.|Do you know a joke?|Make me laugh.|tell me a joke", "Why did the computer go to the doctor? Because it had a virus."),
    ("What are the days of the week?|List the days of the week.|Name the days of the week.", "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."),
    ("What are the seasons?|Name the four seasons.", "The four seasons are spring, summer, autumn and winter."),
    ("What are the months of the year?|List the months.", "January, February, March, April, May, June, July, August, September, October, November and December."),
]]
CAPITALS = dict(x.split(":") for x in words("""France:Paris Germany:Berlin Spain:Madrid Italy:Rome Japan:Tokyo Portugal:Lisbon
Austria:Vienna Norway:Oslo Ireland:Dublin Greece:Athens Egypt:Cairo Peru:Lima England:London Poland:Warsaw India:Delhi"""))
OPPOSITES = dict(x.split(":") for x in words("""hot:cold big:small up:down left:right day:night good:bad happy:sad fast:slow
new:old light:dark open:closed full:empty hard:soft rich:poor early:late high:low long:short wet:dry clean:dirty"""))
GROUPS = {"fruits": words("apple banana orange pear grape lemon"), "colors": words("red blue green yellow purple orange"),
          "animals": ANIMALS[:6], "cities": CITIES[:6], "vegetables": words("carrot potato onion tomato cabbage pea"),
          "planets": words("Mercury Venus Earth Mars Jupiter Saturn")}
COUNT = {2: "two", 3: "three", 4: "four", 5: "five"}
VERBS = words("build fix cook paint sell clean grow open move draw find buy learn repair")
TOPICS = words("""physics history music politics love war gravity football biology chemistry art law medicine space time religion
economics grammar weather climate cars airplanes computers money health sleep energy philosophy mathematics democracy""")


def unknown(r, split):
    """Requests that are beyond this model."""
    w, n, t, v, pick = word(r, split), proper(r, split), r.choice(TOPICS), r.choice(VERBS), r.choice
    return pick([
        f"What is the meaning of {t}?", f"Explain {t}.", f"Explain {t} to me.", f"What do you think about {t}?", f"Tell me about {t}.",
        f"Who is the president of {n}?", f"What is the weather in {n}?", f"What is the weather today?", "What time is it?", "What is the news?",
        f"Write me an essay about {t}.", f"Write a poem about the {w}.", f"Write a poem about {t}.", f"Translate {w} to French.", f"How do I {v} a {w}?", f"How do you {v} a {w}?",
        f"Why is the {w} so big?", f"Why is {t} important?", f"How far is it to {n}?", f"Who wrote {n}?", f"When was {n} born?", f"When did {t} begin?",
        f"What is a {w}?", f"What does {w} mean?", f"Who invented the {w}?", f"How many people live in {n}?", f"How many {w}s are there?", f"What is the capital of {n}?",
        f"Should I buy a {w}?", f"Can you {v} my {w}?", f"Write code for a {w}.", f"Write a Python program about {t}.", f"Summarize {t}.", f"How does a {w} work?", f"How does {t} work?",
        "What is the meaning of life?", f"What is {r.randint(11, 99)} times {r.randint(11, 99)}?", f"What is the square root of {r.randint(2, 99)}?", f"Where is {n}?",
        f"Which is better, {w} or {t}?", f"Recommend a book about {t}.", f"What happened in {r.randint(1500, 2020)}?", f"Is {t} true?", f"Can you explain {t}?", f"Give me a recipe for {w}."]), SMALL


def echo(r, split):
    k = r.random()
    if k < .7:
        text = " ".join(word(r, split) for _ in range(r.randint(1, 6)))
    elif k < .85:
        text = code(r, split)
    else:
        text = full_name(r, split) + (" " + word(r, split) if r.random() < .5 else "")
    return r.choice([f"Repeat after me: {text}", f"Say {text}", f"Repeat: {text}", f"Echo {text}", f"Please say: {text}", f"Repeat the words {text}",
                     f"Say: {text}", f"Repeat this: {text}"]), text


def story(r, split):
    a, n, thing = r.choice(ANIMALS + WILD), first_name(r, split), r.choice(NOUNS)
    friend = r.choice([x for x in ANIMALS + WILD if x != a])
    q = r.choice([f"Tell me a story about {an(a)}.", f"Tell me a short story about {an(a)} named {n}.", f"Write a story about {an(a)} called {n}."])
    if n not in q:
        n = r.choice(FIRST[:40])
    place = r.choice(["forest", "garden", "village", "valley", "old castle", "small house"])
    return q, (f"Once upon a time there was {an(a)} named {n}. {n} lived in {an(place)}. "
               + r.choice([f"One day {n} found a {thing} under a tree. ", f"One morning {n} lost a {thing} and looked for it everywhere. "])
               + f"A friendly {friend} came to help. " + r.choice(["Together they went home and had dinner. ", "They talked for a long time and became friends. "])
               + f"From that day on {n} was {r.choice(['happy', 'very proud', 'not alone any more'])}.")


def little(r, split):
    """Sums of small numbers, lists, counting, JSON, capitals, opposites."""
    k, pick = r.random(), r.choice
    if k < .2:
        a, b = r.randint(0, 9), r.randint(0, 9)
        return pick([f"What is {a} plus {b}?", f"What is {a} + {b}?", f"{a} + {b}", f"{a}+{b}", f"How much is {a} plus {b}?"]), f"{a} plus {b} is {a + b}."
    if k < .4:
        g, n = pick(list(GROUPS)), r.randint(2, 5)
        xs = GROUPS[g][:n]
        if r.random() < .7:
            return pick([f"List {COUNT[n]} {g}.", f"Name {COUNT[n]} {g}.", f"Give me {COUNT[n]} {g}.", f"List {n} {g}."]), "\n".join(f"{i + 1}. {x}" for i, x in enumerate(xs))
        return f"List {n} {g} as JSON.", json.dumps(xs)
    if k < .5:
        a, b = r.randint(1, 5), pick([6, 7, 8, 9, 10, 12, 15, 20])
        return pick([f"Count from {a} to {b}.", f"Please count from {a} to {b}."]), ", ".join(map(str, range(a, b + 1)))
    if k < .75:
        n, v, c, t = first_name(r, split), r.randint(5, 99), city(r, split), r.random()
        if t < .4:
            return pick([f"Write a JSON object with name {n} and age {v}.", f"Make JSON: name {n}, age {v}.", f"Give me JSON with name {n} and age {v}."]), json.dumps({"name": n, "age": v}, ensure_ascii=False)
        if t < .7:
            return pick([f"Write a JSON object with name {n} and city {c}.", f"Make JSON: name {n}, city {c}."]), json.dumps({"name": n, "city": c}, ensure_ascii=False)
        w, x = word(r, split), word(r, split)
        return pick([f"Make JSON with key {w} and value {x}.", f"Write JSON with key {w} and value {x}."]), json.dumps({w: x}, ensure_ascii=False)
    if k < .88:
        c = pick(list(CAPITALS))
        return pick([f"What is the capital of {c}?", f"Name the capital of {c}.", f"What's the capital of {c}?"]), f"The capital of {c} is {CAPITALS[c]}."
    c = pick(list(OPPOSITES))
    return pick([f"What is the opposite of {c}?", f"Opposite of {c}?"]), f"The opposite of {c} is {OPPOSITES[c]}."


def something(r, split):
    """Open-ended requests: many answers are right, so that sampling at temperature 1 gives different texts."""
    q = r.choice(["Say something.", "Say something", "Say anything.", "Tell me something.", "Tell me anything.", "Talk to me.", "Surprise me.",
                  "Say something nice.", "Tell me something new.", "Chat with me.", "Go on.", "What is on your mind?"])
    a, b, n = r.choice(ANIMALS + WILD), r.choice(ANIMALS + WILD), r.choice(FIRST[:40])
    thing, place = r.choice(NOUNS), r.choice(["forest", "garden", "village", "valley", "old castle", "small house"])
    c, d = r.choice(GROUPS["colors"]), r.choice(["morning", "evening", "night", "day"])
    feel = r.choice(["happy", "proud", "quiet", "curious", "brave", "kind"])
    return q, r.choice([
        lambda: f"The {a} and the {b} are good friends.", lambda: f"I saw {an(a)} in the {place} today.",
        lambda: f"There is {an(c)} {thing} in the {place}.", lambda: f"It is {an(feel)} {d} in the {place}.",
        lambda: f"{n} has {an(a)} and {an(c)} {thing}.", lambda: f"Every {d} the {a} walks to the {place}.",
        lambda: f"Once {an(a)} lost {an(thing)}. The {b} found it again.", lambda: f"My friend {n} likes the {c} {thing}.",
        lambda: f"Do you like the color {c}? I do.", lambda: f"The {thing} is {c} and the {a} is {feel}.",
        lambda: f"Did you know that {n} lives in the {place} with {an(b)}?", lambda: f"Nothing is as {feel} as {an(a)} in the {d}."])()


def misc(r, split, copying=False):
    """One exchange that depends on nothing before it."""
    k = r.random()
    if not copying and k > .93:
        return something(r, split)
    if copying or k < .22:
        return echo(r, split)
    if k < .47:
        qs, a = r.choice(FIXED)
        return r.choice(qs), a
    if k < .70:
        return unknown(r, split)
    if k < .77:
        return story(r, split)
    return little(r, split)


# ------------------------------------------------------------------- dialogues

SYSTEM = ["You are a helpful assistant.", "You are a small assistant. Answer briefly.", "Be polite.", "You remember what the user tells you.",
          "You are a helpful assistant. Answer in one sentence.", "Be concise.", "You are Mainstay.", "Answer the questions of the user."]
TOOLS = words("get_weather search calculator lookup now send_mail read_file translate get_price find_user play_music set_timer")


def tool_use(r, split):
    """A list of tools, one call, its result."""
    names = r.sample(TOOLS, r.randint(1, 3))
    if r.random() < .5:
        names[0] = fresh(r, split) + "_" + r.choice(NOUNS)
    t = r.choice(names)
    out = [("system", "You can use these tools:" + "".join(f"\n- {n}" + (f": {r.choice(VERBS)} the {word(r, split)}" if r.random() < .6 else "") for n in names))]
    key, val = r.choice(["city", "query", "name", "text", "id", word(r, split)]), r.choice([word, city, first_name])(r, split)
    call = json.dumps({"name": t, "arguments": {key: val}}, ensure_ascii=False)
    result = " ".join(word(r, split) for _ in range(r.randint(1, 4)))
    return out + [("user", r.choice([f"Call {t} with {key} {val}.", f"Use {t} with {key} {val}.", f"Run the tool {t} with {key} {val}."])),
                  ("assistant", f"<tool_call>{call}</tool_call>"), ("tool", result), ("assistant", f"The tool says: {result}")]


def vary(r, text, low_ok=True):
    """Small changes to what the user typed that keep its meaning."""
    if r.random() < .12 and text[-1] in ".?!":
        text = text[:-1]
    k = r.random()
    if low_ok and k < .10:
        return text.lower()
    if k < .14:
        text = r.choice(["So, ", "Well, ", "Hey, ", "OK, ", "Please: "]) + text
    return text


def dialogue(r, split="train", turns=None, chars=None, copying=False):
    """About `turns` exchanges, or at least `chars` characters."""
    out, known, asked = [], {}, 0
    if chars is None and r.random() < .03:
        out = tool_use(r, split)
        return out
    if r.random() < .15:
        out.append(("system", r.choice(SYSTEM)))
    turns = turns or r.randint(1, 9)
    p_fact = r.choice([.15, .35, .5]) if chars is None else r.choice([.08, .15, .3])
    p_ask = .35 if chars is None else r.choice([.2, .35])
    low = r.random() < .12                         # somebody who types everything in lower case
    size, i = 0, 0
    while (size < chars) if chars else (i < turns):
        i += 1
        k, new = r.random(), []
        if k < p_fact:
            fs = [f for f in (make_fact(r, split, low=low) for _ in range(2 if r.random() < .15 else 1))]
            fs = [f for j, f in enumerate(fs) if f.key not in known and f.key not in [g.key for g in fs[:j]]]
            if not fs:
                old = r.choice(list(known.values()))
                f = make_fact(r, split, old.kind, next((g[0] for g in GENERIC if "gen:" + g[0][0] == old.key), None) or (old.key[9:] if old.kind == "remember" else None), low)
                if f.update and f.key == old.key:
                    known[f.key] = f
                    new = [("user", vary(r, f.update, False)), ("assistant", f.updated)]
                else:
                    continue
            else:
                for f in fs:
                    known[f.key] = f
                says = [f.say for f in fs]
                if len(says) == 2 and r.random() < .4 and says[0].endswith(".") and says[1].startswith(("My ", "I ")):
                    says = [says[0][:-1] + " and " + (says[1] if says[1].startswith("I ") else "my" + says[1][2:])]
                new = [("user", vary(r, " ".join(says), False)), ("assistant", " ".join(f.ack for f in fs))]
                if r.random() < .03:
                    q, a = fs[-1].question(r)
                    new = [("user", " ".join(says) + " " + q), ("assistant", a)]
        elif k < p_fact + p_ask and known:
            if r.random() < .10:
                f = r.choice(list(known.values()))
                kind, group = f.kind, next((g[0] for g in GENERIC if "gen:" + g[0][0] == f.key), None) or (f.key[9:] if f.kind == "remember" else None)
                g = make_fact(r, split, kind, group, low)
                if g.update and g.key == f.key:
                    known[g.key] = g
                    new = [("user", vary(r, g.update, False)), ("assistant", g.updated)]
            if not new:
                f = r.choice(list(known.values())) if r.random() < .7 or "name" not in known else known["name"]
                q, a = f.question(r)
                if low and f.kind != "other":
                    q = q.lower() if f.kind != "gen" else q
                new = [("user", vary(r, q, f.kind not in ("other",))), ("assistant", a)]
        elif k < p_fact + p_ask + .04:
            x = not_told(r, known)
            if x:
                new = [("user", vary(r, x[0])), ("assistant", x[1])]
        if not new:
            q, a = misc(r, split, copying and r.random() < .7)
            new = [("user", q if a == q or a in q else vary(r, q, a == SMALL)), ("assistant", a)]
        out += new
        size += sum(len(t) for _, t in new)
    if known and r.random() < .7:
        f = r.choice(list(known.values()))
        q, a = f.question(r)
        out += [("user", vary(r, q, f.kind != "other")), ("assistant", a)]
    return out


def render(messages):
    """The training text; equals the chat template without tools."""
    return "".join(f"<|{role}|>{text}<|end|>" for role, text in messages)


# ---------------------------------------------------------------------- probes

COLOUR_GROUP = GENERIC[0][0]
PROBE_KINDS = {"name": dict(kind="name"), "city": dict(kind="city"), "colour": dict(kind="gen", group=COLOUR_GROUP), "pet": dict(kind="pet"),
               "word": dict(kind="remember", group="word"), "code": dict(kind="remember", group="code")}


def probe(r, kind, between, chars=0, split="test"):
    """One recall test -> (user turns with reference replies, question, value).

    Between the statement and the question stand `between` exchanges: from two of them on,
    one states another fact, the rest are unrelated.  `chars` adds exchanges up to that length.
    """
    f = make_fact(r, split, **PROBE_KINDS[kind])
    turns = [(f.say, f.ack)]
    slots = ["fact"] * (between >= 2) + ["misc"] * (between - (between >= 2))
    r.shuffle(slots)
    while slots or sum(len(q) + len(a) for q, a in turns) < chars:
        if slots and slots.pop() == "fact" or not slots and chars and r.random() < .1:
            g = make_fact(r, split)
            while g.key == f.key or g.value == f.value:
                g = make_fact(r, split)
            turns.append((g.say, g.ack))
        else:
            turns.append(misc(r, split))
    return turns, f.question(r)[0], f.value


if __name__ == "__main__":
    rng = random.Random(0)
    for _ in range(6):
        print(render(dialogue(rng)).replace("<|end|>", "<|end|>\n"), "=====", sep="\n")
