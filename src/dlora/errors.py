"""The errors of dlora, as one tree of exceptions.

    DloraError                  say what was asked, what came, what to do
    ├── UserError               the user's mistake                        exit code 2
    │   ├── ConfigError         the YAML, an override, a combination of keys
    │   ├── DataError           a file, a column, a row, a label, a partition
    │   ├── ModelError          a model folder, its weights, its modules
    │   ├── TopologyError       a graph or matrix that cannot be mixed on
    │   ├── RunError            a run folder: another run's, changed, damaged, no space left
    │   └── IdentityError       a key, a certificate, a federation file
    ├── NeighbourError          a neighbour's mistake: it is in another run     exit code 3
    ├── CloudError              the cloud refused, or cannot do what was asked  exit code 3
    └── Interrupted             Ctrl-C; the run is saved and resumable    exit code 4

Exit code 0 is a finished run.
"""


class DloraError(Exception):
    """The base class; ``exit_code`` is the exit code of the command line.

    ``told``: another process of this run shows the error, so this one shows nothing.
    """

    exit_code = 1
    told = False


class UserError(DloraError):
    """Something the user can fix; the message says how."""

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


class IdentityError(UserError):
    """A key, a certificate or the federation file cannot be used."""


class NeighbourError(DloraError):
    """A neighbour is not in this run; nothing was exchanged with it."""

    exit_code = 3


class CloudError(DloraError):
    """The cloud refused this device, or cannot do what it asked; no local step is half done."""

    exit_code = 3


class Interrupted(DloraError):
    """The user stopped the run; everything up to the last committed round is saved."""

    exit_code = 4
