"""Plain English words and names from which `pretrain_text.py` draws; no phrase of the quickstart's data."""

NOUNS = """apple answer arm artist baby bag ball band bank basket bath bean bed bell belt bench berry bicycle bill bird blanket
block board boat body bolt bone book boot bottle bowl box boy branch bread brick bridge brother brush bucket building bus
butter button cabin cabinet cable cake calendar camera camp candle cap car card carpet cart case cat cell chain chair cheese
chest chicken child church circle class clock cloth cloud club coat coffee coin collar color comb concert cook copy corn
corner cotton couch country course court cover cow cream crop crowd cup cupboard curtain customer dance daughter desk dial
dinner dish doctor dog doll door drawer drawing dream dress drink driver drum duck dust ear earth edge egg engine evening
event eye face factory family fan farm farmer father fence festival field finger fire fish flag flame floor flour flower folder
food foot forest fork form frame friend frog fruit game garden gate girl glass glove goat gold grain grape grass group
guest guide guitar gun hair hall hammer hand harbor hat head heart heater herb hill hole holiday home honey hook horse
hospital hotel hour house ice idea ink iron island jacket jar jewel juice kettle key kitchen kite knee knife knot label lady
lake lamp land lane leaf leather leg lemon lesson letter library lid light line lion lip list lock lunch machine magazine
magnet map market mask mat match meal measure meat medicine meeting member memory menu message metal milk mill mirror mixer
money monkey moon morning motor mountain mouse mouth movie mug museum music nail neck needle nest net night noise nose note
notebook novel nurse nut office oil onion orange order oven owner package page paint painting pan paper parcel parent park
part party passenger path patient peach pen pencil pepper phone photo piano picture pie pillow pilot pin pipe pizza plane
plant plate platform player pocket poem pond pool port post pot potato printer prize problem program pump puppet purse queen
question rabbit radio rail rain record recipe report request result rice ring river road rock roof room root rope rose
route rug sack salad sale salt sand scale school science scissors screen screw sea seal seat seed shade sheep sheet shelf
shell ship shirt shoe shop shoulder sign silk silver singer sink sister size skin skirt sky sleep smell smoke snake snow
soap sock sofa song sound soup space spoon spring square stage stair stamp star station statue status steam stem stick stone
store storm story stove street string student sugar suit summer sun supper surface swing switch table tail tank tape task
taste tax taxi tea teacher team tent test theater thread ticket tie tiger timber toe tool tooth tour towel tower town toy
track trade train tray treatment tree trick trip truck trumpet tube tune turkey turtle umbrella uncle uniform unit valley valve
van vase vegetable verse vessel village violin visit visitor voice wagon waiter wall watch water wave wax weather wedding
week weight wheel whip whistle window wine wing winter wire wolf woman wood wool word work worker yard year zoo action area
audit bar crack current damage defect die dock dust entity exit fault filter finding flow gas gauge gear guard hazard
history hose humidity inspection inspector instrument intent issue item leak level location log measurement notice number
operator owner period pallet press pressure quantity reading reject repair sample scope scrap scratch sensor shaft shift speed
spindle supplier supply temperature thickness torque vibration value weld zone""".split()

ADJECTIVES = """able angry bad bare big bitter black blue bold brave bright broken brown busy calm careful cheap clean clear clever
cold common cool cracked cruel dark dead deep dirty double dry dull early easy electric empty equal extra fair false fast fat
final fine first fixed flat folded free fresh frozen full gentle giant golden good gray green happy hard heavy high hollow hot huge
hungry inner kind large last late lazy left light little local long loose lost loud low lower lucky main missing modern
mild narrow new next nice noisy old open outer pale plain polite poor pretty private proud public purple quick quiet rare
raw ready red rich right ripe rough round royal rusty sad safe secret sharp short shy silent silver simple single slow small
smart smooth soft solid sour spare square steep sticky stiff stolen strange strong sudden sunny sweet tall tame thick thin
tight tiny tired torn upper usual warm weak wet white whole wide wild wise wooden wrong yellow young bent blocked bad burnt
chemical damaged faulty hydraulic leaking main mechanical metal rear rubber side steel stuck unsafe vacuum worn copper plastic""".split()

VERBS = """add ask bake bind borrow bring build buy call cancel carry change check choose clean climb collect compare cook copy
count cover cut deliver draw drop feed fetch fill find fold follow freeze give greet grow guess hang hide hire hold invite
keep lead lend lift load lock look mail make mark mend mix move name offer open pack paint park pay peel pick plan play pour
print pull push raise reach read receive remind remove rent repair reserve return ring roll save search seek sell send serve share
shut sing sort start stir stop store sweep take teach tell test throw tie track train translate trim turn update visit
wait walk warm warn wash weigh wipe wrap write book cancel confirm register measure order request close assign record set show
list report schedule log inspect note enter review finish get put replace""".split()

SITES = """Linden Hall|the green room|room 12|the lobby|platform 9|the old barn|Market Street|the west wing|the attic|table 6|
the river bank|Pine Road|the first floor|desk 21|the blue tent|harbor 3|the court|the playground|Oak Lane|the cellar|ward 5|
the reading room|the back yard|stage 2|the clinic|corner shop|gate 14|the chapel|shelf 30|the upper deck|Hill Street|the pool|
the music hall|row 8|the front desk|pier 11|seat 40|the cold store|the studio|field 16|the fish market|pen 4|kitchen 1|the stable|
aisle 13|box 22|the big gallery|the station|camp 10|the farm shop|track 17|the nursery|floor 3|the guest house|block F|terminal E|
deck C|wing D|the bakery|the orchard|the office|the south garden|unit 19|the meeting room""".replace("\n", "").split(
    "|"
)

FIRST = """Ada Alice Amir Ben Bella Boris Clare Cora Daisy Dora Edgar Elias Ella Eric Esther Eva Felipe Fiona Frank Gina Greta Hana
Harry Henry Ida Igor Isaac Iris Jack Jacob Jane Jorge Julia Kamal Karin Kate Lara Leo Lena Liam Lily Louis Luca Lydia Marco Mark
Mila Mona Nick Nina Noah Nora Oliver Otto Pia Quentin Rosa Ruth Ryan Sara Simon Stella Susan Tara Theo Tina Uma Vera Viola Walter
Will Xenia Yara Zoe Zara""".split()
LAST = """Adams Allen Baker Bauer Bell Bennett Blake Bond Carter Chang Cole Cook Cruz Daly Diaz Doyle Duval Ellis Engel Ferris
Fox Frost Gray Green Grant Hall Hart Hill Holm Hunt Irwin Jensen Keller King Klein Lambert Lane Lee Lewis Long Marsh Mason Mills Moss
Nash Nolan North Olsen Owen Page Park Perry Pierce Pope Price Ray Reed Rice Rose Ross Ryder Sanders Scott Shaw Singh Stone Swan
Tate Turner Vance Wade Walsh Ward West White Wood Wolf Wright York Young""".split()

MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
UNITS = "kg g mg l ml m cm mm km miles feet hours minutes seconds days C F K percent bar psi V A W dB Hz pages cups spoons points mm/s rpm l/min Nm kPa mA".split()
MEASURES = """weight length height width depth distance time speed price temperature pressure volume dose score age power level rate
noise flow size load angle humidity current torque vibration brightness delay charge""".split()
STATES = """open|closed|full|empty|ready|late|sold|lost|free|busy|clean|dirty|sick|well|asleep|awake|broken|fixed|cold|warm|done|out of stock|
cancelled|confirmed|paid|unpaid|on|off|present|absent|good|bad|accepted|refused|locked|hungry|in use|on hold|on the way|half full|sold out|
with sugar|under water|up to date|for sale|passing|hot|away|in bed|at home""".replace("\n", "").split("|")
CITIES = "Rome Berlin Lima Delhi Seoul Miami Dublin Athens Quito Perth Lyon Kyoto Denver Hanoi Tunis Vienna Zurich Porto Riga".split()

QUESTIONS = [
    ("Why do {nouns} {verb}?", "I am not sure why."),
    ("What is a {noun}?", "A {noun} is a kind of {noun2}."),
    ("Where can I find a {adj} {noun}?", "You can find one in {city}."),
    ("How do I {verb} a {noun}?", "First you {verb} it slowly."),
    ("Who made the {adj} {noun}?", "{name} made it."),
    ("Is the {noun} {adj}?", "Yes, it is {adj}."),
    ("How many {nouns} are in {city}?", "There are about {n}."),
    ("Do you like {nouns}?", "Yes, I like {nouns}."),
    ("What is {n} minus {m}?", "It is a number."),
    ("Tell me about {city}.", "{city} is a city."),
    ("When did {name} {verb} the {noun}?", "It was in {year}."),
    ("Can a {noun} {verb}?", "No, it can not."),
    ("How big is a {noun}?", "It is {adj}."),
    ("Which {noun} is better?", "The {adj} one."),
    ("What does {name} want?", "A {noun}."),
    ("Sing a song about a {noun}.", "The {noun} is {adj}."),
    ("I feel {adj} today.", "That is fine."),
    ("Let us talk about the {noun}.", "Good idea."),
    ("Could you explain the {noun}?", "It is {adj} and {adj2}."),
    ("What would {name} say about {nouns}?", "{name} would say they are {adj}."),
    ("My {noun} is {adj}, why?", "I do not know."),
    ("How was your trip to {city}?", "It was {adj}."),
    ("Which {nouns} do people like in {city}?", "The {adj} ones."),
    ("Should I {verb} my {noun} or {verb2} it?", "You should {verb2} it."),
    ("Who is {name}?", "{name} is a friend."),
]
PLAIN = [
    "The {adj} {noun} was near the {noun2}.",
    "{name} wants to {verb} the {noun} in {city}.",
    "There were {n} {nouns} and {m} {nouns2}.",
    "A {noun} is not a {noun2}.",
    "In {year}, {name} found a {adj} {noun}.",
    "{name} and {name2} {verb} the {adj} {nouns}.",
    "Every {noun} has a {noun2}.",
    "It is {adj} and {adj2}.",
    "The {noun} of {name} is {adj}, but the {noun2} is {adj2}.",
    "You can {verb} it with a {noun}.",
    "They did not {verb} the {noun} because it was {adj}.",
    "On {day} the {noun} is {adj}.",
    "{nouns}, {nouns2}, and a {adj} {noun}.",
    "We saw {n} {adj} {nouns} at {place}.",
    "The code of the {noun} is {id}.",
    "{id} and {id2} are {nouns}.",
    "It came out at {n} this {noun}, thanks to {name}.",
    "Somebody left the {noun} at {place}.",
]

# Syllables of words that do not exist.
ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl gr pl pr sh sl st th tr sp qu".split()
VOWELS = "a e i o u a e i o ai ea oo ou".split()
CODAS = ["", "", "", *"n r s t l m d k x ck nd st ng rt ll".split()]

# Type of a slot -> names that its key may have; an amount has two keys, for the number and for the unit.
KEYS = {
    "thing": "item object topic title subject product dish thing gift tool".split(),
    "problem": "problem symptom complaint cause reason damage wish".split(),
    "person": "guest patient driver student author customer player nurse name person who sender teacher".split(),
    "date": "day when start end deadline until arrival".split(),
    "span": "during range span since".split(),
    "id": "id code ref ticket box_id card seat_code number".split(),
    "place": "room place city where address stop shelf".split(),
    "count": "amount qty total size copies seats".split(),
    "task": "job duty todo goal plan".split(),
    "state": "state condition mood outcome".split(),
    "measure": "kind measure property".split(),
    "amount": ["reading unit_name", "amount unit_of", "much in_unit"],
}
# Type of a slot -> ways to say its value in a command.
PHRASES = {
    "thing": "a {}|the {}|about the {}|with {}|named {}|of the {}|{}|for a {}".split("|"),
    "problem": "because of {}|due to a {}|with a {}|that has a {}|showing a {}|reason {}|having {}|for {}".split("|"),
    "person": "for {}|by {}|with {}|to {}|from {}|{} will do it|ask {}|done by {}|of {}".split("|"),
    "date": "on {}|before {}|by {}|until {}|{}|for {}|no later than {}|due {}".split("|"),
    "span": "for {}|during {}|in {}|from {}|over {}".split("|"),
    "id": "{}|number {}|with code {}|of {}|for {}|on {}|to {}|ref {}|called {}".split("|"),
    "place": "in {}|at {}|near {}|to {}|next to {}|from {}|around {}|coming from {}".split("|"),
    "count": "{} pieces|{} times|quantity {}|{} units|{} of them|count {}|{}".split("|"),
    "task": "to {}|and {}|must {}|has to {}|will {}|task: {}".split("|"),
    "state": "as {}|is {}|now {}|is now {}|to {}|state {}|it was {}".split("|"),
    "measure": "the {}|{}|as {}|a {}|for {}".split("|"),
    "amount": "{}|of {}|is {}|at {}|reads {}".split("|"),
}
# Names of an answer's two fields: what to do, and with what.
SHAPES = [
    ("intent", "entities"),
    ("action", "args"),
    ("task", "slots"),
    ("function", "parameters"),
    ("name", "fields"),
    ("do", "with"),
    ("type", "data"),
]
# How a command begins: {v} is its schema's verb, {n} its noun, capitals open a sentence.
HEADS = (
    "{V} {n}|Please {v} the {n}|Can you {v} a {n}|{V} the {n}|I want to {v} a {n}|We need to {v} {n}|{V} one {n}|"
    "Could you {v} our {n}|{V}|It is time to {v} the {n}|Somebody should {v} the {n}|{N} to {v}:|The {n}|"
    "There is a {n}|We have a {n}|{N}:|I saw a {n}|My {n}|What {n}|Which {n} did we {v}||"
).split("|")
OPENERS = "|||||Hi, |Please: |Hello there, |One more: |Good day. |Sorry, |Dear all, |Note: ".split("|")
CLOSERS = "||||| Thanks.| Many thanks.| It is important.| Bye.".split("|")

# Natural sentences for some sets of slots, from homes, shops, schools, farms and travel.
FAMILIES: list[tuple[tuple[str, ...], list[str]]] = [
    (
        ("person", "task", "date"),
        [
            "{0} promised to {1} on {2}.",
            "Remind {0} to {1} {2}.",
            "Would {0} {1} before {2}?",
            "{0} is going to {1}, not later than {2}.",
            "On {2} {0} wants to {1}.",
            "My wish for {2}: {0} should {1}.",
            "Let {0} {1} until {2}.",
            "The cook told {0} to {1} by {2}.",
            "Tell {0}, who has to {1}, that {2} is the last day.",
            "It is up to {0} to {1}, {2} at the latest.",
        ],
    ),
    (
        ("id", "problem", "place"),
        [
            "Taxi {0} lost a {1} close to {2}.",
            "A {1} was spotted on bus {0} by {2}.",
            "{0} came back with a {1} along {2}.",
            "Guests say {0} got a {1} from {2}.",
            "Look at {0}, it has a {1} behind {2}.",
            "Tent {0} has {1} under {2}.",
            "Between {2} and the rest, {0} has a {1}.",
            "The {2} part of boat {0} got a {1}.",
            "Bike {0}, {1}, over by {2}.",
            "Someone heard a {1} from {2} in train {0}.",
        ],
    ),
    (
        ("id", "person", "date"),
        [
            "{1} will drive bus {0} {2}.",
            "Let {1} visit cow {0} on {2}.",
            "Bring ticket {0} to {1} by {2}.",
            "Could {1} look after {0} {2}?",
            "{2} is fine for {1} to see flat {0}.",
            "Make an appointment for {0} with {1}, {2}.",
            "{1} asked for room {0} on {2}.",
            "{0} goes to {1} on {2}.",
            "We expect {1} at cabin {0} {2}.",
            "On {2}, {1} plays song {0}.",
        ],
    ),
    (
        ("id", "measure", "amount"),
        [
            "Boat {0} has a {1} of {2}.",
            "The {1} of cow {0} was {2}.",
            "{0} came in with {2} of {1}.",
            "Write down {2} for the {1} of jar {0}.",
            "Cake {0}: {2} of {1}.",
            "{1} of parcel {0} is about {2}.",
            "We saw {2} on the {1} dial of {0}.",
            "At {0}, {1} went up to {2}.",
            "Now the {1} at {0} says {2}.",
            "Take {2} as {1} of dose {0}.",
        ],
    ),
    (
        ("thing", "count", "id"),
        [
            "Bring {1} {0} plates to table {2}.",
            "Guest {2} wants {1} of the {0}.",
            "Put {1} bags of {0} into truck {2}.",
            "Sell {2} a {0}, or better {1}.",
            "{2} is out of {0}, buy {1} more.",
            "Get a {0} for {2}, {1} if you can.",
            "Ship {2} with {1} boxes of {0}.",
            "Cabin {2} asked for {1} {0} sets.",
            "Pour {1} cups of {0} for {2}.",
            "For {2}: {1} times {0}.",
        ],
    ),
    (
        ("id", "state"),
        [
            "Room {0} is {1} again.",
            "Call ticket {0} {1}.",
            "From now on {0} counts as {1}.",
            "Make {0} {1}, please.",
            "Table {0} was {1}, I think.",
            "Tell everyone that {0} is {1}.",
            "Order {0} went out {1}.",
            "The game {0} ended {1}.",
            "Leave {0} {1}.",
            "Turn {0} to {1}.",
        ],
    ),
    (
        ("id", "count", "problem"),
        [
            "{1} eggs of box {0} came with {2}.",
            "Tray {0} lost {1} cakes to {2}.",
            "{2} in {1} pages of book {0}.",
            "Throw away {1} from {0}, they have {2}.",
            "We sent back {1} jars of {0}, {2}.",
            "In crate {0}, {1} apples show {2}.",
            "{2} on {1} shirts of order {0}.",
            "Count {1} {0} with {2}.",
            "Class {0}: {1} absent, {2}.",
            "{1} letters for {0} have {2}.",
        ],
    ),
    (
        ("id", "span"),
        [
            "Who rented {0} in {1}?",
            "How many guests did {0} have over {1}?",
            "Print the bookings of boat {0} for {1}.",
            "Read me the letters of {0} from {1}.",
            "Where was bus {0} in {1}?",
            "I would like the sales of shop {0} for {1}.",
            "When did {0} win during {1}?",
            "Find photos of {0} from {1}.",
            "What did {0} cost in {1}?",
            "Send the diary of ship {0} over {1}.",
        ],
    ),
    (
        ("problem", "place"),
        [
            "A {0} is waiting at {1}.",
            "Mind the {0} by {1}.",
            "{1} is full of {0}.",
            "Children found a {0} behind {1}.",
            "At {1} you will see a {0}.",
            "There was {0} all over {1}.",
            "Someone put a {0} into {1}.",
            "Look, a {0} in {1}!",
            "My dog smelled a {0} near {1}.",
            "Clear the {0} away from {1}.",
        ],
    ),
]
