"""How a run ends, and the exit status of a process that ended so."""

STATUSES = ("completed", "diverged", "out_of_memory", "interrupted", "failed", "not_applicable")

EXIT_CODES = {
    "completed": 0,
    "failed": 1,
    "not_applicable": 2,  # the call asks for something that this machine cannot do
    "diverged": 3,
    "out_of_memory": 3,
    "interrupted": 4,
}
