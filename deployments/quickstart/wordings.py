"""What a manufacturing auditor says: intents, wordings and the pools of values they are filled from.

Every pool is a pair (train, test) that share no value; every intent's wordings are a pair (train, held out), and the
held-out ones occur in the test file only. `data.py` draws rows from here; nothing here is seen while the bases are
pre-trained.
"""

INTENTS: dict[str, tuple[str, ...]] = {
    "report_issue": ("machine", "issue", "component"),
    "schedule_inspection": ("machine", "inspector", "date"),
    "log_measurement": ("machine", "quantity", "value", "unit"),
    "request_part": ("part", "count", "machine"),
    "close_audit": ("audit", "result"),
    "assign_action": ("task", "owner", "date"),
    "record_defect": ("part_number", "defect", "count"),
    "set_status": ("machine", "status"),
    "show_history": ("machine", "period"),
    "report_hazard": ("hazard", "location"),
}
"""Intent -> its entity keys, in the order in which the answer gives them."""

WORDINGS: dict[str, tuple[list[str], list[str]]] = {
    "report_issue": (
        [
            "Found: {issue}, {component} of {machine}.",
            "While checking {kind} {machine} I found a {issue} on the {component}.",
            "{machine} again has a {issue}, look at the {component}.",
            "{kind} {machine} has a {issue} at the {component}.",
            "There is a {issue} on {machine}, coming from the {component}.",
            "{machine}: {issue} found near the {component}.",
            "I noticed a {issue} around the {component} of {kind} {machine}.",
            "The {component} on {machine} shows a {issue}.",
            "Report a {issue} in the {component} of {machine}.",
            "During the audit we saw a {issue} at the {component} of {machine}.",
            "Operators complain about a {issue} from the {component} on {kind} {machine}.",
            "{kind} {machine} stopped because of a {issue} in the {component}.",
            "Log a fault for {machine}: {component} with {issue}.",
        ],
        [
            "We found a {issue} on the {component} of {machine}.",
            "{machine} shows a {issue} at the {component} again.",
            "The audit of {kind} {machine} found a {issue} in the {component}.",
            "Fault on {machine}: there is a {issue} near the {component}.",
        ],
    ),
    "schedule_inspection": (
        [
            "We want an inspection of {machine} by {inspector}, {date}.",
            "Could {inspector} do the inspection of {kind} {machine} on {date}?",
            "Inspection for {machine}: {inspector}, {date}.",
            "Schedule an inspection of {machine} with {inspector} on {date}.",
            "Book {inspector} to inspect {kind} {machine} on {date}.",
            "{inspector} should inspect {machine} on {date}.",
            "Can you plan an inspection for {machine} on {date}? {inspector} will do it.",
            "Set up a safety inspection on {date} for {machine}, inspector {inspector}.",
            "On {date} we need {inspector} to check {kind} {machine}.",
            "Put {machine} on the inspection plan for {date} with {inspector}.",
            "The next inspection of {machine} is on {date}, done by {inspector}.",
            "Arrange for {inspector} to look at {machine} on {date}.",
        ],
        [
            "Plan an inspection of {kind} {machine} by {inspector} on {date}.",
            "Can {inspector} inspect {machine} on {date}?",
            "For {date}, schedule {inspector} to inspect {machine}.",
            "Please book an inspection on {date} for {kind} {machine}, done by {inspector}.",
        ],
    ),
    "log_measurement": (
        [
            "Save the {quantity} of {machine} as {value} {unit}.",
            "On {machine} the gauge shows {value} {unit} of {quantity}.",
            "{quantity} reading for {kind} {machine}: {value} {unit}.",
            "Log a {quantity} of {value} {unit} on {machine}.",
            "{machine} reads {value} {unit} {quantity}.",
            "The {quantity} of {kind} {machine} is {value} {unit}.",
            "Record {value} {unit} as the {quantity} for {machine}.",
            "Measured {quantity} on {machine}: {value} {unit}.",
            "{quantity} at {machine} came out at {value} {unit} this morning.",
            "I measured {value} {unit} for {quantity} on {kind} {machine}.",
            "Note that {machine} has a {quantity} of {value} {unit}.",
            "Enter the {quantity} reading {value} {unit} for {machine}.",
        ],
        [
            "Record a {quantity} of {value} {unit} for {kind} {machine}.",
            "The {quantity} reading on {machine} is {value} {unit}.",
            "{machine}: {quantity} measured at {value} {unit}.",
            "Log {value} {unit} as {quantity} of {machine}.",
        ],
    ),
    "request_part": (
        [
            "Request the part {part}, quantity {count}, for {kind} {machine}.",
            "A new {part} is needed on {machine}, order {count} pieces.",
            "Get me {count} pieces of {part} for {machine}.",
            "Order {count} {part} units for {machine}.",
            "We need {count} of the {part} for {kind} {machine}.",
            "Request {count} pieces of {part} for {machine}.",
            "{machine} needs a new {part}, please order {count}.",
            "Please get {count} spare {part} parts for {kind} {machine}.",
            "Send {count} pieces of the {part} to {machine}.",
            "Can you order the {part} for {machine}? Quantity {count}.",
            "For {machine} I want {count} units of {part} from the store.",
            "The store should deliver {count} {part} units to {machine}.",
        ],
        [
            "Please order {count} pieces of the {part} for {machine}.",
            "{kind} {machine} needs {count} units of {part}.",
            "Can you get {count} spare {part} parts for {machine}?",
            "Request a new {part} for {machine}, quantity {count}.",
        ],
    ),
    "close_audit": (
        [
            "Audit {audit} is done as {result}.",
            "Set audit {audit} to {result} and finish it.",
            "Close the audit {audit}: {result}.",
            "Close audit {audit} with result {result}.",
            "Audit {audit} is finished, the result is {result}.",
            "Mark audit {audit} as closed, outcome {result}.",
            "We are done with {audit}; close it as {result}.",
            "Please close {audit}, it was {result}.",
            "The result of audit {audit} is {result}, close it.",
            "Finish audit {audit} and set the outcome to {result}.",
            "{audit} can be closed as {result}.",
        ],
        [
            "Audit {audit} is done, close it with {result}.",
            "Set the result of {audit} to {result} and close the audit.",
            "Please finish audit {audit} as {result}.",
        ],
    ),
    "assign_action": (
        [
            "Action for {owner}: {task}, by {date}.",
            "{owner} is asked to {task} before {date}.",
            "The action to {task} goes to {owner}, due {date}.",
            "Assign {owner} to {task} by {date}.",
            "{owner} must {task} before {date}.",
            "Give {owner} the action to {task}, due {date}.",
            "Create an action for {owner}: {task} by {date}.",
            "Ask {owner} to {task} no later than {date}.",
            "Corrective action: {task}. Owner {owner}, due on {date}.",
            "By {date}, {owner} has to {task}.",
            "New task for {owner}, {task}, deadline {date}.",
            "The team decided that {owner} will {task} until {date}.",
        ],
        [
            "{owner} has to {task} by {date}.",
            "Assign the action to {task} to {owner}, due {date}.",
            "Create a task: {owner} must {task} before {date}.",
            "Ask that {owner} will {task}, deadline {date}.",
        ],
    ),
    "record_defect": (
        [
            "There are {count} rejected parts of {part_number} with {defect}.",
            "{count} units of part {part_number} are rejected for {defect}.",
            "Due to {defect} we lost {count} pieces of {part_number}.",
            "Record {count} parts of {part_number} with {defect}.",
            "{count} pieces of part {part_number} have {defect}.",
            "Part {part_number}: {count} rejects due to {defect}.",
            "We rejected {count} of {part_number} because of {defect}.",
            "Log {defect} on {count} pieces of {part_number}.",
            "Found {defect} on {count} samples of part {part_number}.",
            "Lot {part_number} has {count} bad parts, reason {defect}.",
            "Scrap {count} units of {part_number} for {defect}.",
            "{defect} seen on part {part_number}, {count} pieces.",
        ],
        [
            "{count} parts of {part_number} were rejected for {defect}.",
            "Log {count} bad pieces of part {part_number} due to {defect}.",
            "We found {count} units of {part_number} with {defect}.",
            "Part {part_number} has {defect} on {count} samples.",
        ],
    ),
    "set_status": (
        [
            "{machine} status is now {status}.",
            "Update the status: {kind} {machine} is {status}.",
            "Please note that {machine} is {status}.",
            "Set {machine} to {status}.",
            "Mark {kind} {machine} as {status}.",
            "{machine} is now {status}.",
            "Change the status of {machine} to {status}.",
            "Please update {machine}, it is {status} since this morning.",
            "Status of {kind} {machine}: {status}.",
            "As of today {machine} is {status}.",
            "Put {machine} into the list as {status}.",
        ],
        [
            "The status of {machine} is now {status}.",
            "Update {kind} {machine} to {status}.",
            "Please mark that {machine} is {status}.",
        ],
    ),
    "show_history": (
        [
            "Show all repairs on {kind} {machine} from {period}.",
            "Which audits did {machine} have during {period}?",
            "Give me everything on {machine} for {period}.",
            "Show the history of {machine} for {period}.",
            "List all audits of {kind} {machine} from {period}.",
            "What happened on {machine} during {period}?",
            "Give me the records of {machine} over {period}.",
            "Which findings did we have on {machine} in {period}?",
            "I want to see all repairs of {machine} in {period}.",
            "Pull up the log of {kind} {machine} for {period}.",
            "How often did {machine} fail in {period}?",
        ],
        [
            "Show me all findings on {machine} for {period}.",
            "Which repairs did {kind} {machine} have in {period}?",
            "Give me the history of {machine} from {period}.",
        ],
    ),
    "report_hazard": (
        [
            "In {location} we found a {hazard}.",
            "Please note a {hazard} at {location}.",
            "Hazard in {location}: {hazard}.",
            "There is a {hazard} in {location}.",
            "Safety hazard: {hazard} at {location}.",
            "I saw a {hazard} near {location}.",
            "Report a {hazard} in {location}, somebody could get hurt.",
            "Watch out, {hazard} at {location}.",
            "We have a {hazard} next to {location}, please act.",
            "{location} has a {hazard}.",
            "Somebody left a {hazard} in {location}.",
        ],
        [
            "Please report a {hazard} near {location}.",
            "We saw a {hazard} at {location} this morning.",
            "In {location} there is a {hazard}.",
        ],
    ),
}

OPENERS = ["", "", "", "", "", "Please note: ", "Hello, ", "Audit note: ", "Hi team, ", "Quick one: "]
CLOSERS = ["", "", "", "", "", "", " Thanks.", " Thank you.", " It is urgent."]

# Closed lists: the answer can only be one of these, so both files share them.
STATUS = ["running", "down", "idle", "locked out", "under repair", "in standby", "ready", "blocked"]
RESULT = ["passed", "failed", "passed with remarks", "conditional", "not applicable", "rejected"]
UNITS = {
    "temperature": ["C", "F"],
    "pressure": ["bar", "psi", "kPa"],
    "vibration": ["mm/s", "g"],
    "spindle speed": ["rpm"],
    "torque": ["Nm"],
    "noise level": ["dB"],
    "oil level": ["percent", "mm"],
    "flow rate": ["l/min"],
    "humidity": ["percent"],
    "current": ["A", "mA"],
}
KINDS = [
    "Lathe",
    "Press",
    "Milling machine",
    "Surface grinder",
    "Robot",
    "Conveyor",
    "Welder",
    "Saw",
    "Compressor",
    "Furnace",
]
