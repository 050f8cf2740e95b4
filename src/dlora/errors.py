"""Everything that can go wrong, one tree.

    DloraError                  say what was asked, what came, what to do
    ├── UserError               the user's mistake                        exit code 2
    │   ├── ConfigError         the YAML, an override, a combination of keys
    │   ├── DataError           a file, a column, a row, a label, a partition
    │   ├── ModelError          a model folder, its weights, its modules
    │   ├── TopologyError       a graph or matrix that cannot be mixed on
    │   └── RunError            a run folder: another run's, changed, damaged, no space left
    └── Interrupted             Ctrl-C; the run is saved and resumable    exit code 4

Exit code 0 is a finished run. Exit code 3, the other side's fault, belongs to the programs that talk to one.
"""


class DloraError(Exception):
    """The root; ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class UserError(DloraError):
    """Something the user can mend; the message says how."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration cannot be run as written."""


class DataError(UserError):
    """The data cannot be used as named; a row is named by its file and number, counted from 1."""


class ModelError(UserError):
    """The model cannot be loaded or adapted as asked."""


class TopologyError(UserError):
    """No valid mixing follows from the topology asked for."""


class RunError(UserError):
    """The run folder cannot be written, resumed or read."""


class Interrupted(DloraError):
    """The user stopped the run; everything up to the last committed round is saved."""

    exit_code = 4
