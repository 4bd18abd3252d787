"""What can go wrong, as types. A message says what is wrong, where, and what to type."""


class UserError(ValueError):
    """A mistake of the user's. The command line prints the message alone and exits with 2."""


class ConfigError(UserError):
    """A setting that is unknown or out of bounds."""


class DataError(UserError):
    """Data that is missing, damaged or not what was asked for."""


class RunError(UserError):
    """A folder that is not a run, or a run that cannot do what was asked."""


class Locked(RunError):
    """Another process trains this run, or runs this study."""


class HubError(UserError):
    """A model that cannot be imported or exported."""


class NotApplicable(UserError):
    """This machine cannot do what the recipe asks for. The run is never silently made another way."""


class Stopped(Exception):
    """The run was asked to stop. All ranks raise it at the same place."""


class OutOfMemory(RuntimeError):
    """This rank ran out of memory, and the other ranks wait for it."""


class LostRank(RuntimeError):
    """The connection to another rank broke: that rank failed first, and its error says why."""
